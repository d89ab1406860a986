"""Evaluate a checkpoint: held-out documents, exams, minimal pairs, and what it writes."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.evaluate import EvaluateConfig
from storage.artifact import Artifact
from storage.checkpoint import Policy, ReadWindows, RewardModel, kept_looks
from storage.conversations import Conversations, first_user_turn
from storage.jsonl import read_jsonl
from storage.preferences import Preferences
from storage.scores import Figure, Scores, table_rows
from storage.tokens import Tokens
from storage.world import World
from tasks.evaluation_figures import (
    HELD,
    PROMPT,
    TASK,
    baseline_figures,
    document_figures,
    held_figures,
    overfitted,
    pair_figures,
    request_figures,
    trials,
    world_figures,
    writing_figures,
)
from tasks.exams import (
    Question,
    Request,
    Task,
    exam_requests,
    preset_hash,
    read_minimal_pairs,
    read_own_tasks,
    read_questions,
)
from tasks.launch import run_worker
from tasks.stage import Job, stage


@stage(
    version=5,
    uses_torch=True,
    headlines={
        "bits_per_byte/all": "bits per byte",
        "2-gram/bits_per_byte/all": "bits per byte, 2-gram",
        "5-gram/bits_per_byte/all": "bits per byte, 5-gram",
        "xz/bits_per_byte/*": "bits per byte, xz -9, *",
        "overfit/all": "over-fitting, bits per byte",
        "exam_letter/accuracy": "exam, letters",
        "exam_option/accuracy": "exam, whole options",
        "own_*/accuracy": "own task, *",
        "own_*/rouge_l": "own task, ROUGE-L, *",
        "*blimp*/accuracy": "minimal pairs, *",
        "pairs/accuracy": "held-out pairs, better answer likelier",
        "world/right": "right answers",
        "world/ended": "answers that end",
        "world/reward": "true reward",
        "world/reward_model": "reward model's score",
        "world/kl": "KL to the reference, nats",
        "held/ended": "answers to held-out questions that end",
        "held/reward_model": "reward model's score, held-out questions",
        "held/kl": "KL to the reference, nats, held-out questions",
    },
)
def evaluate(
    job: Job,
    policy: Policy,
    settings: EvaluateConfig,
    tokens: Tokens | None = None,
    reference: Policy | None = None,
    reward: RewardModel | None = None,
    world: World | None = None,
    conversations: Conversations | None = None,
    preferences: Preferences | None = None,
) -> Scores:
    """Measure one checkpoint on everything it is given; every figure has n and an interval.

    reads Policy, Tokens (held-out documents), a reference Policy (for the KL), a RewardModel, a World,
    Conversations (held-out questions), Preferences (held-out pairs)
    writes Scores   cost one forward pass of all that is scored, and the generation
    """
    requests, tasks = _requests(job, settings)
    _write_lines(job.state / "requests.jsonl", (asdict(request) for request in requests))
    _write_lines(job.state / "questions.jsonl", _questions(settings, tasks, world, conversations))
    inputs: dict[str, Artifact | None] = {
        "policy": policy,
        "tokens": tokens,
        "reference": reference,
        "reward": reward,
        "preferences": preferences,
    }
    given = {name: artifact for name, artifact in inputs.items() if artifact is not None}
    if settings.has_curve and not kept_looks(policy.files):
        raise ValueError(
            "has_curve measures weights that pretraining kept, and this policy has none; set "
            "pretrain.kept_looks, or has_curve to false"
        )
    job.metrics.update(run_worker(job, "model.evaluate", settings, given))
    scored, documents = _scored(job.state, "")
    pairs = _read_parts(job.state, "pairs")
    figures = request_figures(requests, scored) | document_figures(documents) | pair_figures(pairs)
    if tokens is not None and settings.has_baselines:
        figures |= _baselines(job, policy, tokens, settings)
    answers = _read_parts(job.state, "answers")
    figures |= world_figures(answers, world) | held_figures(answers)
    figures |= writing_figures(answers, tasks)
    curve = [
        {"step": step, **{name: figure.model_dump() for name, figure in found.items()}}
        for step in (kept_looks(policy.files) if settings.has_curve else ())
        if (found := _look_figures(job.state, step, requests))
    ]
    each = [*trials(requests, scored, documents, pairs)]
    Scores.write(job.files, figures, answers, curve, trials=each)
    job.metrics["prompt_hash"] = preset_hash(settings.prompt)
    if domains := overfitted(figures):
        job.metrics["overfitted"] = domains
        job.log.warning(
            "training documents of %s are predicted better than held-out ones by a tenth or more: the model "
            "learns them by heart; read them fewer times, or add others",
            ", ".join(domains),
        )
    job.tables["scores"] = table_rows(figures)
    return Scores(job.path)


def _look_figures(state: Path, step: int, requests: Sequence[Request]) -> dict[str, Figure]:
    scored, documents = _scored(state, f"look_{step:09d}-")
    return request_figures(requests, scored) | document_figures(documents)


def _scored(state: Path, prefix: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the requests and of the documents that one set of weights was given."""
    scored = sorted(_read_parts(state, f"{prefix}scored"), key=lambda row: row["request"])
    return scored, _read_parts(state, f"{prefix}documents")


