"""Scores: every figure with its count, its 95 % interval and, where there is one, its chance level."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from storage.artifact import Artifact

BOOTSTRAP_RESAMPLES = 2000
Z_95 = 1.959963984540054


class Figure(BaseModel):
    """One measured number. `low` and `high` bound its 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    n: int
    low: float
    high: float
    chance: float | None = None
    unit: str = ""

    def text(self) -> str:
        """For people: `0.873 [0.81, 0.92] n=152, chance 0.25`."""
        chance = "" if self.chance is None else f", chance {self.chance:.3g}"
        return f"{self.value:.4g} [{self.low:.3g}, {self.high:.3g}] n={self.n}{chance}"


def share(successes: int, n: int, *, chance: float | None = None) -> Figure:
    """A share of n independent trials with Wilson's score interval (Wilson 1927).

    Without a trial the value is 0 and the interval is everything.
    """
    if n == 0:
        return Figure(value=0.0, n=0, low=0.0, high=1.0, chance=chance)
    p, z2 = successes / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Figure(
        value=p, n=n, low=max(0.0, centre - half), high=min(1.0, centre + half), chance=chance
    )


def mean(
    values: Sequence[float],
    *,
    clusters: Sequence[object] | None = None,
    weights: Sequence[float] | None = None,
    chance: float | None = None,
    unit: str = "",
) -> Figure:
    """A weighted mean with a bootstrap percentile interval (Efron 1979) over whole clusters.

    `clusters` names what each value belongs to (several samples of one question are not independent);
    by default every value is its own. `weights` makes it sum(weights * values) / sum(weights). The
    resampling is seeded: equal values give an equal interval.
    """
    import numpy as np

    if not values:
        return Figure(value=0.0, n=0, low=-math.inf, high=math.inf, chance=chance, unit=unit)
    value = np.asarray(values, np.float64)
    weight = np.ones(len(value)) if weights is None else np.asarray(weights, np.float64)
    labels = [*range(len(value))] if clusters is None else list(clusters)
    order = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    member = np.array([order[label] for label in labels])
    sums = np.bincount(member, weight * value, len(order))
    masses = np.bincount(member, weight, len(order))
    centre = float(sums.sum() / masses.sum())
    generator = np.random.default_rng(0)
    resampled = np.empty(BOOTSTRAP_RESAMPLES)
    for index in range(BOOTSTRAP_RESAMPLES):
        draw = generator.integers(0, len(order), len(order))
        resampled[index] = sums[draw].sum() / masses[draw].sum()
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Figure(
        value=centre, n=len(value), low=float(low), high=float(high), chance=chance, unit=unit
    )


@dataclass(frozen=True)
class Scores(Artifact):
    """Figures in `files/scores.json`, and in `files/answers.jsonl` what the model wrote."""

    kind: ClassVar[str] = "scores"

    def figures(self) -> dict[str, Figure]:
        """Every figure by its name; `a/b` names figure b of group a."""
        content = json.loads((self.files / "scores.json").read_text("utf-8"))
        return {name: Figure.model_validate(value) for name, value in content.items()}

    def answers(self) -> list[dict[str, Any]]:
        """What the model wrote: `id`, `prompt`, `answer`, `is_ended`, and marks where it was judged."""
        path = self.files / "answers.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]

    @staticmethod
    def write(
        files: Path, figures: Mapping[str, Figure], answers: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Write both files; the interval of a figure without a trial is written as its value."""
        content = {
            name: figure.model_dump()
            if figure.n
            else {**figure.model_dump(), "low": figure.value, "high": figure.value}
            for name, figure in sorted(figures.items())
        }
        (files / "scores.json").write_text(
            json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8"
        )
        if answers:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
            (files / "answers.jsonl").write_text("".join(lines), "utf-8")
