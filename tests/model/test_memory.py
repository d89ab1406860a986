"""What a plan says that training will hold in memory, against autograd itself and real processes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from conf.compose import FOLDER
from conf.launch import LaunchConfig
from conf.pretrain import PretrainConfig
from conf.shape import ShapeConfig
from flows import memory
from flows.memory import Pass, kept_bytes, training_memory
from model import head, held_out, transformer
from model.noise import Noise
from model.optimizer import UpdateRule, build_optimizers
from model.transformer import AttentionMask, Transformer, token_logprobs
from storage.tokens import SplitCount, TokensMeta, bytes_path, end_path, token_path, write_meta
from tests.model.small_jobs import start, write_job
from tests.model.tiny import tiny_tokenizer

VOCABULARY = 300
SHAPES = {
    "grouped": {"heads": 4, "kv_heads": 2, "layers": 3},
    "wide heads, untied": {"heads": 4, "kv_heads": 4, "head_dim": 24, "is_tied": False},
    "qk norm": {"heads": 8, "kv_heads": 2, "head_dim": 16, "has_qk_norm": True},
    "qkv bias and dropout": {"heads": 4, "kv_heads": 2, "has_qkv_bias": True, "dropout": 0.1},
    "window in one layer": {"heads": 4, "kv_heads": 2, "sliding_window": 9, "full_layers": (0,)},
}


def kept_by_autograd(shape: ShapeConfig, work: Pass) -> int:
    """Bytes that the forward pass saves, parameters, log-softmax and labels apart."""
    net = Transformer(shape, VOCABULARY)
    own = {x.untyped_storage().data_ptr() for x in (*net.parameters(), *net.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    ids = torch.zeros(work.rows, work.row_tokens, dtype=torch.long)
    mask = AttentionMask(documents=ids) if work.is_masked else None
    noise = Noise(0, torch.arange(work.rows)) if work.has_noise else None
    is_half = work.precision == "bf16"
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=is_half),
    ):
        logprobs = token_logprobs(net.head_weight, net.hidden(ids, mask=mask, noise=noise), ids)
    assert logprobs.requires_grad
    sizes = sum(x.untyped_storage().nbytes() for x in saved.values())
    return sizes - work.tokens * (4 * VOCABULARY + 8)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", list(SHAPES))
def test_kept_activations_are_those_that_autograd_keeps(kind: str, precision: str) -> None:
    fields = {"dim": 64, "layers": 2, "context": 64} | SHAPES[kind]
    shape = ShapeConfig.model_validate(fields)
    for is_masked in (False, True):
        work = Pass(
            3, 64, "bf16" if precision == "bf16" else "fp32",
            is_masked=is_masked, has_noise=shape.dropout > 0,
        )  # fmt: skip
        found, told = kept_by_autograd(shape, work), kept_bytes(shape, VOCABULARY, work)
        assert told == pytest.approx(found, rel=0.002)


def test_limits_are_those_of_the_model() -> None:
    assert memory.LOGITS_AT_ONCE == transformer.LOGITS_AT_ONCE == head.LOGITS_AT_ONCE
    assert memory.LOGITS_IN_CACHE == head.LOGITS_IN_CACHE
    assert memory.LEAST_ROWS == head.LEAST_ROWS
    assert memory.EVALUATION_TOKENS == held_out.EVALUATION_TOKENS


def test_engines_spread_what_they_say() -> None:
    shape, work = ShapeConfig(), Pass(1, 8)
    whole = 4 * shape.parameters(500)

    def parts(engine: memory.Engine) -> tuple[float, float, float]:
        found = training_memory(shape, 500, work, engine=engine, processes=4)
        return (
            found.weights / whole, found.gradients / whole, found.optimizer / whole,
        )  # fmt: skip

    assert parts("ddp") == (1, 1, 2)
    assert parts("zero1") == (1, 1, 0.5)
    assert parts("zero2") == (1, 0.25, 0.5)
    assert parts("zero3") == parts("fsdp") == (0.25, 0.25, 0.5)


def test_stages_hold_their_blocks_and_a_table_and_offloaded_state_is_the_hosts() -> None:
    shape, work = ShapeConfig(layers=4), Pass(1, 8)
    # Of each block: query and output D x D, key and value D x KE, three of D x F, two norms.
    keys = shape.kv_heads * shape.head_width
    block = (
        2 * shape.dim**2 + 2 * shape.dim * keys + 3 * shape.dim * shape.ffn_width + 2 * shape.dim
    )
    halved = training_memory(shape, 500, work, engine="ddp", processes=2, stages=2)
    assert halved.weights == 4 * (2 * block + 500 * shape.dim)
    assert halved.optimizer == 2 * halved.weights
    assert training_memory(shape, 500, work, engine="zero2", offload="optimizer").optimizer == 0
    away = training_memory(shape, 500, work, engine="fsdp", offload="parameters")
    assert (away.weights, away.gradients, away.optimizer) == (0, 0, 0)


def test_muon_keeps_what_its_optimizers_keep() -> None:
    shape = ShapeConfig(
        dim=32, layers=2, heads=4, kv_heads=2, context=16, has_qkv_bias=True, has_qk_norm=True
    )
    net = Transformer(shape, VOCABULARY)
    optimizers = build_optimizers(net.named_parameters(), UpdateRule(optimizer="muon"))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    kept = [
        state.nbytes
        for optimizer in optimizers
        for states in optimizer.state.values()
        for state in states.values()
        if state.dim()
    ]
    told = training_memory(shape, VOCABULARY, Pass(1, 8), optimizer="muon")
    assert told.optimizer == pytest.approx(sum(kept), rel=1e-9)
    assert told.optimizer < 0.8 * training_memory(shape, VOCABULARY, Pass(1, 8)).optimizer


def test_recomputing_activations_keeps_one_block() -> None:
    shape = ShapeConfig(layers=12)
    whole = kept_bytes(shape, 500, Pass(8, 256))
    assert kept_bytes(shape, 500, Pass(8, 256, is_recomputed=True)) < whole / 4


def measured_peak(folder: Path, settings: PretrainConfig, vocabulary: int, micro_batch: int) -> int:
    """Most bytes that the process of a real pretraining held."""
    tokens, count = folder / "tokens", 100_000
    digest = tiny_tokenizer(tokens / "tokenizer").digest
    split = SplitCount(tokens=count, documents=1, bytes=count)
    for name in ("train", "held"):
        ids = np.random.default_rng(0).integers(4, vocabulary, count).astype("<u2")
        ids.tofile(token_path(tokens, "a", name))
        np.array([count], "<u8").tofile(end_path(tokens, "a", name))
    np.array([count], "<u4").tofile(bytes_path(tokens, "a"))
    meta = TokensMeta(
        eos=1, vocabulary=vocabulary, tokenizer_digest=digest,
        domains={"a": {"train": split, "held": split}},
    )  # fmt: skip
    write_meta(tokens, meta)
    launch = LaunchConfig(threads=1, micro_batch=micro_batch)
    job = write_job(folder / "attempt", "pretrain", settings, {"tokens": tokens}, launch)
    [worker] = start("model.pretrain", job)
    printed = worker.stdout.read()
    _, status, usage = os.wait4(worker.pid, 0)
    assert status == 0, printed
    return usage.ru_maxrss * 1024


RUNS = {
    "5m": (8_192, 16, 0, "fp32"),
    "20m": (24_000, 8, 2, "bf16"),
    "92m": (16_000, 2, 1, "fp32"),
}


@pytest.mark.soak
@pytest.mark.parametrize("preset", list(RUNS))
def test_the_estimate_is_within_15_percent_of_a_real_process(preset: str, tmp_path: Path) -> None:
    vocabulary, rows, micro_batch, precision = RUNS[preset]
    text = (FOLDER / "shape" / f"{preset}.yaml").read_text("utf-8")
    shape = ShapeConfig.model_validate(yaml.safe_load(text))
    settings = PretrainConfig.model_validate(
        {
            "shape": shape,
            "tokens": 2 * rows * shape.context,
            "batch_tokens": rows * shape.context,
            "precision": precision,
            "held_tokens": 0,
        }
    )
    work = Pass(micro_batch or rows, shape.context, settings.precision, is_fused=True)
    told = training_memory(shape, vocabulary, work, is_accumulated=bool(micro_batch)).total
    found = measured_peak(tmp_path, settings, vocabulary, micro_batch)
    figures = f"{preset}: told {told / 1e6:.0f} MB, held {found / 1e6:.0f} MB"
    assert told == pytest.approx(found, rel=0.15), figures
