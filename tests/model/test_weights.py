"""Models and checkpoints on disk."""

from pathlib import Path

import pytest
import torch

from conf.shape import ShapeConfig
from model.ranks import Ranks
from model.transformer import Transformer
from model.weights import Checkpoints, load_model, load_tensors, save_model, save_tensors
from storage.checkpoint import ModelCard
from storage.tokenizer import read_meta
from tests.model.tiny import tiny_tokenizer

SHAPE = ShapeConfig(dim=16, layers=1, heads=2, kv_heads=1, context=16)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    tiny_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_policy_comes_back_to_the_bit(tmp_path: Path, tokenizer: Path, is_tied: bool) -> None:
    model = Transformer(SHAPE.model_copy(update={"is_tied": is_tied}), 400, seed=5)
    save_model(tmp_path / "files", model, role="policy", tokenizer=tokenizer)
    loaded = load_model(tmp_path / "files")
    assert loaded.shape == model.shape
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])


def test_the_card_says_role_size_and_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    card = save_model(
        tmp_path / "files", Transformer(SHAPE, 400), role="policy", tokenizer=tokenizer
    )
    assert card == ModelCard.read(tmp_path / "files")
    assert card.parameters == SHAPE.parameters(400)
    assert card.tokenizer_digest == read_meta(tokenizer).digest
    assert (tmp_path / "files" / "tokenizer" / "tokenizer.json").is_file()


def test_saving_twice_gives_the_same_bytes(tmp_path: Path, tokenizer: Path) -> None:
    for name in ("one", "two"):
        model = Transformer(SHAPE, 400, seed=5)
        save_model(tmp_path / name, model, role="policy", tokenizer=tokenizer)
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_policy_becomes_a_scalar_model_with_a_new_head(
    tmp_path: Path, tokenizer: Path, is_tied: bool
) -> None:
    policy = Transformer(SHAPE.model_copy(update={"is_tied": is_tied}), 400, seed=5)
    save_model(tmp_path / "files", policy, role="policy", tokenizer=tokenizer)
    first, second = (
        load_model(tmp_path / "files", is_scalar=True, seed=1),
        load_model(tmp_path / "files", is_scalar=True, seed=2),
    )
    ids = torch.arange(8)[None]
    assert torch.equal(first.hidden(ids), policy.hidden(ids))
    assert first.score(first.hidden(ids)).shape == (1, 8)
    assert not torch.equal(first.score(first.hidden(ids)), second.score(second.hidden(ids)))


def test_a_reward_model_is_no_policy(tmp_path: Path, tokenizer: Path) -> None:
    model = Transformer(SHAPE, 400, is_scalar=True)
    save_model(tmp_path / "files", model, role="reward", tokenizer=tokenizer)
    assert load_model(tmp_path / "files").is_scalar
    with pytest.raises(ValueError, match="is a reward model, a policy is needed"):
        load_model(tmp_path / "files", is_scalar=False)


def test_a_draft_left_by_a_kill_is_never_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {}, Ranks())
    checkpoints.save(
        3, {"a": 1}, lambda _: lambda folder: save_tensors(folder / "x", {"w": torch.ones(2)})
    )
    draft = tmp_path / "draft_000000004"
    draft.mkdir()
    save_tensors(draft / "x", {"w": torch.zeros(2)})
    saved = checkpoints.newest()
    assert saved is not None
    assert (saved.step, saved.state) == (3, {"a": 1})
    assert load_tensors(saved.path / "x")["w"].tolist() == [1.0, 1.0]


def test_generators_of_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {}, Ranks())
    checkpoints.save(1, {}, lambda _: lambda folder: None)
    wanted = torch.rand(3)
    torch.manual_seed(99)
    checkpoints.newest()
    assert torch.equal(torch.rand(3), wanted)
