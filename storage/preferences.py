"""Preferences: two answers to one prompt, of which one is better."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypedDict, cast

from storage.artifact import Artifact
from storage.conversations import Message
from storage.jsonl import Split, read_jsonl


class Preference(TypedDict):
    """One row. The prompt ends with a user turn. One of the answers may be missing: then the other one is known
    to be good (chosen), or bad, by itself."""

    id: str
    prompt: list[Message]
    chosen: str | None
    rejected: str | None
    margin: float | None
    """How much better the chosen answer is, in the source's own unit; none where it does not say."""
    domain: str


@dataclass(frozen=True)
class Preferences(Artifact):
    """`files/train.jsonl` and `files/held.jsonl`, a Preference a line."""

    kind: ClassVar[str] = "preferences"

    def rows(self, split: Split) -> Iterator[Preference]:
        """The pairs of one side, in order."""
        return read_preferences(self.files, split)


def read_preferences(files: Path, split: Split) -> Iterator[Preference]:
    """The pairs of one side in the folder `files` of an artifact."""
    return cast("Iterator[Preference]", read_jsonl(files / f"{split}.jsonl"))
