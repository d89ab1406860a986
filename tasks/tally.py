"""Rows of outside files on their way into an artifact: read, refused, repeated, held out, and counted."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from storage.conversations import Message, first_user_turn
from storage.jsonl import Split, content_id, split_by_hash
from storage.source import Source, SourceFile
from tasks.chat_formats import RowRefused
from tasks.rows import BadRow, read_rows

SHOWN_BAD_ROWS = 50
COUNTED = ("rows", "kept", "refused", "duplicates", "held_elsewhere", "trimmed")

Row = TypeVar("Row")


@dataclass
class Tally:
    """What happened to the rows, for the record and for people."""

    held_share: float
    on_bad_row: Literal["skip", "fail"]
    keep_duplicates: bool
    counts: Counter[str] = field(default_factory=Counter[str])
    layouts: Counter[str] = field(default_factory=Counter[str])
    reasons: Counter[str] = field(default_factory=Counter[str])
    files: dict[str, Counter[str]] = field(default_factory=dict[str, Counter[str]])
    bad_rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    _seen: set[str] = field(default_factory=set[str])
    _held_turns: set[str] = field(default_factory=set[str])

    def parsed(self, file: SourceFile, parse: Callable[[Any], Row]) -> Iterator[tuple[int, Row]]:
        """Line and parsed row of each good row of a file; the others are counted.

        Raises ValueError with the place of the first bad row when on_bad_row is `fail`.
        """
        for item in read_rows(file):
            self.add(file, "rows")
            if isinstance(item, BadRow):
                self._refuse(file, item)
                continue
            line, value = item
            try:
                row = parse(value)
            except RowRefused as error:
                self._refuse(file, BadRow(file.name, line, str(error)))
                continue
            yield line, row

    def place(
        self, file: SourceFile, row_id: str, messages: list[Message], held_by: str = ""
    ) -> Split | None:
        """Where a row goes; none when it is a repetition, or its question is held out by another file.

        A hash of `held_by` decides, of the question where that is empty. Files of `split: held` must have
        been placed before all others (`in_split_order`). A file of `split: train` goes to training as a whole,
        as its owner says; what it shares is counted.
        """
        if not self.keep_duplicates and row_id in self._seen:
            self.add(file, "duplicates")
            return None
        turn = first_user_turn(messages)
        key = content_id(" ".join(turn.split()))
        split = (
            split_by_hash(held_by or turn, self.held_share)
            if file.spec.split == "auto"
            else file.spec.split
        )
        if file.spec.split == "held":
            self._held_turns.add(key)
        elif split == "train" and key in self._held_turns:
            self.add(file, "held_elsewhere")
            if file.spec.split == "auto":
                return None
        self._seen.add(row_id)
        self.add(file, "kept")
        return split

    def add(self, file: SourceFile, what: str, count: int = 1) -> None:
        """Count something of a file."""
        self.counts[what] += count
        self.files.setdefault(file.name, Counter())[what] += count

    def figures(self) -> dict[str, Any]:
        """Counts for the record; `rows` is the denominator of all."""
        return {
            **{name: self.counts[name] for name in COUNTED},
            "layouts": dict(self.layouts.most_common()),
            "reasons": dict(self.reasons.most_common()),
        }

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Counts per file, and the first bad rows with their places."""
        by_file = [
            {"file": name, **{what: counts[what] for what in COUNTED}}
            for name, counts in self.files.items()
        ]
        return {"files": by_file, "bad_rows": self.bad_rows}

    def _refuse(self, file: SourceFile, bad: BadRow) -> None:
        if self.on_bad_row == "fail":
            raise ValueError(
                f"{bad}; every row must be usable with on_bad_row=fail: mend the row, or set "
                "on_bad_row=skip to leave such rows out and count them"
            )
        self.add(file, "refused")
        self.reasons[bad.reason.split(":")[0]] += 1
        if len(self.bad_rows) < SHOWN_BAD_ROWS:
            self.bad_rows.append({"file": bad.file, "line": bad.line, "reason": bad.reason})


def in_split_order(source: Source) -> list[SourceFile]:
    """The files of a source, those that are held out as a whole first: their questions must be
    known before any row can go to training."""
    return sorted(source.files, key=lambda file: file.spec.split != "held")
