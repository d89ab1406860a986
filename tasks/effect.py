"""effect: what training did to a model, from evaluations before and after it, question by question."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from conf.effect import EffectConfig
from storage.own_code import own_scores
from storage.scores import Figure, Scores, mean, table_rows
from tasks.stage import Job, stage

BITS = "bits_per_byte/"
SHOWN = 20

Row = Mapping[str, Any]
Pair = tuple[Row, Row]
"""What an evaluation before says of a question or document, and what the one after says of the same."""
Value = Callable[[Row], float | None]
"""How good an answer is; None for unknown."""


@stage(
    version=1,
    headlines={
        "wins/by_truth/*": "better by the true reward, *",
        "wins/by_reward_model/*": "better by the reward model, *",
        "wins/by_functions/*": "better by functions, *",
        "change/bits_per_byte/all/*": "forgotten, bits per byte, *",
    },
)
def effect(job: Job, before: Scores, after: dict[str, Scores], settings: EffectConfig) -> Scores:
    """What checkpoints do differently from the one they were made from: who answers better, what was forgotten.

    reads Scores of evaluate, of one checkpoint and by name of those after it   writes Scores   cost none

    `wins/by_X/NAME` is the share of answers that are better afterwards, a tie half a win, by the true reward,
    the reward model or functions. `change/F/NAME` is the mean of F afterwards minus before over the same
    questions and documents: its interval is narrower than those of the two means.
    """
    figures: dict[str, Figure] = {}
    answers: list[dict[str, Any]] = []
    with ExitStack() as files:
        values = _values(job, files)
        for name, scores in after.items():
            pairs = _common_answers(before, scores)
            found = _answer_figures(pairs, values) | _trial_figures(before, scores)
            if not found:
                raise ValueError(
                    f"{name} and the evaluation before have no document and no question in common; give "
                    "both evaluate nodes the same tokens, exams and prompts"
                )
            figures |= {f"{figure}/{name}": value for figure, value in found.items()}
            answers += [_shown(name, pair, values) for pair in pairs[:SHOWN]]
    Scores.write(job.files, figures)
    job.tables["before and after"] = table_rows(figures)
    job.tables["answers before and after"] = answers
    return Scores(job.path)


def _values(job: Job, files: ExitStack) -> dict[str, Value]:
    values: dict[str, Value] = {
        "truth": lambda row: row["judgement"]["reward"] if "judgement" in row else None,
        "reward_model": lambda row: row.get("reward_model"),
    }
    if "functions" in job.sources:
        paths = [files.enter_context(file.fetched()) for file in job.sources["functions"].files]
        score = own_scores(paths)
        values["functions"] = lambda row: score(_as_answer(row))
    return values


def _as_answer(row: Row) -> dict[str, Any]:
    return {
        "text": row["answer"],
        "is_ended": row["is_ended"],
        "messages": [{"role": "user", "content": row["prompt"]}],
        "reference": "",
    }


def _common_answers(before: Scores, after: Scores) -> list[Pair]:
    """Answers to the same question; of several samples those that were drawn with the same noise."""
    known = {(row["id"], row["sample"]): row for row in before.answers()}
    rows = [(known.get((row["id"], row["sample"])), row) for row in after.answers()]
    return [(old, new) for old, new in rows if old and old["prompt"] == new["prompt"]]


def _answer_figures(pairs: Sequence[Pair], values: Mapping[str, Value]) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    for name, value in values.items():
        gaps, questions = _gaps(pairs, value)
        if gaps:
            worth = [(gap > 0) + (gap == 0) / 2 for gap in gaps]
            figures[f"wins/by_{name}"] = mean(worth, clusters=questions, chance=0.5)
            figures[f"change/{name}"] = mean(gaps, clusters=questions)
    told: dict[str, Value] = {
        "ended": lambda row: float(row["is_ended"]),
        "answer_tokens": lambda row: row["tokens"],
    }
    for name, value in told.items():
        gaps, questions = _gaps(pairs, value)
        if gaps:
            figures[f"change/{name}"] = mean(gaps, clusters=questions)
    return figures


def _gaps(pairs: Sequence[Pair], value: Value) -> tuple[list[float], list[str]]:
    """Afterwards minus before where both are known, and the question that each is about."""
    gaps: list[float] = []
    questions: list[str] = []
    for old, new in pairs:
        first, last = value(old), value(new)
        if first is not None and last is not None:
            gaps.append(last - first)
            questions.append(new["id"].split("#")[0])  # a world's question in other words
    return gaps, questions


def _trial_figures(before: Scores, after: Scores) -> dict[str, Figure]:
    """Of the figures that both evaluations made of the same trials."""
    known, found = _by_figure(before), _by_figure(after)
    paired = {
        name: [*zip(known[name], rows, strict=True)]
        for name, rows in found.items()
        if name in known and _trial_ids(known[name]) == _trial_ids(rows)
    }
    domains = [pairs for name, pairs in paired.items() if name.startswith(BITS)]
    if domains:
        paired[f"{BITS}all"] = [pair for pairs in domains for pair in pairs]
    return {
        f"change/{name}": mean(
            [new["value"] - old["value"] for old, new in pairs],
            weights=[new["weight"] for _, new in pairs],
        )
        for name, pairs in paired.items()
    }


def _by_figure(scores: Scores) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in scores.trials():
        found.setdefault(row["figure"], []).append(row)
    return found


def _trial_ids(rows: Sequence[Row]) -> list[tuple[str, float]]:
    return [(row["id"], row["weight"]) for row in rows]


def _shown(name: str, pair: Pair, values: Mapping[str, Value]) -> dict[str, Any]:
    old, new = pair
    row: dict[str, Any] = {"after": name, "question": new["prompt"]}
    row |= {"answer before": old["answer"], "answer after": new["answer"]}
    for source, value in values.items():
        first, last = value(old), value(new)
        if first is not None and last is not None:
            row |= {f"{source} before": first, f"{source} after": last}
    return row
