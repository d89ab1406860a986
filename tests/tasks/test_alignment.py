"""The alignment stages through store and launcher: each commits its kind, and a second time hits."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.chats import ChatsConfig
from conf.dpo import DpoConfig
from conf.launch import LaunchConfig
from conf.pairs import PairsConfig
from conf.ppo import PpoConfig, RewardWeights
from conf.reward import RewardConfig
from conf.settings import Settings, SourceSpec
from conf.sft import SftConfig
from storage.artifact import Artifact
from storage.checkpoint import Policy
from storage.identity import fingerprint
from storage.preferences import Preferences
from storage.record import Record
from storage.source import HashCache, resolve
from storage.store import Store
from tasks.stage import Outcome, execute, stages
from tests.model.small_world import function_file, write_world

LAUNCH = LaunchConfig(threads=1, device="cpu")


class Bench:
    """A store with a policy in it, and a way to execute stages on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(folder / "store")
        write_world(folder / "world", repeats=2)
        self.policy = Policy(self._commit(folder / "world" / "policy", "policy"))

    def run(self, name: str, settings: Settings, **inputs: Artifact) -> Outcome:
        """Find or build one node."""
        sources = {
            field: resolve(
                specs,
                artifacts={},
                base=self.folder / "world",
                ledger=None,
                hashes=HashCache(),
            )
            for field, specs in settings.source_fields()
        }
        return execute(
            stages()[name],
            node=name,
            settings=settings,
            inputs=inputs,
            sources=sources,
            store=self.store,
            workers=1,
        )

    def _commit(self, files: Path, kind: str) -> Path:
        address = fingerprint({"test": kind})
        claim = self.store.claim(address)
        assert claim is not None
        with claim:
            (claim.path / "files").rmdir() if (claim.path / "files").exists() else None
            files.rename(claim.path / "files")
            record = Record(
                fingerprint=address, kind=kind, stage="test", digest="", identity={"test": kind}
            )
            return self.store.commit(claim, record)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.slow
def test_the_whole_chain_commits_and_hits(bench: Bench) -> None:
    specs = tuple(
        SourceSpec(path=f"conversations/{split}.jsonl", split=split) for split in ("train", "held")
    )
    pair_specs = tuple(
        SourceSpec(path=f"preferences/{split}.jsonl", split=split) for split in ("train", "held")
    )
    short: dict[str, Any] = {"launch": LAUNCH, "max_steps": 3, "batch_rows": 8}
    chats = bench.run("chats", ChatsConfig(sources=specs, keep_duplicates=True))
    sft_settings = SftConfig(**short)
    sft = bench.run("sft", sft_settings, policy=bench.policy, conversations=chats.artifact)
    pairs = bench.run("pairs", PairsConfig(sources=pair_specs))
    own = bench.run(
        "pairs",
        PairsConfig(max_new_tokens=8, launch=LAUNCH),
        policy=sft.artifact,
        conversations=chats.artifact,
    )
    reward = bench.run(
        "reward",
        RewardConfig(scale_answers=4, max_new_tokens=8, **short),
        policy=sft.artifact,
        preferences=pairs.artifact,
    )
    aligned = {"policy": sft.artifact, "preferences": pairs.artifact}
    dpo = bench.run("dpo", DpoConfig(**short), **aligned)
    # What the reference says of the pairs is computed once for all losses.
    other = bench.run("dpo", DpoConfig(loss="ipo", **short), **aligned)
    assert [o.record.metrics["is_reference_reused"] for o in (dpo, other)] == [False, True]
    assert dpo.record.parts == other.record.parts
    assert dpo.record.digest != other.record.digest
    world = bench.folder / "world"
    function_file(world / "own.py", "float(len(answer['text']))")
    row = {"prompt": "猫吃什么？", "answer": "鱼。", "score": 1}
    (world / "scores.jsonl").write_text(json.dumps(row), "utf-8")
    ppo_settings = PpoConfig(
        functions=(SourceSpec(path="own.py"),),
        people=(SourceSpec(path="scores.jsonl"),),
        weights=RewardWeights(functions=0.5),
        iterations=2,
        rollout_rows=8,
        minibatch_rows=4,
        max_new_tokens=8,
        on_gate="fail",
        gate_accuracy=reward.record.metrics["accuracy"]["held"]["value"],
        launch=LAUNCH,
    )
    ppo = bench.run(
        "ppo",
        ppo_settings,
        policy=sft.artifact,
        reward=reward.artifact,
        conversations=chats.artifact,
    )
    kinds = [o.record.kind for o in (chats, sft, pairs, own, reward, dpo, ppo)]
    assert kinds == [
        "conversations",
        "policy",
        "preferences",
        "preferences",
        "reward_model",
        "policy",
        "policy",
    ]
    # 24 facts, 5 of them held out; conversations come twice here, pairs once.
    assert (chats.record.metrics["train"], chats.record.metrics["held"]) == (38, 10)
    assert sft.record.metrics["steps"] == 3
    assert reward.record.metrics["accuracy"]["held"]["n"] == 5
    assert dpo.record.metrics["accuracy"]["n"] == 5
    assert ppo.record.metrics["answers"] == 16
    # What rewarded: the model, the function of every answer, and people, who had seen none of them.
    told = ppo.record.metrics["held_after"]
    assert told["reward/model"] != 0
    assert told["reward/functions"] > 0
    assert (told["scored_share/functions"], told["scored_share/people"]) == (1.0, 0.0)
    assert len((ppo.artifact.path / "logs" / "unscored.jsonl").read_text("utf-8").splitlines()) > 0
    assert own.record.metrics["answered"]["train"]["prompts"] == 38
    assert isinstance(pairs.artifact, Preferences)
    assert sum(1 for _ in pairs.artifact.rows("train")) == pairs.record.metrics["train"]
    again = bench.run("sft", sft_settings, policy=bench.policy, conversations=chats.artifact)
    assert again.status == "hit"
    # How it is launched does not change what it is.
    moved = ppo_settings.model_copy(update={"launch": LaunchConfig(threads=2)})
    again = bench.run(
        "ppo",
        moved,
        policy=sft.artifact,
        reward=reward.artifact,
        conversations=chats.artifact,
    )
    assert again.status == "hit"


def test_only_one_of_policy_and_conversations_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="own answers need both"):
        bench.run("pairs", PairsConfig(), policy=bench.policy)
