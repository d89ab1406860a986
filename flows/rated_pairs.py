"""Pairs of answers that somebody compared, in a form that the stage pairs reads."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from flows.runs import FileLock
from storage.conversations import Message
from storage.jsonl import content_id


def save_pair(
    file: Path, prompt: Sequence[Message], chosen: str, rejected: str, models: tuple[str, str]
) -> str:
    """Add a pair to a file of JSON lines, and its id. `models` gave the chosen and the rejected answer.

    The same pair is there once, and what was said last of two answers replaces what was said before.
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
    replaced = (name, content_id([list(prompt), rejected, chosen]))
    begins = tuple(f'{{"id": "{one}"'.encode() for one in replaced)
    with FileLock(file.with_name(f".{file.name}.lock")):
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        kept = [line for line in lines if not line.startswith(begins)]
        if len(kept) < len(lines):
            aside = file.with_name(f".{file.name}.new")
            aside.write_bytes(b"".join(kept))
            aside.replace(file)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return name
