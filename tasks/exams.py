"""Exam files (C-Eval, CMMLU, MMLU) and minimal pairs as scoring requests: a prompt and its continuations."""

import csv
import functools
import hashlib
import io
import json
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tasks.rows import open_text

LETTERS = "ABCD"

Preset = Literal["ceval", "cmmlu", "mmlu", "plain"]


@dataclass(frozen=True)
class Wording:
    """How a question is put; `header` has the place `{subject}`."""

    header: str = ""
    mark: str = ""
    """Before the question."""
    answer_mark: str = ""
    """Behind the question and its options."""
    space: str = ""
    """Between the mark and the answer."""


WORDINGS: dict[Preset, Wording] = {
    "ceval": Wording(
        "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n", "", "\n答案："
    ),
    "cmmlu": Wording(
        "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n", "题目：", "\n答案是："
    ),
    "mmlu": Wording(
        "The following are multiple choice questions (with answers) about {subject}.\n\n",
        "",
        "\nAnswer:",
        " ",
    ),
    "plain": Wording(),
}
"""The wording that the exams' authors published; `plain` asks the bare question."""
SUBJECTS = Path(__file__).parent / "exam_subjects.tsv"
"""Exam, subject as its files name it, its name in the prompt, categories, difficulty: as the authors
of C-Eval, CMMLU and MMLU sort them; where they tell no difficulty, the school that the name tells."""


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
    tags: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Parts that figures are also reported for, by what sorts them: `subject`, `category`, ..."""
    is_whole: bool = False
    """Whether continuations are whole answers of unequal length, to be compared per byte."""


@dataclass(frozen=True)
class Subject:
    """What the authors of an exam say of one of its subjects."""

    name: str
    categories: tuple[str, ...]
    difficulty: tuple[str, ...]


@functools.cache
def subjects() -> dict[str, dict[str, Subject]]:
    """Exam -> subject -> what is known of it."""
    found: dict[str, dict[str, Subject]] = {}
    for line in SUBJECTS.read_text("utf-8").splitlines()[1:]:
        exam, subject, name, *sorts = line.split("\t")
        categories, difficulty = (tuple(filter(None, text.split(","))) for text in sorts)
        found.setdefault(exam, {})[subject] = Subject(name, categories, difficulty)
    return found


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
    return hashlib.sha256(repr((WORDINGS[preset], LETTERS)).encode()).hexdigest()[:12]


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
                    header=WORDINGS[preset].header.format(subject=_name(question, preset)),
                    prefix=tuple(_worked(example, preset, kind) for example in shown),
                    prompt=_asked(question, preset, kind),
                    continuations=_continuations(question, preset, kind),
                    right=question.answer,
                    tags=_tags(question, preset),
                    is_whole=kind == "option",
                )
            )
    return requests


def _name(question: Question, preset: Preset) -> str:
    known = subjects().get(preset, {}).get(question.subject)
    return known.name if known else question.subject.replace("_", " ")


def _tags(question: Question, preset: Preset) -> dict[str, tuple[str, ...]]:
    """Subject, categories and difficulty; of an exam that has the subject, the preset's own first."""
    exams = [subjects().get(preset, {}), *subjects().values()]
    known = next((exam[question.subject] for exam in exams if question.subject in exam), None)
    tags = {"subject": (question.subject,)}
    if known:
        tags |= {"category": known.categories, "difficulty": known.difficulty}
    return tags


def _asked(question: Question, preset: Preset, kind: str) -> str:
    wording = WORDINGS[preset]
    if kind == "option":
        return wording.mark + question.text + wording.answer_mark
    options = "".join(
        f"\n{letter}. {text}" for letter, text in zip(LETTERS, question.options, strict=False)
    )
    return wording.mark + question.text + options + wording.answer_mark


