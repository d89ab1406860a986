"""Two-sided JSON lines: `train.jsonl` and `held.jsonl`, the files of conversations and preferences."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

Split = Literal["train", "held"]

SPLITS: tuple[Split, Split] = ("train", "held")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines of our own, in order."""
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def take_up(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that is written row by row, none without one; a row that a killed process left
    unfinished is cut off."""
    if not path.exists():
        return []
    whole = path.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def split_by_hash(key: str, held_share: float) -> Split:
    """`held` for a share of all keys; white space in the key does not count.

    A function of the key alone: a question is held out in every file, stage and run, or in none.
    """
    digest = hashlib.blake2b(" ".join(key.split()).encode("utf-8"), digest_size=8).digest()
    return "held" if int.from_bytes(digest, "big") < held_share * 2.0**64 else "train"


def content_id(content: Any) -> str:
    """Sixteen hexadecimal digits that name a JSON value by what it says."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()


class SplitWriter:
    """Writes both files of a folder, each present even when empty. A context manager."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.counts: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        self._streams = {
            split: (folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n")
            for split in SPLITS
        }

    def write(self, split: Split, row: Mapping[str, Any]) -> None:
        """Append one row; keys keep their order, so equal rows are equal bytes."""
        self._streams[split].write(json.dumps(row, ensure_ascii=False) + "\n")
        self.counts[split] += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for stream in self._streams.values():
            stream.close()