def _baselines(
    job: Job, policy: Policy, tokens: Tokens, settings: EvaluateConfig
) -> dict[str, Figure]:
    from tasks.ngram import tokens_read

    training = tokens_read(tokens.reader, ReadWindows.read(policy.files))
    job.metrics["baseline_tokens"] = len(training)
    return baseline_figures(tokens.reader, training, settings, job.report_progress)


def _requests(job: Job, settings: EvaluateConfig) -> tuple[list[Request], list[Task]]:
    """What is scored, and what is answered freely."""

    asked: dict[str, list[Question]] = {}
    for question in itertools.chain(*map(read_questions, _paths(job, "exams"))):
        asked.setdefault(question.subject, []).append(question)
    limit = settings.questions_per_subject or None
    requests = exam_requests(
        [question for group in asked.values() for question in group[:limit]],
        [*itertools.chain(*map(read_questions, _paths(job, "examples")))],
        preset=settings.prompt,
        shots=settings.shots,
        scoring=settings.scoring,
    )
    tasks: list[Task] = []
    for path in _paths(job, "minimal_pairs"):
        requests += read_minimal_pairs(path, per_paradigm=settings.pairs_per_paradigm)
    for path in _paths(job, "own_tasks"):
        for row in read_own_tasks(path):
            tasks.append(row) if isinstance(row, Task) else requests.append(row)
    return requests, tasks


def _paths(job: Job, name: str) -> Iterator[Path]:
    """Local files of a source setting, each as long as it is read."""
    for file in job.sources[name].files if name in job.sources else ():
        with file.fetched() as path:
            yield path


def _questions(
    settings: EvaluateConfig,
    tasks: Sequence[Task],
    world: World | None,
    conversations: Conversations | None,
) -> Iterable[dict[str, Any]]:
    asked = [(f"{PROMPT}{index}", prompt) for index, prompt in enumerate(settings.prompts)]
    asked += [(TASK + task.id, task.prompt) for task in tasks]
    if conversations is not None:
        asked += _held_questions(conversations, settings.held_questions)
    for name, prompt in asked:
        yield {"id": name, "prompt": prompt, "samples": 1, "is_greedy": True}
    if world is not None:
        for question in world.questions("held"):
            yield {
                "id": question.id,
                "prompt": question.text,
                "samples": settings.samples,
                "is_greedy": False,
            }


def _held_questions(conversations: Conversations, count: int) -> Iterator[tuple[str, str]]:
    """Id and text of `count` different questions, spread evenly over the held-out side; 0 for all."""
    firsts = {first_user_turn(row["messages"]): row["id"] for row in conversations.rows("held")}
    questions = [*firsts.items()]
    taken = min(count or len(questions), len(questions))
    for place in range(taken):
        text, name = questions[place * len(questions) // taken]
        yield f"{HELD}{name}", text


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    # In ASCII: a text may hold U+2028 and the like, at which lines are also taken to end.
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")


def _read_parts(state: Path, name: str) -> list[dict[str, Any]]:
    """Rows of all parts of a kind, in the order of the parts."""
    return [row for path in sorted(state.glob(f"{name}-*.jsonl")) for row in read_jsonl(path)]
