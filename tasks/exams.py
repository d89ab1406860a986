"""Exam files (C-Eval, CMMLU, MMLU) and minimal pairs as scoring requests: a prompt and its continuations."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tasks.rows import open_text

LETTERS = "ABCD"

HEADERS: dict[str, str] = {
    "ceval": "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n",
    "mmlu": "The following are multiple choice questions (with answers) about {subject}.\n\n",
    "plain": "",
}
"""First lines of a prompt: C-Eval's and MMLU's published wording."""
ANSWER_MARKS: dict[str, str] = {"ceval": "\n答案：", "mmlu": "\nAnswer:", "plain": ""}

Preset = Literal["ceval", "mmlu", "plain"]


@dataclass(frozen=True)
class Question:
    """One question with its options; `answer` is the index of the right one."""

    id: str
    subject: str
    text: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Request:
    """Which of some continuations does the model find likeliest after a prompt?

    `prefix` is the shared few-shot part, oldest example first, so that it can be cut from the left;
    `group` is what figures are reported for, `right` the index of the right continuation.
    """

    id: str
    group: str
    prefix: tuple[str, ...]
    prompt: str
    continuations: tuple[str, ...]
    right: int
    header: str = ""
    tags: dict[str, str] = field(default_factory=dict[str, str])


def read_questions(path: Path) -> list[Question]:
    """Questions of one CSV file whose name is the subject.

    C-Eval: id,question,A,B,C,D,answer[,explanation]; CMMLU: (number),Question,A,B,C,D,Answer; MMLU: no
    header, question,A,B,C,D,answer. Raises ValueError with file and line for a row without a right
    answer among its options.
    """
    subject = path.name.removesuffix(".zst").removesuffix(".csv")
    for ending in ("_val", "_dev", "_test"):
        subject = subject.removesuffix(ending)
    with io.TextIOWrapper(open_text(path), "utf-8-sig", newline="") as stream:
        rows = [row for row in csv.reader(stream) if row]
    if not rows:
        return []
    names = [name.strip().lower() for name in rows[0]]
    if "question" in names and "answer" in names:
        columns = [names.index(name) for name in ("question", "a", "b", "c", "d", "answer")]
        rows, first_line = rows[1:], 2
    else:
        columns, first_line = [0, 1, 2, 3, 4, 5], 1
    return [
        _question(path, line, subject, row, columns) for line, row in enumerate(rows, first_line)
    ]


def _question(path: Path, line: int, subject: str, row: list[str], columns: list[int]) -> Question:
    if len(row) <= max(columns):
        raise ValueError(
            f"{path}, row {line}: {len(row)} fields, expected question, A, B, C, D, answer"
        )
    text, *options, answer = (row[column].strip() for column in columns)
    if answer not in LETTERS or not answer:
        raise ValueError(f"{path}, row {line}: answer {answer!r} is none of A, B, C, D")
    return Question(
        id=f"{subject}/{line}",
        subject=subject,
        text=text,
        options=tuple(options),
        answer=LETTERS.index(answer),
    )


def preset_hash(preset: Preset) -> str:
    """Names the wording that scores were made with."""
    return hashlib.sha256(
        repr((HEADERS[preset], ANSWER_MARKS[preset], LETTERS)).encode()
    ).hexdigest()[:12]


def exam_requests(
    questions: Sequence[Question],
    examples: Sequence[Question],
    *,
    preset: Preset,
    shots: int,
    scoring: Iterable[Literal["letter", "option"]],
) -> list[Request]:
    """Requests for the questions, with the first `shots` examples of the same subject before them."""
    worked: dict[str, list[Question]] = {}
    for example in examples:
        worked.setdefault(example.subject, []).append(example)
    requests: list[Request] = []
    for kind in scoring:
        for question in questions:
            shown = worked.get(question.subject, [])[:shots]
            requests.append(
                Request(
                    id=question.id,
                    group=f"exam_{kind}",
                    header=HEADERS[preset].format(subject=question.subject.replace("_", " ")),
                    prefix=tuple(_worked(example, preset, kind) for example in shown),
                    prompt=_asked(question, preset, kind),
                    continuations=_continuations(question, preset, kind),
                    right=question.answer,
                    tags={"subject": question.subject},
                )
            )
    return requests


def _asked(question: Question, preset: Preset, kind: str) -> str:
    if kind == "option":
        return question.text + ANSWER_MARKS[preset]
    options = "".join(
        f"\n{letter}. {text}" for letter, text in zip(LETTERS, question.options, strict=False)
    )
    return question.text + options + ANSWER_MARKS[preset]


def _continuations(question: Question, preset: Preset, kind: str) -> tuple[str, ...]:
    if kind == "option":
        # Chinese needs no space between question and answer, and neither does C-Eval's colon.
        space = "" if preset == "ceval" or not question.text[-1:].isascii() else " "
        return tuple(space + option for option in question.options)
    space = " " if preset == "mmlu" else ""
    return tuple(space + letter for letter in LETTERS[: len(question.options)])


def _worked(question: Question, preset: Preset, kind: str) -> str:
    answer = _continuations(question, preset, kind)[question.answer]
    return _asked(question, preset, kind) + answer + "\n\n"


def read_minimal_pairs(path: Path, *, per_paradigm: int) -> list[Request]:
    """Requests that ask for the grammatical one of two sentences; the first ones of each paradigm.

    Raises ValueError with file and line for a line without both sentences.
    """
    requests: list[Request] = []
    seen: dict[str, int] = {}
    suite = path.name.split(".")[0]
    with open_text(path) as stream:
        for line, content in enumerate(stream, 1):
            row = json.loads(content)
            if "sentence_good" not in row or "sentence_bad" not in row:
                raise ValueError(f"{path}, line {line}: no `sentence_good` and `sentence_bad`")
            paradigm = str(row.get("paradigm") or row.get("UID") or suite)
            seen[paradigm] = seen.get(paradigm, 0) + 1
            if per_paradigm and seen[paradigm] > per_paradigm:
                continue
            requests.append(
                Request(
                    id=f"{suite}/{line}",
                    group=suite,
                    prefix=(),
                    prompt="",
                    continuations=(row["sentence_good"], row["sentence_bad"]),
                    right=0,
                    tags={"paradigm": paradigm},
                )
            )
    return requests
