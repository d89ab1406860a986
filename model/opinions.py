"""What others than a reward model make of answers: functions, people, a judge, the truth of a world.

An opinion takes answers as dicts (`text`, `is_ended`, `messages`, `reference`, `id`, `domain`, `language`)
and gives each a number, or None where it has none.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.contract import JobFile
from conf.ppo import PpoConfig
from model.judge import Judge
from storage.jsonl import take_up
from storage.own_code import own_scores
from storage.people_scores import answer_key, people_scores
from storage.world import Facts

Answer = Mapping[str, Any]
Opinion = Callable[[Sequence[Answer]], list[float | None]]

JUDGED, UNSCORED = "judged.jsonl", "unscored.jsonl"
"""In `logs/`: what the judge said, and the answers that people have not scored."""


def reward_opinions(job: JobFile, settings: PpoConfig) -> dict[str, Opinion]:
    """The sources of the reward beside the reward model, by their names in `weights`."""
    found: dict[str, Opinion] = {}
    if paths := job.sources.get("functions"):
        found["functions"] = functions([Path(path) for path in paths])
    if paths := job.sources.get("people"):
        found["people"] = People([Path(path) for path in paths], job.logs / UNSCORED)
    if settings.judge is not None and not settings.judge.is_truth:
        found["judge"] = Judge(settings.judge, job.logs / JUDGED)
    return found


def truth_opinion(job: JobFile, settings: PpoConfig) -> Opinion | None:
    """What the truth is, if it is looked at. Raises ValueError as `PpoConfig.truth` does."""
    match settings.truth([*job.inputs, *job.sources]):
        case None:
            return None
        case "world":
            return world_truth(Path(job.inputs["world"]))
        case "truth_functions":
            return functions([Path(path) for path in job.sources["truth_functions"]])
        case _:
            assert settings.judge is not None
            return Judge(settings.judge, job.logs / JUDGED)


def functions(paths: Sequence[Path]) -> Opinion:
    """The sum of what the functions `score(answer)` of users' files give.

    Raises ValueError, as does the opinion for what is no finite number.
    """
    score = own_scores(paths)
    return lambda answers: [score(answer) for answer in answers]


class People:
    """Scores that people gave to answers, word for word; answers that nobody has seen are written down."""

    def __init__(self, paths: Sequence[Path], unscored: Path) -> None:
        """Raises ValueError as `people_scores` does."""
        self._scores = people_scores(paths)
        self._unscored = unscored
        # A replay after a kill meets the same answers.
        self._told = {answer_key(row["messages"], row["answer"]) for row in take_up(unscored)}

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        keys = [answer_key(answer["messages"], answer["text"]) for answer in answers]
        with self._unscored.open("a", encoding="utf-8") as stream:
            for key, answer in zip(keys, answers, strict=True):
                if key not in self._scores and key not in self._told:
                    self._told.add(key)
                    row = {"messages": answer["messages"], "answer": answer["text"], "score": None}
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        return [self._scores.get(key) for key in keys]


def world_truth(files: Path) -> Opinion:
    """The true reward in the world whose `files` folder is given; None for what it is not asked about."""
    facts = Facts.read(files)
    questions = {question.text: question.id for question in facts.questions()}

    def truth(answer: Answer) -> float | None:
        question = questions.get(answer["messages"][-1]["content"])
        if question is None:
            return None
        return facts.judge(question, answer["text"], ended=answer["is_ended"]).reward

    return lambda answers: [truth(answer) for answer in answers]
