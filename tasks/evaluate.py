"""Evaluate a checkpoint: held-out documents, exams, minimal pairs, and what it writes."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.evaluate import EvaluateConfig
from storage.artifact import Artifact
from storage.checkpoint import Policy, ReadWindows, RewardModel
from storage.scores import Figure, Scores, mean
from storage.tokens import TokenFiles, Tokens
from storage.world import World
from tasks.exams import Request, exam_requests, preset_hash, read_minimal_pairs, read_questions
from tasks.launch import run_worker
from tasks.stage import Job, stage

if TYPE_CHECKING:
    from tasks.ngram import TokenArray

BASELINE_ORDERS = (2, 5)
NATS_PER_BIT = 0.6931471805599453


@stage(
    version=2,
    uses_torch=True,
    headlines={
        "bits_per_byte/all": "bits per byte",
        "2-gram/bits_per_byte/all": "bits per byte, 2-gram",
        "5-gram/bits_per_byte/all": "bits per byte, 5-gram",
        "xz/bits_per_byte/*": "bits per byte, xz -9, *",
        "exam_letter/accuracy": "exam, letters",
        "exam_option/accuracy": "exam, whole options",
        "*blimp*/accuracy": "minimal pairs, *",
        "world/right": "right answers",
        "world/ended": "answers that end",
        "world/reward": "true reward",
        "world/reward_model": "reward model's score",
        "world/kl": "KL to the reference, nats",
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
) -> Scores:
    """Measure one checkpoint on everything it is given; every figure has n and an interval.

    reads Policy, Tokens (held-out documents), a reference Policy (for the KL), a RewardModel, a World
    writes Scores   cost one forward pass of all that is scored, and the generation
    """
    requests = _requests(job, settings)
    _write_lines(job.state / "requests.jsonl", (asdict(request) for request in requests))
    _write_lines(job.state / "questions.jsonl", _questions(settings, world))
    inputs: dict[str, Artifact | None] = {
        "policy": policy,
        "tokens": tokens,
        "reference": reference,
        "reward": reward,
    }
    given = {name: artifact for name, artifact in inputs.items() if artifact is not None}
    job.metrics.update(run_worker(job, "model.evaluate", settings, given))
    figures: dict[str, Figure] = {}
    figures |= _request_figures(requests, _read_lines(job.state / "scored.jsonl"))
    if tokens is not None:
        figures |= _document_figures(_read_lines(job.state / "documents.jsonl"))
        if settings.has_baselines:
            from tasks.ngram import tokens_read

            read = ReadWindows.read(policy.files)
            training = tokens_read(tokens.reader, read)
            job.metrics["baseline_tokens"] = len(training)
            figures |= _baseline_figures(tokens.reader, training, settings, job.report_progress)
    answers = _read_lines(job.state / "answers.jsonl")
    figures |= _answer_figures(answers, world)
    Scores.write(job.files, figures, answers)
    job.metrics["prompt_hash"] = preset_hash(settings.prompt)
    job.tables["scores"] = [
        {"figure": name, **figure.model_dump(exclude={"unit"})}
        for name, figure in sorted(figures.items())
    ]
    return Scores(job.path)


def _requests(job: Job, settings: EvaluateConfig) -> list[Request]:
    def questions(name: str) -> Iterable[Any]:
        for file in job.sources[name].files if name in job.sources else ():
            with file.fetched() as path:
                yield from read_questions(path)

    asked: dict[str, list[Any]] = {}
    for question in questions("exams"):
        asked.setdefault(question.subject, []).append(question)
    limit = settings.questions_per_subject or None
    requests = exam_requests(
        [question for group in asked.values() for question in group[:limit]],
        list(questions("examples")),
        preset=settings.prompt,
        shots=settings.shots,
        scoring=settings.scoring,
    )
    for file in job.sources["minimal_pairs"].files if "minimal_pairs" in job.sources else ():
        with file.fetched() as path:
            requests += read_minimal_pairs(path, per_paradigm=settings.pairs_per_paradigm)
    return requests


def _questions(settings: EvaluateConfig, world: World | None) -> Iterable[dict[str, Any]]:
    for index, prompt in enumerate(settings.prompts):
        yield {"id": f"prompt/{index}", "prompt": prompt, "samples": 1, "is_greedy": True}
    if world is not None:
        for question in world.questions("held"):
            yield {
                "id": question.id,
                "prompt": question.text,
                "samples": settings.samples,
                "is_greedy": False,
            }


def _request_figures(
    requests: Sequence[Request], scored: Sequence[dict[str, Any]]
) -> dict[str, Figure]:
    """Accuracy of every group and of its parts; ties count as the share of a guess among them."""
    hits: dict[str, list[float]] = {}
    chance: dict[str, list[float]] = {}
    for request, row in zip(requests, scored, strict=True):
        guess = 1 / len(request.continuations)
        for name, values in _readings(request, row).items():
            best = max(values)
            winners = [index for index, value in enumerate(values) if value == best]
            hit = (request.right in winners) / len(winners)
            for key in (name, *(f"{name}/{tag}" for tag in request.tags.values())):
                hits.setdefault(key, []).append(hit)
                chance.setdefault(key, []).append(guess)
    return {
        name: mean(values, chance=sum(chance[name]) / len(values)) for name, values in hits.items()
    }


def _readings(request: Request, row: dict[str, Any]) -> dict[str, list[float]]:
    """Scores of the continuations under each reading: as they are, and per byte for whole options."""
    logprobs: list[float] = row["logprobs"]
    if request.group != "exam_option":
        return {f"{request.group}/accuracy": logprobs}
    lengths = [len(text.encode()) for text in request.continuations]
    return {
        "exam_option/accuracy": [value / n for value, n in zip(logprobs, lengths, strict=True)],
        "exam_option_sum/accuracy": logprobs,
    }


def _document_figures(rows: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Bits per byte and nats per token of every domain and of all, with a document bootstrap."""
    figures: dict[str, Figure] = {}
    for domain in [*sorted({row["domain"] for row in rows}), None]:
        chosen = [row for row in rows if domain in (None, row["domain"])]
        if not chosen:
            continue
        bits = [row["nats"] / NATS_PER_BIT / row["bytes"] for row in chosen]
        figures[f"bits_per_byte/{domain or 'all'}"] = mean(
            bits, weights=[row["bytes"] for row in chosen], unit="bits/byte"
        )
        figures[f"nats_per_token/{domain or 'all'}"] = mean(
            [row["nats"] / row["tokens"] for row in chosen],
            weights=[row["tokens"] for row in chosen],
            unit="nats/token",
        )
    return figures


