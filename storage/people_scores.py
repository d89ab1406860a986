"""Scores that people gave to answers, in files of a user's own."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from storage.jsonl import content_id


def people_scores(paths: Iterable[Path]) -> dict[str, float]:
    """The key of each answer that has a score -> the score; the last one counts.

    Raises ValueError for a line that is no score, and where there is none at all.
    """
    files = [*paths]
    scores: dict[str, float] = {}
    for path in files:
        # Not splitlines, which also ends lines at U+2028 and the like, as texts may have them.
        for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1):
            if line.strip():
                key, score = _scored(line, f"{path}:{number}")
                scores[key] = score
    if not scores:
        raise ValueError(f"{', '.join(map(str, files))} hold no score; name a file with some")
    return scores


def answer_key(messages: Iterable[Mapping[str, str]], answer: str) -> str:
    """What names an answer, word for word, to the messages before it."""
    return content_id([[(m["role"], m["content"].strip()) for m in messages], answer.strip()])


def _scored(line: str, place: str) -> tuple[str, float]:
    """Key and score of a line. Raises ValueError with the place."""
    try:
        row: Any = json.loads(line)
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        score = float(row["score"])
        key = answer_key(messages, row["answer"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{place} is no score ({type(error).__name__}: {error}); a line is a JSON object with messages (or "
            "prompt), answer and score, a number"
        ) from error
    if not math.isfinite(score):
        raise ValueError(f"{place}: the score {score} is not finite; give a number")
    return key, score