def _continuations(question: Question, preset: Preset, kind: str) -> tuple[str, ...]:
    wording = WORDINGS[preset]
    if kind == "letter":
        return tuple(wording.space + letter for letter in LETTERS[: len(question.options)])
    # Chinese needs no space between question and answer, and neither does a Chinese colon.
    space = wording.space if wording.answer_mark else _space_behind(question.text)
    return tuple(space + option for option in question.options)


def _space_behind(text: str) -> str:
    return " " if text[-1:].isascii() else ""


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
    for line, row in _json_lines(path):
        if "sentence_good" not in row or "sentence_bad" not in row:
            raise ValueError(f"{path}, line {line}: no `sentence_good` and `sentence_bad`")
        paradigm = str(row.get("paradigm") or row.get("UID") or suite)
        seen[paradigm] = seen.get(paradigm, 0) + 1
        if per_paradigm and seen[paradigm] > per_paradigm:
            continue
        # BLiMP says `linguistics_term` for what ZhoBLiMP calls `phenomenon`.
        named = {"phenomenon": row.get("linguistics_term"), **row}
        requests.append(
            Request(
                id=f"{suite}/{line}",
                group=suite,
                prefix=(),
                prompt="",
                continuations=(row["sentence_good"], row["sentence_bad"]),
                right=0,
                tags={"paradigm": (paradigm,), **_sorted_by(named, "field", "phenomenon")},
            )
        )
    return requests


@dataclass(frozen=True)
class Task:
    """A question of one's own that is answered freely, and what would be right."""

    id: str
    name: str
    """Of its file."""
    prompt: str
    references: tuple[str, ...]


def read_own_tasks(path: Path) -> Iterator[Request | Task]:
    """Questions of a JSON lines file; the name of the file is the task's.

    `prompt` with `options` and `answer` (place from 0, letter, or the option itself) is a Request;
    `prompt` with `references` (texts, or one) is a Task. `subject`, `category` and `difficulty` sort
    the figures of the former. Raises ValueError with file and line for anything else.
    """
    name = path.name.split(".")[0]
    for line, row in _json_lines(path):
        prompt, options, references = (row.get(key) for key in ("prompt", "options", "references"))
        if isinstance(prompt, str) and isinstance(options, list) and len(options) > 1:
            yield _own_choice(path, line, name, row)
        elif isinstance(prompt, str) and references:
            texts = (references,) if isinstance(references, str) else tuple(references)
            yield Task(f"{name}/{line}", name, prompt, texts)
        else:
            raise ValueError(
                f"{path}, line {line}: expected `prompt` with `references`, or with two or more "
                f"`options` and `answer`; found {sorted(row)}"
            )


def _own_choice(path: Path, line: int, name: str, row: dict[str, Any]) -> Request:
    options, answer = [str(option) for option in row["options"]], row.get("answer")
    letters = string.ascii_uppercase[: len(options)]
    if isinstance(answer, int) and 0 <= answer < len(options):
        right = answer
    elif answer in options:
        right = options.index(answer)
    elif isinstance(answer, str) and len(answer) == 1 and answer in letters:
        right = letters.index(answer)
    else:
        raise ValueError(
            f"{path}, line {line}: answer {answer!r} is none of the {len(options)} options; give its "
            "place from 0, its letter or its text"
        )
    space = _space_behind(row["prompt"])
    return Request(
        id=f"{name}/{line}",
        group=f"own_{name}",
        prefix=(),
        prompt=row["prompt"],
        continuations=tuple(space + option for option in options),
        right=right,
        tags=_sorted_by(row, "subject", "category", "difficulty"),
        is_whole=True,
    )


def _sorted_by(row: Mapping[str, Any], *names: str) -> dict[str, tuple[str, ...]]:
    return {name: (str(value),) for name in names if (value := row.get(name))}


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of every line that is not empty. Raises ValueError with file and line."""
    with open_text(path) as stream:
        for line, content in enumerate(stream, 1):
            if not content.strip():
                continue
            try:
                row = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {line}: no JSON ({error}); mend the line"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {line}: expected a JSON object; mend the line")
            yield line, row
