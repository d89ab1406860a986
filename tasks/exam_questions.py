"""Questions out of exam files of any layout, as plain text to look for."""

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from storage.source import Source, SourceFile
from tasks.rows import BadRow, open_text, read_rows

OPTIONS = ("a", "b", "c", "d", "e", "f", "g")


@dataclass(frozen=True)
class ExamText:
    """A question to look for."""

    exam: str
    """Name of its file."""
    question: str
    whole: str
    """The question with its options, as they are usually printed."""


def read_exams(source: Source, fields: tuple[str, ...]) -> Iterator[ExamText]:
    """Every question of every file, in order. Raises ValueError for a row that cannot be read."""
    for file in source.files:
        match file.format:
            case "csv":
                yield from _csv_questions(file)
            case "text" | "markdown":
                with file.fetched() as path, open_text(path) as stream:
                    for line in stream.read().decode("utf-8-sig").splitlines():
                        if line.strip():
                            yield ExamText(file.name, line.strip(), line.strip())
            case _:
                yield from _row_questions(file, fields)


def _csv_questions(file: SourceFile) -> Iterator[ExamText]:
    with file.fetched() as path, open_text(path) as stream:
        rows = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""))
        header = next(rows, [])
        names = [name.strip().lower() for name in header]
        if "question" in names:
            yield from (_printed(file, dict(zip(names, row, strict=False))) for row in rows if row)
            return
        # MMLU: no header, question first, then its options and the answer.
        for row in [header, *rows]:
            if row:
                yield _printed(file, dict(zip(("question", *OPTIONS), row[:-1], strict=False)))


def _row_questions(file: SourceFile, fields: tuple[str, ...]) -> Iterator[ExamText]:
    for row in read_rows(file):
        if not isinstance(row, BadRow) and not isinstance(row[1], dict):
            row = BadRow(file.name, row[0], "is no object")
        if isinstance(row, BadRow):
            raise ValueError(
                f"{row}; decontamination would miss its question: mend or remove the line"
            )
        values = {str(name).lower(): value for name, value in row[1].items()}
        names = fields if file.spec.text == "text" else (file.spec.text.lower(),)
        for name in names:
            for text in _texts(values.get(name)):
                yield _printed(file, {**values, "question": text})


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value] if value.strip() else []
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _printed(file: SourceFile, row: Mapping[str, Any]) -> ExamText:
    question = str(row.get("question") or "").strip()
    options = [
        f"{letter.upper()}. {row[letter]}"
        for letter in OPTIONS
        if isinstance(row.get(letter), str) and row[letter].strip()
    ]
    return ExamText(file.name, question, "\n".join([question, *options]))
