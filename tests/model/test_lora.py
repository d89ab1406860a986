"""Low-rank corrections: they start at nothing, alone learn, and leave a plain model behind."""

from pathlib import Path

import pytest
import torch
from torch import nn

from conf.dpo import DpoConfig
from conf.launch import LaunchConfig
from conf.lora import LoraConfig
from conf.sft import SftConfig
from conf.shape import ShapeConfig
from model import dpo, sft
from model.lora import LoraLinear, add_lora, merge_lora
from model.transformer import Transformer
from model.weights import load_model
from tests.model.small_world import kill_at, make_job, metrics, run_here, write_world

RANK = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def model(*, is_trained: bool) -> Transformer:
    net = Transformer(ShapeConfig(dim=32, layers=2, has_qkv_bias=True, context=32), 50, seed=1)
    add_lora(net, LoraConfig(rank=RANK), seed=4)
    if is_trained:
        with torch.no_grad():
            for name, weight in net.named_parameters():
                if name.endswith("widen"):
                    weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return net


def logits(net: Transformer) -> torch.Tensor:
    ids = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return net.logits(net.hidden(ids))


def test_one_layer_by_hand() -> None:
    # W = (1, 2), A = (1, 1), B = (3), alpha / rank = 2: y = (1 + 2 * 3, 2 + 2 * 3) . x
    linear = nn.Linear(2, 1, bias=False)
    linear.weight = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    layer = LoraLinear(linear, 1, 2.0, torch.Generator())
    with torch.no_grad():
        layer.narrow.copy_(torch.tensor([[1.0, 1.0]]))
        layer.widen.copy_(torch.tensor([[3.0]]))
        assert layer(torch.tensor([1.0, 0.5])).item() == 7 + 0.5 * 8
        assert layer.merged().weight.tolist() == [[7.0, 8.0]]


def test_it_starts_as_the_model_it_was_and_merges_into_one_that_computes_the_same() -> None:
    plain = Transformer(ShapeConfig(dim=32, layers=2, has_qkv_bias=True, context=32), 50, seed=1)
    assert torch.equal(logits(model(is_trained=False)), logits(plain))
    trained = model(is_trained=True)
    before = logits(trained)
    assert (before - logits(plain)).abs().max() > 1e-3
    merge_lora(trained)
    torch.testing.assert_close(logits(trained), before, rtol=0, atol=1e-5)
    assert trained.state_dict().keys() == plain.state_dict().keys()
    assert all(weight.requires_grad for weight in trained.parameters())


def test_only_the_corrections_learn() -> None:
    net = model(is_trained=False)
    learning = {name.rsplit(".", 1)[1] for name, w in net.named_parameters() if w.requires_grad}
    assert learning == {"narrow", "widen"}
    # Seven matrices a block, of rank 3: 3 x (in + out) each.
    shape = net.shape
    widths = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 88), (32, 88), (88, 32)]
    assert (shape.ffn_width, shape.kv_heads * shape.head_width) == (88, 16)
    wanted = 2 * RANK * sum(a + b for a, b in widths)
    assert sum(w.numel() for w in net.parameters() if w.requires_grad) == wanted


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_stage_learns_a_change_of_that_rank_and_nothing_else(
    stage: str, world: Path, tmp_path: Path
) -> None:
    fields = {"max_steps": 8, "batch_rows": 8, "learning_rate": 2e-2, "lora": {"rank": RANK}}
    settings = (SftConfig if stage == "sft" else DpoConfig).model_validate(fields)
    read = {"sft": "conversations", "dpo": "preferences"}[stage]
    inputs = {"policy": world / "policy", read: world / read}
    job = make_job(tmp_path, stage, settings, inputs)
    run_here(sft.work if stage == "sft" else dpo.work, job)
    lines = metrics(job)
    assert lines[-1]["loss"] < lines[1]["loss"]
    before = load_model(world / "policy").state_dict()
    after = load_model(job.files).state_dict()
    assert before.keys() == after.keys()
    for name, weight in after.items():
        change = weight - before[name]
        if weight.dim() < 2 or not name.startswith("blocks."):
            assert not change.any(), name
        else:
            sizes = torch.linalg.svdvals(change)
            assert sizes[0] > 0, name
            assert sizes[RANK] < 1e-4 * sizes[0], name


def test_engines_that_cut_matrices_are_refused() -> None:
    launch = LaunchConfig(engine="fsdp", processes=2, tensor_parallel=2)
    for config in (SftConfig, DpoConfig):
        with pytest.raises(ValueError, match=r"lora\.rank=4 does not run with launch\.tensor_par"):
            config(lora=LoraConfig(rank=4), launch=launch)


def test_killed_on_the_way_it_ends_with_the_same_bytes(world: Path, tmp_path: Path) -> None:
    settings = SftConfig(
        max_steps=60, batch_rows=8, checkpoint_every_steps=4, lora=LoraConfig(rank=RANK)
    )
    inputs = {name: world / name for name in ("policy", "conversations")}
    whole = make_job(tmp_path / "whole", "sft", settings, inputs)
    run_here(sft.work, whole)
    broken = make_job(tmp_path / "broken", "sft", settings, inputs)
    kill_at(broken, 7)
    run_here(sft.work, broken)
    first, second = ((job.files / "model.safetensors").read_bytes() for job in (whole, broken))
    assert first == second
