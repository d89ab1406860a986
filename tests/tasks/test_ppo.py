"""What stage ppo refuses before any work: no reward, other tokens, a reward model that is no better than chance."""

from pathlib import Path

import pytest

from conf.ppo import PpoConfig
from model.transformer import Transformer
from model.weights import save_model
from storage.checkpoint import Policy, RewardModel, RewardScale
from storage.conversations import Conversations
from storage.record import Record
from storage.store import Store
from tasks.ppo import ppo
from tasks.stage import Job
from tests.model.small_world import SHAPE, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for name in ("policy", "chats", "reward"):
        (folder / name).mkdir()
    write_world(folder / "made", repeats=1)
    (folder / "made" / "policy").rename(folder / "policy" / "files")
    (folder / "made" / "conversations").rename(folder / "chats" / "files")
    files = folder / "reward" / "files"
    vocabulary = Policy(folder / "policy").card.vocabulary
    model = Transformer(SHAPE, vocabulary, is_scalar=True)
    save_model(files, model, role="reward", tokenizer=folder / "made" / "tokenizer")
    RewardScale(mean=0.0, std=1.0).write(files)
    return folder


def reward_model(world: Path, value: float, n: int) -> RewardModel:
    """One that is right on this share of so many held-out pairs."""
    metrics = {"accuracy": {"held": {"value": value, "n": n}}}
    record = Record(
        fingerprint="r", kind="reward_model", stage="test", digest="", identity={}, metrics=metrics
    )
    (world / "reward" / "record.json").write_text(record.model_dump_json(), "utf-8")
    return RewardModel(world / "reward")


def align(world: Path, folder: Path, settings: PpoConfig, reward: RewardModel | None) -> None:
    job = Job(node="ppo", stage="ppo", path=folder / "attempt", store=Store(folder / "store"))
    for path in (job.files, job.logs, job.state):
        path.mkdir(parents=True)
    ppo(
        job,
        policy=Policy(world / "policy"),
        conversations=Conversations(world / "chats"),
        settings=settings,
        reward=reward,
    )


@pytest.mark.parametrize(("value", "n"), [(0.55, 200), (0.0, 0)])
def test_the_gate_stops_it_before_anything_is_started(
    world: Path, tmp_path: Path, value: float, n: int
) -> None:
    gated = PpoConfig(on_gate="fail")
    with pytest.raises(
        ValueError, match=rf"right on {value:.3f} of {n} held-out pairs, on_gate=fail asks for 0.6"
    ):
        align(world, tmp_path, gated, reward_model(world, value, n))
    assert not [path for path in (tmp_path / "attempt").rglob("*") if path.is_file()]


def test_without_anything_that_gives_a_reward_it_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing that gives a reward"):
        align(world, tmp_path, PpoConfig(), None)


def test_a_reward_model_of_other_tokens_is_refused(world: Path, tmp_path: Path) -> None:
    reward = reward_model(world, 0.9, 200)
    path = reward.files / "config.json"
    content = path.read_text("utf-8")
    digest = reward.card.tokenizer_digest
    path.write_text(content.replace(digest, "f" * len(digest)), "utf-8")
    try:
        with pytest.raises(
            ValueError, match=r"speaks the tokens of .*, the reward model those of ffff"
        ):
            align(world, tmp_path, PpoConfig(), RewardModel(world / "reward"))
    finally:
        path.write_text(content, "utf-8")
