"""judge: a language model behind an endpoint scores answers, and says which of two is better."""

import json
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.judge import JudgeConfig
from storage.jsonl import content_id
from storage.scores import Figure, Scores, mean, table_rows
from tasks.answer_pairs import Answered, answered_by_all, contest_figures, contests
from tasks.completions import Answer, Endpoint
from tasks.stage import Job, stage
from tasks.text_metrics import HAN

SCORE = re.compile(r"\[\[\s*(10|[1-9])(?:\.0+)?\s*\]\]")
VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
CHINESE = re.compile(f"[{HAN}]")
CACHE = "judgements.db"
SHOWN = 20


@stage(
    version=1,
    headlines={
        "score/*": "judge's score of 10, *",
        "wins/*": "judged better, *",
        "wins_at_equal_length/*": "judged better at equal length, *",
        "consistent/*": "judged alike in both orders, *",
    },
)
def judge(job: Job, answers: dict[str, Scores], settings: JudgeConfig) -> Scores:
    """A judge's scores of several checkpoints' answers to the same questions, and who wins against whom.

    reads Scores (their answers)   writes Scores   cost the endpoint's: one request an answer, two a pair

    Each pair is shown in both orders; where the verdicts differ it is a tie, and `consistent` falls. What
    cannot be read as a verdict is counted, and is nobody's loss. Every answer of the judge is kept in the
    store (`judgements.db`) by what was asked: no run asks it again. Raises EndpointFailed where the
    endpoint refuses or fails too often; what came until then is kept.
    """
    asked = answered_by_all(answers)[: settings.questions or None]
    against = contests(list(answers), settings.baseline) if "pairs" in settings.modes else []
    if "pairs" in settings.modes and not against and "score" not in settings.modes:
        raise ValueError("modes=[pairs] compares two checkpoints, only one is named; add another")
    asks = [*_asks(asked, against, settings)]
    told = _answers(job, [ask.prompt for ask in asks], settings)
    by_place = dict(zip(((ask.question, *ask.shown) for ask in asks), told, strict=True))
    scores = [*_scores(asked, by_place, settings)]
    pairs = [*_pairs(asked, against, by_place)]
    figures = _score_figures(scores) | contest_figures(pairs) | _order_figures(pairs)
    Scores.write(job.files, figures, judgements=[*scores, *pairs])
    job.tables["scores"] = table_rows(figures)
    job.tables["judgements"] = [
        {"question": row["text"], **{k: row[k] for k in ("one", "other", "verdict", "reasons")}}
        for row in pairs[:SHOWN]
    ]
    return Scores(job.path)


@dataclass(frozen=True)
class _Ask:
    """One question to the judge."""

    question: str
    """Id of the question whose answers are judged."""
    shown: tuple[str, ...]
    """Whose answer is shown: one to be scored, or two in this order."""
    prompt: str


def _asks(
    asked: Sequence[Answered], against: Sequence[tuple[str, str]], settings: JudgeConfig
) -> Iterator[_Ask]:
    for item in asked:
        language = "zh" if CHINESE.search(item.question) else "en"
        if "score" in settings.modes:
            for name, answer in item.answers.items():
                places = {"question": item.question, "answer": answer}
                prompt = _filled(settings.score_prompts[language], places)
                yield _Ask(item.id, (name,), prompt)
        for one, other in against:
            for first, second in ((one, other), (other, one)):
                places = {
                    "question": item.question,
                    "first": item.answers[first],
                    "second": item.answers[second],
                }
                prompt = _filled(settings.pair_prompts[language], places)
                yield _Ask(item.id, (first, second), prompt)


def _filled(prompt: str, places: Mapping[str, str]) -> str:
    """The prompt with its places filled; what an answer spells in braces stays as it is."""
    return re.sub(r"{(\w+)}", lambda found: places[found[1]], prompt)


