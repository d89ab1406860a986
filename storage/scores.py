"""Scores: every figure with its count, its 95 % interval and, where there is one, its chance level."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from storage.artifact import Artifact

if TYPE_CHECKING:
    # The graph process reads figures and makes none: numpy costs it 0.1 s to import.
    import numpy as np
    import numpy.typing as npt

BOOTSTRAP_RESAMPLES = 2000
DRAWN_AT_ONCE = 2**19
"""Numbers; 4 MB."""
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


def centred(figure: Figure) -> Figure:
    """A share above what guessing gives: 0 at chance, 1 for all right. Raises ValueError without a chance."""
    chance = figure.chance
    if chance is None or chance >= 1:
        raise ValueError(f"a share with chance {chance} cannot be centred; it needs one below 1")
    value, low, high = (
        (end - chance) / (1 - chance) for end in (figure.value, figure.low, figure.high)
    )
    return Figure(value=value, n=figure.n, low=low, high=high, chance=0.0)


def table_rows(figures: Mapping[str, Figure]) -> list[dict[str, Any]]:
    """The figures by name, for a table."""
    return [
        {"figure": name, **figure.model_dump(exclude={"unit"})}
        for name, figure in sorted(figures.items())
    ]


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
    sums, masses = _clustered(values, clusters, weights)
    centre = float(sums.sum() / masses.sum())
    low, high = _ends(_resampled_means(sums, masses, np.random.default_rng(0)))
    return Figure(value=centre, n=len(values), low=low, high=high, chance=chance, unit=unit)


Weighted = tuple[Sequence[float], Sequence[float] | None]
"""Values and their weights; none for equal ones."""


def macro_mean(
    groups: Sequence[Weighted], *, chance: float | None = None, unit: str = ""
) -> Figure:
    """The plain mean of the groups' own means; the bootstrap draws within each group.

    Raises ValueError for a group without a value.
    """
    import numpy as np

    if not groups or not all(values for values, _ in groups):
        raise ValueError("a mean over groups needs groups, each with a value; leave empty ones out")
    generator = np.random.default_rng(0)
    parts = [_clustered(values, None, weights) for values, weights in groups]
    centre = sum(float(sums.sum() / masses.sum()) for sums, masses in parts) / len(parts)
    drawn = sum(_resampled_means(sums, masses, generator) for sums, masses in parts) / len(parts)
    low, high = _ends(np.asarray(drawn))
    n = sum(len(values) for values, _ in groups)
    return Figure(value=centre, n=n, low=low, high=high, chance=chance, unit=unit)


def difference(one: Weighted, other: Weighted, *, unit: str = "") -> Figure:
    """Mean of one sample minus that of another, independent one, with a bootstrap interval; n of the first.

    Raises ValueError for a sample without a value.
    """
    import numpy as np

    if not one[0] or not other[0]:
        raise ValueError("a difference needs two samples with values; leave empty ones out")
    generator = np.random.default_rng(0)
    first, second = (_clustered(values, None, weights) for values, weights in (one, other))
    centre = float(first[0].sum() / first[1].sum() - second[0].sum() / second[1].sum())
    drawn = _resampled_means(*first, generator) - _resampled_means(*second, generator)
    low, high = _ends(drawn)
    return Figure(value=centre, n=len(one[0]), low=low, high=high, unit=unit)


def resampled(count: int, value_of: Callable[["npt.NDArray[np.int64]"], float]) -> Figure:
    """Any statistic of `count` items, with a bootstrap interval; `value_of` gets the items' places.

    Raises ValueError where there is no item.
    """
    import numpy as np

    if not count:
        raise ValueError("a statistic of nothing was asked for; leave it out")
    generator = np.random.default_rng(0)
    draws = (generator.integers(0, count, count) for _ in range(BOOTSTRAP_RESAMPLES))
    low, high = _ends(np.array([value_of(draw) for draw in draws]))
    return Figure(value=value_of(np.arange(count)), n=count, low=low, high=high)


def _clustered(
    values: Sequence[float],
    clusters: Sequence[object] | None,
    weights: Sequence[float] | None,
) -> tuple["npt.NDArray[np.float64]", "npt.NDArray[np.float64]"]:
    """Sum of weight x value, and of weight, of every cluster."""
    import numpy as np

    value = np.asarray(values, np.float64)
    weight = np.ones(len(value)) if weights is None else np.asarray(weights, np.float64)
    labels = [*range(len(value))] if clusters is None else list(clusters)
    order = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    member = np.array([order[label] for label in labels])
    sums = np.bincount(member, weight * value, len(order)).astype(np.float64)
    return sums, np.bincount(member, weight, len(order)).astype(np.float64)


def _resampled_means(
    sums: "npt.NDArray[np.float64]",
    masses: "npt.NDArray[np.float64]",
    generator: "np.random.Generator",
) -> "npt.NDArray[np.float64]":
    """(BOOTSTRAP_RESAMPLES,) weighted means of whole clusters drawn with replacement."""
    import numpy as np

    at_once = max(1, DRAWN_AT_ONCE // len(sums))
    found: list[npt.NDArray[np.float64]] = []
    for start in range(0, BOOTSTRAP_RESAMPLES, at_once):
        rows = min(at_once, BOOTSTRAP_RESAMPLES - start)
        draws = generator.integers(0, len(sums), (rows, len(sums)))
        found.append(sums[draws].sum(1) / masses[draws].sum(1))
    return np.concatenate(found)


def _ends(values: "npt.NDArray[np.float64]") -> tuple[float, float]:
    import numpy as np

    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Scores(Artifact):
    """Figures in `files/scores.json`; where there are such, in `answers.jsonl` what the model wrote, in
    `curve.jsonl` some of the figures after so many steps of its training, in `trials.jsonl` what some of the
    figures are means of, and in `judgements.jsonl` what a judge, machine or human, said of answers."""

    kind: ClassVar[str] = "scores"

    def figures(self) -> dict[str, Figure]:
        """Every figure by its name; `a/b` names figure b of group a."""
        content = json.loads((self.files / "scores.json").read_text("utf-8"))
        return {name: Figure.model_validate(value) for name, value in content.items()}

    def answers(self) -> list[dict[str, Any]]:
        """What the model wrote: `id`, `prompt`, `answer`, `is_ended`, and marks where it was judged."""
        return _rows(self.files / "answers.jsonl")

    def curve(self) -> list[dict[str, Any]]:
        """`step` and the figures then, in order of the steps."""
        return _rows(self.files / "curve.jsonl")

    def trials(self) -> list[dict[str, Any]]:
        """`figure`, `id`, `value` and `weight` of every document and question that was scored, so that two
        checkpoints can be compared on each."""
        return _rows(self.files / "trials.jsonl")

    def judgements(self) -> list[dict[str, Any]]:
        """One row a score (`name`, `score`) or pair (`one`, `other`, `verdict`), with `question`, the id of
        what was answered."""
        return _rows(self.files / "judgements.jsonl")

    @staticmethod
    def write(
        files: Path,
        figures: Mapping[str, Figure],
        answers: Sequence[dict[str, Any]] = (),
        curve: Sequence[dict[str, Any]] = (),
        judgements: Sequence[dict[str, Any]] = (),
        trials: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Write the files; the interval of a figure without a trial is written as its value."""
        content = {
            name: figure.model_dump()
            if figure.n
            else {**figure.model_dump(), "low": figure.value, "high": figure.value}
            for name, figure in sorted(figures.items())
        }
        (files / "scores.json").write_text(
            json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8"
        )
        tables = {"answers": answers, "curve": curve, "judgements": judgements, "trials": trials}
        for name, rows in tables.items():
            if rows:
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (files / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
