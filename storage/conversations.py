"""Conversations in one normal form: who said what, ending with the assistant."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias, TypedDict, cast

from storage.artifact import Artifact
from storage.jsonl import Split, read_jsonl, split_by_hash

Role = Literal["system", "user", "assistant"]


Message: TypeAlias = dict[str, str]
"""One turn: `role` (a Role) and `content`. A plain mapping, which is what chat templates take."""


class Conversation(TypedDict):
    """One row: an optional system message, then user and assistant in turn, the assistant last."""

    id: str
    messages: list[Message]
    domain: str
    source: str
    language: str


@dataclass(frozen=True)
class Conversations(Artifact):
    """`files/train.jsonl` and `files/held.jsonl`, a Conversation a line."""

    kind: ClassVar[str] = "conversations"

    def rows(self, split: Split) -> Iterator[Conversation]:
        """The conversations of one side, in order."""
        return read_conversations(self.files, split)


def read_conversations(files: Path, split: Split) -> Iterator[Conversation]:
    """The conversations of one side in the folder `files` of an artifact."""
    return cast("Iterator[Conversation]", read_jsonl(files / f"{split}.jsonl"))


def first_user_turn(messages: list[Message]) -> str:
    """What decides the side of a conversation, and of every pair with the same question."""
    return next(message["content"] for message in messages if message["role"] == "user")


def is_withheld(messages: list[Message], share: float) -> bool:
    """Whether a conversation belongs to the share of questions that sft leaves to pairs; a hash of the
    first user turn decides, another one than that of the held-out side."""
    return split_by_hash(f"withheld {first_user_turn(messages)}", share) == "held"
