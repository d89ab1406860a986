"""Answers of several checkpoints to the same questions, and figures of which are better, whoever judges."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage.jsonl import content_id
from storage.scores import Figure, Scores, mean, resampled

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

RIDGE = 1e-2
"""Pull of both coefficients to 0, so that a side that always wins has finite ones."""
NEWTON_STEPS = 25
WORTH = {"one": 1.0, "tie": 0.5, "other": 0.0}
"""Of a verdict, for the one."""


@dataclass(frozen=True)
class Answered:
    """A question with the answers of several checkpoints, by their name."""

    id: str
    """Of the question's text; the same in every run."""
    question: str
    answers: dict[str, str]


def answered_by_all(answers: Mapping[str, Scores]) -> list[Answered]:
    """Questions that every one of the evaluations answered, first samples, in the order of the first name.

    Raises ValueError where there is no such question.
    """
    told = {name: _first_samples(answers[name]) for name in sorted(answers)}
    if not told:
        raise ValueError("there is nothing to judge; name evaluations in `from: {answers: {..}}`")
    first = next(iter(told.values()))
    found = [
        Answered(content_id(question), question, {name: of[question] for name, of in told.items()})
        for question in first
        if all(question in of for of in told.values())
    ]
    if not found:
        raise ValueError(
            f"{', '.join(told)} have no question in common that each of them answered; give the "
            "evaluations the same `prompts`, own tasks or world"
        )
    return found


def _first_samples(scores: Scores) -> dict[str, str]:
    return {row["prompt"]: row["answer"] for row in scores.answers() if not row.get("sample")}


def contests(names: Sequence[str], baseline: str) -> list[tuple[str, str]]:
    """Who is compared with whom: every two, or each with the baseline, which comes second.

    Raises ValueError for a baseline that is not among the names.
    """
    if not baseline:
        return list(itertools.combinations(sorted(names), 2))
    if baseline not in names:
        raise ValueError(f"baseline {baseline!r} is none of {sorted(names)}; name one of them")
    return [(name, baseline) for name in sorted(names) if name != baseline]


def contest_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Win rates of judged pairs: rows with `one`, `other`, `verdict` (one, other, tie; None for none), and
    `lengths`, the characters of both answers.

    A tie is half a win. What could not be judged counts in `unjudged` alone. Several ratings of a question
    are one cluster.
    """
    figures: dict[str, Figure] = {}
    for (one, other), group in _by_contest(rows).items():
        judged = [row for row in group if row["verdict"]]
        title = f"{one}_over_{other}"
        figures[f"unjudged/{title}"] = mean([float(not row["verdict"]) for row in group])
        if judged:
            worth = [WORTH[row["verdict"]] for row in judged]
            ties = [float(row["verdict"] == "tie") for row in judged]
            questions = [row["question"] for row in judged]
            figures[f"wins/{title}"] = mean(worth, clusters=questions, chance=0.5)
            figures[f"ties/{title}"] = mean(ties, clusters=questions)
            figures[f"wins_at_equal_length/{title}"] = _at_equal_length(worth, judged)
    return figures


def agreement(
    rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> dict[str, Figure]:
    """How often two judges of the same pairs say the same, and Cohen's kappa (Cohen 1960), 0 at chance.

    A pair counts where both judged it; which side comes first does not matter, nor do scores of one answer.
    """
    known = {_pair_of(row): _turned(row) for row in others if row.get("verdict")}
    both = [
        (_turned(row), known[_pair_of(row)])
        for row in rows
        if row["verdict"] and _pair_of(row) in known
    ]
    if not both:
        return {}

    def kappa(places: "npt.NDArray[np.int64]") -> float:
        chosen = [both[place] for place in places]
        same = sum(a == b for a, b in chosen) / len(chosen)
        lucky = (
            sum(
                sum(a == verdict for a, _ in chosen) * sum(b == verdict for _, b in chosen)
                for verdict in WORTH
            )
            / len(chosen) ** 2
        )
        return 1.0 if lucky == 1 else (same - lucky) / (1 - lucky)

    return {
        "agreement": mean([float(a == b) for a, b in both]),
        "kappa": resampled(len(both), kappa).model_copy(update={"chance": 0.0}),
    }


def _by_contest(
    rows: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["one"], row["other"]), []).append(row)
    return found


def _pair_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (row["question"], *sorted((row["one"], row["other"])))


def _turned(row: Mapping[str, Any]) -> str:
    """The verdict for the side that comes first by name."""
    if row["verdict"] == "tie" or row["one"] < row["other"]:
        return row["verdict"]
    return "other" if row["verdict"] == "one" else "one"


def _at_equal_length(worth: Sequence[float], rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What the win rate would be if both answers were equally long (Dubois et al. 2024, without their term
    for the question): logit P = theta + phi x tanh(difference of lengths / its deviation)."""
    import numpy as np

    gaps = np.array([row["lengths"][0] - row["lengths"][1] for row in rows], np.float64)
    spread = float(gaps.std()) or 1.0
    features = np.stack([np.ones(len(gaps)), np.tanh(gaps / spread)], 1)  # (pairs, 2)
    wins = np.asarray(worth)
    rows_of: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        rows_of.setdefault(row["question"], []).append(place)
    clusters = list(rows_of.values())

    def share(drawn: "npt.NDArray[np.int64]") -> float:
        places = list(itertools.chain.from_iterable(clusters[place] for place in drawn))
        return _logistic_share(features[places], wins[places])

    return resampled(len(clusters), share).model_copy(update={"chance": 0.5, "n": len(rows)})


def _logistic_share(features: "npt.NDArray[np.float64]", wins: "npt.NDArray[np.float64]") -> float:
    """Probability at a length gap of 0, by Newton's method."""
    import numpy as np

    weights = np.zeros(2)
    for _ in range(NEWTON_STEPS):
        chance = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (wins - chance) - RIDGE * weights
        bend = features.T @ (features * (chance * (1 - chance))[:, None]) + RIDGE * np.eye(2)
        step = np.linalg.solve(bend, gradient)
        weights += step
        if np.abs(step).max() < 1e-6:
            break
    return 1 / (1 + math.exp(-float(weights[0])))
