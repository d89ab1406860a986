"""Pairs of answers that somebody compared, in a form that the stage pairs reads."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from storage.conversations import Message
from storage.jsonl import content_id


def save_pair(
    file: Path, prompt: Sequence[Message], chosen: str, rejected: str, models: tuple[str, str]
) -> str:
    """Add a pair to a file of JSON lines, and its id. `models` gave the chosen and the rejected answer.

    Raises ValueError for a prompt that does not end with the user's turn, and for equal answers.
    """
    if not prompt or prompt[-1]["role"] != "user" or chosen.strip() == rejected.strip():
        raise ValueError("a pair is a prompt that ends with the user's turn, and two answers to it")
    name = content_id([list(prompt), chosen, rejected])
    row = {
        "id": name,
        "prompt": list(prompt),
        "chosen": chosen,
        "rejected": rejected,
        "chosen_model": models[0],
        "rejected_model": models[1],
        "rated": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return name
