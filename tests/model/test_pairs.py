"""The worker of pairs: the policy's own answers against the reference answers."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.pairs import PairsConfig
from conf.sft import SftConfig
from model import pairs, sft
from model.reward import last_token_scores
from model.transformer import Transformer
from model.weights import save_model
from storage.conversations import is_withheld, read_conversations
from storage.tokenizer import ChatTokenizer
from tests.model.small_world import SHAPE, facts, make_job, run_here, write_world


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


def answered(
    world: Path, folder: Path, inputs: dict[str, Path] | None = None, **settings: Any
) -> tuple[dict[str, Any], list[Any]]:
    config = PairsConfig.model_validate({"max_new_tokens": 24, **settings})
    job = make_job(
        folder,
        "pairs",
        config,
        {
            "policy": world / "sft" / "files",
            "conversations": world / "conversations",
            **(inputs or {}),
        },
    )
    paths = [source.path for source in config.functions]
    job = job.model_copy(update={"sources": {"functions": paths}})
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


RULE = """
def score(answer):
    assert answer["is_ended"] and answer["messages"][-1]["role"] == "user"
    return 2.0 * (answer["text"] == answer["reference"]) - 0.01 * len(answer["text"])
"""


@pytest.mark.parametrize("several", ["best_worst", "all_pairs"])
def test_a_rule_ranks_the_policys_own_answers(several: str, world: Path, tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text(RULE, "utf-8")
    figures, rows = answered(
        world,
        tmp_path,
        answers=4,
        temperature=1.5,
        rank_by="functions",
        functions=[{"path": str(tmp_path / "rule.py")}],
        several_answers=several,
    )
    right = dict(facts())
    assert len(rows) == figures["train"]["kept"] > 0
    by_prompt = Counter(row["prompt"][0]["content"] for row in rows)
    assert (max(by_prompt.values()) == 1) == (several == "best_worst")
    for row in rows:
        asked = right[row["prompt"][0]["content"]]
        scores = [
            2.0 * (text == asked) - 0.01 * len(text) for text in (row["chosen"], row["rejected"])
        ]
        assert row["margin"] == pytest.approx(scores[0] - scores[1])
        assert row["margin"] > 0
    assert any(row["chosen"] == right[row["prompt"][0]["content"]] for row in rows)


def test_a_reward_model_ranks_by_its_score_at_the_end(world: Path, tmp_path: Path) -> None:
    tokenizer = world / "sft" / "files" / "tokenizer"
    meta = ChatTokenizer(tokenizer)
    model = Transformer(SHAPE, meta.vocabulary, is_scalar=True, seed=5)
    save_model(tmp_path / "reward", model, role="reward", tokenizer=tokenizer)
    inputs = {"reward": tmp_path / "reward"}
    _, rows = answered(world, tmp_path, inputs, answers=3, temperature=1.5, rank_by="reward")
    assert rows
    for row in rows[:5]:
        asked = meta.render(row["prompt"], for_generation=True).ids
        ids = [[*asked, *meta.encode(row[side]), meta.im_end] for side in ("chosen", "rejected")]
        chosen, rejected = last_token_scores(model, ids).tolist()
        assert row["margin"] == pytest.approx(chosen - rejected, abs=1e-4)


def test_withheld_questions_alone_are_asked(world: Path) -> None:
    rows = list(read_conversations(world / "conversations", "train"))
    settings = PairsConfig(prompts="withheld", withheld_share=0.4)
    asked = pairs.chosen_rows(rows, settings, "train")
    assert 0 < len(asked) < len(rows)
    for row in rows:
        assert (row in asked) == is_withheld(row["messages"], 0.4)
    # Whether a question is held out says nothing of whether it is withheld.
    assert not is_withheld(asked[0]["messages"], 0.0)
    assert pairs.chosen_rows(rows, settings, "held") == rows


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"rank_by": "reward"}, "set answers to 2 or more"),
        ({"rank_by": "judge", "answers": 2}, "rank_by=judge does not go with judge=None"),
        ({"functions": [{"path": "a.py"}]}, "rank_by=reference does not go with functions"),
    ],
)
def test_rankings_without_what_ranks_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        PairsConfig.model_validate(settings)
