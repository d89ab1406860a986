"""The worker of pairs: the policy's own answers against the reference answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.pairs import PairsConfig
from conf.sft import SftConfig
from model import pairs, sft
from storage.conversations import read_conversations
from tests.model.small_world import facts, make_job, run_here, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose policy is right at times."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    tuned = make_job(
        folder / "sft",
        "sft",
        SftConfig(epochs=25, batch_rows=16, learning_rate=1e-2, evaluate_every_steps=0),
        {name: folder / name for name in ("policy", "conversations")},
    )
    run_here(sft.work, tuned)
    return folder


def answered(world: Path, folder: Path, **settings: Any) -> tuple[dict[str, Any], list[Any]]:
    config = PairsConfig(**{"max_new_tokens": 24, **settings})
    job = make_job(
        folder,
        "pairs",
        config,
        {"policy": world / "sft" / "files", "conversations": world / "conversations"},
    )
    figures = run_here(pairs.work, job)
    lines = (job.state / "answered-train.jsonl").read_text("utf-8").splitlines()
    return figures, [json.loads(line) for line in lines]


def test_what_the_policy_says_wrong_is_rejected(world: Path, tmp_path: Path) -> None:
    figures, rows = answered(world, tmp_path, answers=2)
    right = dict(facts())
    counts = figures["train"]
    assert counts["prompts"] == 76
    assert counts["answers"] == 152
    # The policy knows most answers by now: those drop out, and each other one is there once.
    assert counts["answer_equal"] > 0
    reasons = ("kept", "answer_equal", "answer_too_long", "answer_empty", "repeated")
    assert sum(counts.get(reason, 0) for reason in reasons) == 152
    assert len(rows) == counts["kept"] > 0
    for row in rows:
        assert row["chosen"] == right[row["prompt"][0]["content"]]
        assert row["rejected"].strip() not in ("", row["chosen"])
    assert len({row["id"] for row in rows}) == len(rows)


def test_the_same_settings_give_the_same_bytes_and_another_seed_others(
    world: Path, tmp_path: Path
) -> None:
    runs = [
        answered(world, tmp_path / name, seed=seed, temperature=1.5)[1]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_few_prompts_are_drawn_by_the_seed(world: Path) -> None:
    rows = list(read_conversations(world / "conversations", "train"))
    drawn = pairs.chosen_rows(rows, PairsConfig(max_prompts=10), "train")
    assert len(drawn) == 10
    assert drawn == pairs.chosen_rows(rows, PairsConfig(max_prompts=10), "train")
    assert drawn != pairs.chosen_rows(rows, PairsConfig(max_prompts=10, seed=1), "train")
    assert [row["id"] for row in drawn] == [row["id"] for row in rows if row in drawn]


def test_an_answer_that_does_not_end_is_counted(world: Path, tmp_path: Path) -> None:
    figures, rows = answered(world, tmp_path, max_new_tokens=1)
    assert rows == []
    assert figures["train"]["answer_too_long"] == 76
