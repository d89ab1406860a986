"""Models and checkpoints on disk."""

import json
import threading
from pathlib import Path

import pytest
import torch

from conf.shape import ShapeConfig
from model.ranks import Ranks
from model.transformer import Transformer
from model.weights import (
    Checkpoints,
    ForeignCheckpoint,
    Write,
    load_model,
    load_tensors,
    save_model,
    save_tensors,
)
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


def ones(folder: Path) -> None:
    save_tensors(folder / "x", {"w": torch.ones(2)})


def test_a_checkpoint_is_written_beside_what_goes_on_and_only_one_at_a_time(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {}, Ranks())
    may_write, asked = threading.Event(), list[bool]()

    def snapshot(is_lasting: bool) -> Write:
        asked.append(is_lasting)

        def write(folder: Path) -> None:
            assert may_write.wait(60)
            ones(folder)

        return write

    checkpoints.save(1, {}, lambda _: ones)
    checkpoints.save(2, {}, snapshot, is_beside=True)
    # It is being written: who would go on now has the one before.
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "draft_000000002",
        "step_000000001",
    ]
    threading.Timer(0.05, may_write.set).start()
    checkpoints.save(3, {}, snapshot, kept=3, is_beside=True)
    assert (tmp_path / "step_000000002").is_dir()
    checkpoints.settle()
    assert sorted(path.name[-1] for path in tmp_path.glob("step_*")) == ["1", "2", "3"]
    assert asked == [True, True]


def test_what_goes_wrong_in_writing_beside_is_raised_and_leaves_the_one_before(
    tmp_path: Path,
) -> None:
    checkpoints = Checkpoints(tmp_path, {}, Ranks())
    checkpoints.save(1, {}, lambda _: ones)

    def fail(folder: Path) -> None:
        ones(folder)
        raise OSError(28, "No space left on device")

    checkpoints.save(2, {}, lambda _: fail, is_beside=True)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.settle()
    saved = Checkpoints(tmp_path, {}, Ranks()).newest()
    assert saved is not None
    assert saved.step == 1


def test_a_checkpoint_of_an_older_form_is_refused_in_words(tmp_path: Path) -> None:
    Checkpoints(tmp_path, {}, Ranks()).save(1, {}, lambda _: ones)
    note = tmp_path / "step_000000001" / "complete.json"
    content = json.loads(note.read_text("utf-8"))
    del content["identity"]["form"]
    note.write_text(json.dumps(content), "utf-8")
    with pytest.raises(ForeignCheckpoint, match=r"form: .* -> 2.*remove the folder to start anew"):
        Checkpoints(tmp_path, {}, Ranks()).newest()


def test_generators_of_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {}, Ranks())
    checkpoints.save(1, {}, lambda _: lambda folder: None)
    wanted = torch.rand(3)
    torch.manual_seed(99)
    checkpoints.newest()
    assert torch.equal(torch.rand(3), wanted)