def _answers(job: Job, prompts: Sequence[str], settings: JudgeConfig) -> list[str | None]:
    """What the judge says to each prompt; None where the budget was spent before."""
    asked_as = [settings.model, settings.temperature, settings.max_answer_tokens]
    keys = [content_id([*asked_as, prompt]) for prompt in prompts]
    job.state.mkdir(parents=True, exist_ok=True)
    cache = _Cache(job.store.root / CACHE)
    known = cache.get(keys)
    missing = {key: text for key, text in zip(keys, prompts, strict=True) if key not in known}
    endpoint = Endpoint(settings, job.state)
    found, is_spent = endpoint.ask([*missing.values()], [*missing]) if missing else ([], False)
    came = [answer for answer in found if answer]
    cache.put(came)
    known |= {answer.key: answer.text for answer in came}
    job.metrics |= {
        "judge": settings.model,
        "host": endpoint.host,
        "asked": len(prompts),
        "answered": sum(key in known for key in keys),
        "requests": sum(answer.requests for answer in came),
        "tokens": sum(answer.tokens for answer in came),
        "is_budget_spent": is_spent,
    }
    if is_spent:
        job.log.warning(
            "the budget was spent after %d of %d judgements; raise max_requests or max_total_tokens for more",
            job.metrics["answered"],
            len(prompts),
        )
    return [known.get(key) for key in keys]


class _Cache:
    """What a judge was ever told to say, for all runs on a store."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def get(self, keys: Sequence[str]) -> dict[str, str]:
        with closing(self._open()) as connection:
            rows = connection.execute("SELECT key, answer FROM judgements").fetchall()
        wanted = set(keys)
        return {key: json.loads(answer)["text"] for key, answer in rows if key in wanted}

    def put(self, answers: Sequence[Answer]) -> None:
        rows = [(answer.key, json.dumps(asdict(answer), ensure_ascii=False)) for answer in answers]
        with closing(self._open()) as connection, connection:
            connection.executemany("INSERT OR IGNORE INTO judgements VALUES (?, ?)", rows)

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=60)
        connection.execute(
            "CREATE TABLE IF NOT EXISTS judgements (key TEXT PRIMARY KEY, answer TEXT NOT NULL)"
        )
        return connection


_Told = Mapping[tuple[str, ...], str | None]
"""Question's id and whose answers were shown -> what the judge said."""


def _scores(
    asked: Sequence[Answered], told: _Told, settings: JudgeConfig
) -> Iterator[dict[str, Any]]:
    for item in asked if "score" in settings.modes else ():
        for name in item.answers:
            text = told[item.id, name]
            found = SCORE.findall(text or "")
            yield {
                "question": item.id,
                "text": item.question,
                "name": name,
                "score": int(found[-1]) if found else None,
                "is_told": text is not None,
                "reason": text,
            }


def _pairs(
    asked: Sequence[Answered], against: Sequence[tuple[str, str]], told: _Told
) -> Iterator[dict[str, Any]]:
    for item in asked:
        for one, other in against:
            texts = told[item.id, one, other], told[item.id, other, one]
            forth, back = (_verdict(text) for text in texts)
            turned = {"A": "B", "B": "A"}.get(back or "", back)
            verdict = None
            if forth and turned:
                sides = {"A": "one", "B": "other", "C": "tie"}
                verdict = sides[forth] if forth == turned else "tie"
            yield {
                "question": item.id,
                "text": item.question,
                "one": one,
                "other": other,
                "verdict": verdict,
                "orders": [forth, back],
                "lengths": [len(item.answers[one]), len(item.answers[other])],
                "reasons": list(texts),
            }


def _verdict(text: str | None) -> str | None:
    """The last verdict of a text: a judge may quote the form before it decides."""
    found = VERDICT.findall(text or "")
    return found[-1] if found else None


def _score_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    for name in sorted({row["name"] for row in rows}):
        own = [row for row in rows if row["name"] == name and row["is_told"]]
        if own:
            figures[f"unparsable/{name}"] = mean([float(row["score"] is None) for row in own])
        if scored := [float(row["score"]) for row in own if row["score"] is not None]:
            figures[f"score/{name}"] = mean(scored)
    return figures


def _order_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """How the order in which answers are shown sways the judge: a judge without a bias is consistent, and
    prefers what is shown first in half of its decisions."""
    figures: dict[str, Figure] = {}
    for title in dict.fromkeys(f"{row['one']}_over_{row['other']}" for row in rows):
        own = [row for row in rows if f"{row['one']}_over_{row['other']}" == title]
        told = [row["orders"] for row in own if row["verdict"]]
        if told:
            same = [
                float((forth, back) in (("A", "B"), ("B", "A"), ("C", "C"))) for forth, back in told
            ]
            figures[f"consistent/{title}"] = mean(same)
        decided = [letter for row in own for letter in row["orders"] if letter in ("A", "B")]
        if decided:
            first = mean([float(letter == "A") for letter in decided], chance=0.5)
            figures[f"first_preferred/{title}"] = first
    return figures
