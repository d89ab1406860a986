"""The file of rated pairs."""

import json
from pathlib import Path
from typing import Any

from flows.rated_pairs import save_pair
from storage.conversations import Message

ASKED: list[Message] = [{"role": "user", "content": "猫吃什么？"}]


def saved(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def test_what_was_said_last_of_two_answers_counts(tmp_path: Path) -> None:
    file = tmp_path / "made" / "rated.jsonl"
    odd = "米饭。\u2028\x0b\x85\r\n!"  # what some take for ends of lines
    save_pair(file, ASKED, odd, "石头。", ("a", "b"))
    save_pair(file, ASKED, "鱼。", odd, ("a", "b"))
    save_pair(file, ASKED, "鱼。", odd, ("a", "b"))
    assert [row["chosen"] for row in saved(file)] == [odd, "鱼。"]
    save_pair(file, ASKED, odd, "鱼。", ("b", "a"))
    pairs = [(row["chosen"], row["rejected"], row["chosen_model"]) for row in saved(file)]
    assert pairs == [(odd, "石头。", "a"), (odd, "鱼。", "b")]
    visible = [path.name for path in file.parent.iterdir() if not path.name.startswith(".")]
    assert visible == ["rated.jsonl"]  # all that a source of this folder may read
