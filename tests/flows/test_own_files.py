"""Files of a user's own are looked into before anything runs, and nothing of them is run."""

from pathlib import Path
from typing import Any

import pytest

from conf.mistakes import RecipeError
from tests.flows.test_graph import real_graph

PPO: dict[str, Any] = {"from": {"policy": "pretrain", "conversations": "chats"}}
ROWS = '{"prompt": "Who?", "answer": "Me.", "score": 1}\n{"prompt": "谁？", "answer": "我。"}\n'
MISTAKES: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "people's scores that were not filled in",
        {
            "ppo": {
                **PPO,
                "people": [{"path": "own/none", "is_optional": True}, {"path": "own/rows"}],
            }
        },
        "stages.ppo.people[1]",
        "own/rows:2 is no score (KeyError: 'score'); a line is a JSON object with messages",
    ),
    (
        "a reward function of another name",
        {"ppo": {**PPO, "functions": [{"path": "own/*.py"}]}},
        "stages.ppo.functions[0]",
        "own/rate.py has no function `score`; it needs `def score(answer) -> float`",
    ),
    (
        "a rule that is no Python",
        {"filter": {"from": {"corpus": "extract"}, "own_rules": [{"path": "own/text"}]}},
        "stages.filter.own_rules[0]",
        "own/text is no Python (invalid syntax",
    ),
    (
        "a task of one's own without an answer",
        {"evaluate": {"from": {"policy": "pretrain"}, "own_tasks": [{"path": "own/rows"}]}},
        "stages.evaluate.own_tasks[0]",
        "own/rows, line 1: expected `prompt` with `references`",
    ),
]


def write(folder: Path, **files: str) -> None:
    (folder / "own").mkdir()
    for name, text in files.items():
        (folder / "own" / name.replace("_py", ".py")).write_text(text, "utf-8")


@pytest.mark.parametrize(
    ("stages", "at", "words"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES]
)
def test_what_they_lack_is_told_with_its_place(
    tmp_path: Path, stages: dict[str, Any], at: str, words: str
) -> None:
    write(tmp_path, rate_py="def rate(answer):\n    return score(1)\n", rows=ROWS, text="keep it")
    with pytest.raises(RecipeError) as caught:
        real_graph(tmp_path, stages)
    assert [mistake.place for mistake in caught.value.mistakes] == [at]
    assert words in str(caught.value)


def test_what_will_do_passes(tmp_path: Path) -> None:
    write(
        tmp_path,
        one_py="def score(answer): return 1.0",
        two_py="from one import rate as score",
        three_py="if True:\n    score = lambda answer: 0.0",
        four_py="from one import *\nraise SystemExit",
        scores=ROWS.splitlines()[0],
    )
    stages = {
        "pretrain": {"from": {"tokens": "tokenize"}, "kept_looks": 1},
        "chats": {"sources": [{"path": "raw", "split": "held"}], "held_share": 0},
        "ppo": {
            **PPO,
            "functions": [{"path": "own/*.py"}],
            "people": [{"path": "own/scores"}],
            "truth_functions": [{"path": "own/one.py"}],
            "truth_every_iterations": 5,
        },
        "evaluate": {"from": {"policy": "pretrain"}, "has_curve": True},
    }
    assert "ppo" in real_graph(tmp_path, stages).nodes
