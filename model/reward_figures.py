"""What held-out pairs say of a reward model: how often it is right, where, and how sure it was."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from model.dialogues import Pair
from storage.scores import share

MARGIN_GROUPS = 4
MOST_MARGINS = 8
"""Accuracy is told for each margin where there are no more than this, else for quarters of the pairs."""
CONFIDENCE_BINS = 5

Scored = Sequence[tuple[float, float]]
"""Scores of the chosen and the rejected answer of each pair."""


def accuracy_figures(
    scores: Sequence[tuple[float, float]], held: Sequence[Pair]
) -> dict[str, dict[str, Any]]:
    """Share of held-out pairs in the right order with n and interval: of all, by domain, by margin, and by
    which answer is the longer one."""
    is_right = [chosen > rejected for chosen, rejected in scores]
    figures = {"held": share(sum(is_right), len(is_right), chance=0.5).model_dump()}
    margins = {f"margin {k}": v for k, v in _by_margin([row.margin for row in held]).items()}
    for name, members in {**_by_domain(held), **margins, **_by_length(held)}.items():
        right = sum(is_right[row] for row in members)
        figures[name] = share(right, len(members), chance=0.5).model_dump()
    return figures


def _by_domain(held: Sequence[Pair]) -> dict[str, list[int]]:
    domains = sorted({row.domain for row in held})
    if len(domains) < 2:
        return {}
    return {
        f"domain {domain}": [place for place, row in enumerate(held) if row.domain == domain]
        for domain in domains
    }


def _by_margin(margins: Sequence[float]) -> dict[str, list[int]]:
    distinct = sorted(set(margins))
    if len(distinct) < 2:
        return {}
    if len(distinct) <= MOST_MARGINS:
        return {
            f"{value:g}": [row for row, margin in enumerate(margins) if margin == value]
            for value in distinct
        }
    order = sorted(range(len(margins)), key=lambda row: margins[row])
    groups = np.array_split(np.array(order), MARGIN_GROUPS)
    return {
        f"{margins[group[0]]:.3g} to {margins[group[-1]]:.3g}": group.tolist() for group in groups
    }


def _by_length(held: Sequence[Pair]) -> dict[str, list[int]]:
    gaps = [len(row.chosen) - len(row.rejected) for row in held]
    groups = {
        "chosen longer": [row for row, gap in enumerate(gaps) if gap > 0],
        "chosen shorter": [row for row, gap in enumerate(gaps) if gap < 0],
        "same length": [row for row, gap in enumerate(gaps) if gap == 0],
    }
    return {name: members for name, members in groups.items() if members}


def calibration(scores: Scored) -> dict[str, Any]:
    """How sure the model is, 1 / (1 + e^-|gap|) of each pair, beside how often it is right.

    `error` is the expected calibration error over equal bins of confidence from 1/2 to 1 (Guo et al.
    2017, equation 3). Empty without pairs.
    """
    if not scores:
        return {}
    gaps = np.array([chosen - rejected for chosen, rejected in scores])
    confidence, is_right = 1 / (1 + np.exp(-np.abs(gaps))), gaps > 0
    number = np.minimum((2 * confidence - 1) * CONFIDENCE_BINS, CONFIDENCE_BINS - 1).astype(int)
    bins = [
        {
            "n": int(inside.sum()),
            "confidence": float(confidence[inside].mean()),
            "accuracy": float(is_right[inside].mean()),
        }
        for inside in (number == wanted for wanted in range(CONFIDENCE_BINS))
        if inside.any()
    ]
    error = sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(gaps)
    return {"error": error, "confidence": float(confidence.mean()), "bins": bins}


def length_correlation(scores: Scored, held: Sequence[Pair]) -> float:
    """Correlation of the difference of scores with the difference of lengths in tokens: near 1, length is
    what is rewarded; 0 where either is always the same."""
    gaps = np.array([chosen - rejected for chosen, rejected in scores])
    lengths = np.array([len(row.chosen) - len(row.rejected) for row in held], float)
    if len(gaps) < 2 or not gaps.std() or not lengths.std():
        return 0.0
    return float(np.corrcoef(gaps, lengths)[0, 1])