def _baseline_figures(
    files: TokenFiles,
    training: "TokenArray",
    settings: EvaluateConfig,
    report: Callable[[float, float, str], None],
) -> dict[str, Figure]:
    """The same documents under counting models of the training tokens, and under `xz -9`."""
    import numpy as np

    from tasks.ngram import KneserNey, xz_bits_per_byte

    rows: list[dict[str, Any]] = []
    documents = {
        domain: files.held_documents(domain, settings.held_documents) for domain in files.domains
    }
    for done, order in enumerate(BASELINE_ORDERS):
        report(done, len(BASELINE_ORDERS), "baselines")
        model = KneserNey(training, order=order, vocabulary=files.meta.vocabulary)
        for domain, chosen in documents.items():
            for ids, size in chosen:
                nats = model.nats(np.concatenate([[files.meta.eos], ids])).sum()
                rows.append(
                    {"domain": domain, "nats": nats, "bytes": size, "tokens": len(ids), "n": order}
                )
    figures = {
        f"{order}-gram/{name}": figure
        for order in BASELINE_ORDERS
        for name, figure in _document_figures([row for row in rows if row["n"] == order]).items()
    }
    for domain, chosen in documents.items():
        if chosen:
            texts = [files.tokenizer.decode(ids.tolist()).encode() for ids, _ in chosen]
            bits = xz_bits_per_byte(texts)
            figures[f"xz/bits_per_byte/{domain}"] = Figure(
                value=bits, n=len(texts), low=bits, high=bits, unit="bits/byte"
            )
    return figures


def _answer_figures(answers: Sequence[dict[str, Any]], world: World | None) -> dict[str, Figure]:
    """What the world says of the answers to its questions; samples of one question are one cluster."""
    if world is None:
        return {}
    judged: dict[str, list[float]] = {}
    clusters: list[str] = []
    for row in answers:
        if row["id"].startswith("prompt/"):
            continue
        verdict = world.judge(row["id"], row["answer"], ended=row["is_ended"])
        row["judgement"] = asdict(verdict)
        clusters.append(row["id"].split("#")[0])
        for name, value in row["judgement"].items():
            judged.setdefault(f"world/{name}", []).append(float(value))
        for name in ("kl", "reward_model"):
            if name in row:
                judged.setdefault(f"world/{name}", []).append(row[name])
    return {name: mean(values, clusters=clusters) for name, values in judged.items()}


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, "utf-8")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
