"""rate: blind pairs of answers for people, as a table and as a page; and what they said of them."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.rate import RateConfig
from storage.jsonl import content_id
from storage.scores import Scores, table_rows
from tasks.answer_pairs import Answered, agreement, answered_by_all, contest_figures, contests
from tasks.rows import open_text
from tasks.stage import Job, stage

PAGE = Path(__file__).parent / "page" / "rate.html"
PLACE = "[/* pairs */]"
"""Where the page has its pairs."""
COLUMNS = ("id", "question", "left", "right", "verdict", "rater")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
VERDICTS = ("left", "right", "tie")


@stage(
    version=3,
    headlines={
        "wins/*": "preferred by people, *",
        "wins_at_equal_length/*": "preferred by people at equal length, *",
        "agreement": "people agree with the judge",
    },
)
def rate(
    job: Job, answers: dict[str, Scores], settings: RateConfig, judge: Scores | None = None
) -> Scores:
    """Pairs of answers without names, and the win rates that people's ratings of them give.

    reads Scores (their answers), a judge's Scores to compare with, ratings   writes Scores, with
    `rate.html` (opens in any browser, keeps ratings there, saves them as CSV) and `pairs.csv` beside
    cost none

    A pair is known by its content: ratings of answers that have changed since are counted as `stale`.
    Two equal answers are not shown.
    """
    asked = answered_by_all(answers)[: settings.questions or None]
    pairs = _pairs(asked, contests(list(answers), settings.baseline), settings.seed)
    _write_table(job.files / "pairs.csv", pairs)
    _write_page(job.files / PAGE.name, pairs)
    known = {pair.id: pair for pair in pairs}
    rows: list[dict[str, Any]] = []
    stale = 0
    for name, verdict, rater in _ratings(job):
        if name in known:
            rows.append({**known[name].judged(verdict), "rater": rater})
        else:
            stale += 1
    figures = contest_figures(rows)
    if judge is not None:
        figures |= agreement(rows, judge.judgements())
    job.metrics |= {
        "pairs": len(pairs),
        "ratings": len(rows),
        "raters": len({row["rater"] for row in rows}),
        "stale": stale,
    }
    job.tables["scores"] = table_rows(figures)
    Scores.write(job.files, figures, judgements=rows)
    return Scores(job.path)


@dataclass(frozen=True)
class _Pair:
    """Two answers as they are shown."""

    id: str
    item: Answered
    names: tuple[str, str]
    """Whose answers are compared."""
    left: str
    """Whose answer is on the left."""

    @property
    def texts(self) -> tuple[str, str]:
        """Left and right."""
        one, other = self.names
        right = other if self.left == one else one
        return self.item.answers[self.left], self.item.answers[right]

    def judged(self, side: str) -> dict[str, Any]:
        """The row of a rating."""
        one, other = self.names
        is_one = (side == "left") == (self.left == one)
        return {
            "question": self.item.id,
            "text": self.item.question,
            "one": one,
            "other": other,
            "verdict": "tie" if side == "tie" else "one" if is_one else "other",
            "lengths": [len(self.item.answers[name]) for name in self.names],
        }


def _pairs(asked: Sequence[Answered], against: Sequence[tuple[str, str]], seed: int) -> list[_Pair]:
    """In an order, and with sides, that tell nothing of whose answers they are."""
    found: list[_Pair] = []
    for item in asked:
        for names in against:
            texts = [item.answers[name] for name in names]
            if texts[0] == texts[1]:
                continue
            draw = content_id([seed, item.question, *sorted(texts)])
            # The side by the texts alone: names, and their order, have no say in it.
            low, high = sorted(names, key=lambda name: item.answers[name])
            left = low if int(draw[-1], 16) % 2 else high
            found.append(_Pair(draw, item, names, left))
    return sorted(found, key=lambda pair: pair.id)


def _write_table(path: Path, pairs: Sequence[_Pair]) -> None:
    stream = io.StringIO(newline="")
    table = csv.writer(stream, lineterminator="\r\n")
    table.writerow(COLUMNS)
    for pair in pairs:
        texts = (pair.item.question, *pair.texts)
        # A spreadsheet takes these signs for the beginning of a formula, and computes it.
        shown = (f"'{text}" if text.startswith(FORMULA) else text for text in texts)
        table.writerow((pair.id, *shown, "", ""))
    # Spreadsheets take a file without this mark for one in an older encoding.
    path.write_bytes(b"\xef\xbb\xbf" + stream.getvalue().encode("utf-8"))


def _write_page(path: Path, pairs: Sequence[_Pair]) -> None:
    rows = [
        {"id": pair.id, "question": pair.item.question, "left": left, "right": right}
        for pair in pairs
        for left, right in (pair.texts,)
    ]
    # "</script>" in an answer would end the page's script.
    content = json.dumps(rows, ensure_ascii=False).replace("<", "\\u003c")
    name = hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()[:16]
    page = PAGE.read_text("utf-8").replace("{{ name }}", name).replace(PLACE, content)
    path.write_text(page, "utf-8")


def _ratings(job: Job) -> Iterator[tuple[str, str, str]]:
    """Id, verdict and rater of every rating; what was not rated is left out.

    Of several ratings of a pair by one rater in one file the last counts. Raises ValueError with file
    and line for a row that is no rating.
    """
    for file in job.sources["ratings"].files if "ratings" in job.sources else ():
        with (
            file.fetched() as path,
            open_text(path) as stream,
            io.TextIOWrapper(stream, "utf-8-sig", newline="") as text,
        ):
            reader = csv.DictReader(text)
            if not {"id", "verdict"} <= set(reader.fieldnames or ()):
                raise ValueError(
                    f"{file.name} has the columns {reader.fieldnames}; a table of ratings has `id` and "
                    "`verdict`: save it from the page, or fill in pairs.csv"
                )
            last: dict[tuple[str, str], str] = {}
            for row in reader:
                verdict = (row["verdict"] or "").strip().lower()
                if verdict and verdict not in VERDICTS:
                    raise ValueError(
                        f"{file.name}, line {reader.line_num}: verdict {verdict!r}; expected left, "
                        "right, tie or nothing"
                    )
                last[(row["id"] or "").strip(), (row.get("rater") or "").strip()] = verdict
            for (name, rater), verdict in last.items():
                if verdict:
                    yield name, verdict, rater
