"""The worker of the evaluate stage: scores documents and continuations, and writes answers.

`python -m model.evaluate JOBFILE`. The work is cut into parts (a few subjects, documents of a domain,
some questions), as `model/parts.py` shares and resumes them.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.contract import JobFile
from conf.evaluate import EvaluateConfig
from model.documents import (
    Document,
    document_nats,
    document_parts,
    document_rows,
    held_documents,
    own_reader,
    train_documents,
)
from model.generate import generate
from model.held_pairs import pair_parts
from model.journal import Journal
from model.parts import Part, Rows, run_parts
from model.ranks import Ranks
from model.scoring import Report, score_requests
from model.transformer import Transformer, token_logprobs
from model.weights import load_model
from model.worker import run
from storage.checkpoint import TOKENIZER, kept_looks
from storage.tokenizer import ChatTokenizer
from storage.tokens import TokenFiles

PART_REQUESTS = PART_ANSWERS = 256
"""About so many in a part: enough to fill batches, few enough to lose little. Not a setting: a resumed job
must cut as the one before."""


def main() -> None:
    """Entry of the worker."""
    run(work)


def work(job: JobFile, ranks: Ranks, journal: Journal) -> dict[str, Any]:
    """Do every part of the job that is not yet done; how many rows of each kind there are.

    Raises Stopped between two parts when the job is asked to stop.
    """
    every = [*_parts(job, ranks)]
    with torch.inference_mode():
        run_parts(every, job, ranks, journal)
    return {
        kind: sum(part.size for part in every if part.file.startswith(kind))
        for kind in ("scored", "documents", "pairs", "answers")
    }


def _parts(job: JobFile, ranks: Ranks) -> Iterator[Part]:
    settings = EvaluateConfig.model_validate(job.settings)
    folder = Path(job.inputs["policy"])
    tokenizer = ChatTokenizer(folder / TOKENIZER)
    requests = _read(job.state / "requests.jsonl")
    files = TokenFiles(Path(job.inputs["tokens"])) if "tokens" in job.inputs else None

    # One at a time: the kept looks of a long training would not fit together.
    @functools.lru_cache(maxsize=1)
    def model_of(weights: Path | None) -> Transformer:
        return load_model(folder, weights=weights, device=ranks.device)

    looks = kept_looks(folder) if settings.has_curve else {}
    for step, weights in [(None, None), *looks.items()]:
        prefix = "" if step is None else f"look_{step:09d}-"
        load = functools.partial(model_of, weights)
        yield from _request_parts(prefix, load, tokenizer, requests, settings)
        if files is not None:
            documents = [*held_documents(files, settings.held_documents)]
            if settings.train_documents and step is None:
                documents += train_documents(files, settings.train_documents)
            make = functools.partial(_scored_documents, load, files, tokenizer, settings)
            yield from document_parts(documents, make, prefix)
    load = functools.partial(model_of, None)
    if "preferences" in job.inputs:
        pairs = Path(job.inputs["preferences"])
        yield from pair_parts(folder, pairs, load, tokenizer, settings.batch)
    yield from _answer_parts(job, settings, load, tokenizer)


def _request_parts(
    prefix: str,
    load: Callable[[], Transformer],
    tokenizer: ChatTokenizer,
    requests: Sequence[dict[str, Any]],
    settings: EvaluateConfig,
) -> Iterator[Part]:
    """Whole subjects together: all requests with the same examples before them."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault((request["header"], *request["prefix"]), []).append(index)
    parts: list[list[int]] = []
    for members in groups.values():
        if not parts or len(parts[-1]) >= PART_REQUESTS:
            parts.append([])
        parts[-1] += members
    for number, part in enumerate(parts):

        def make(report: Report, part: list[int] = part) -> Rows:
            chosen = [requests[index] for index in part]
            found = score_requests(load(), tokenizer, chosen, settings.batch, report)
            return [{"request": i, **row} for i, row in zip(part, found, strict=True)]

        yield Part(f"{prefix}scored-{number:05d}.jsonl", len(part), make)


def _scored_documents(
    load: Callable[[], Transformer],
    files: TokenFiles,
    tokenizer: ChatTokenizer,
    settings: EvaluateConfig,
    documents: Sequence[Document],
    report: Report,
) -> Rows:
    """Nats of each document. A policy with a tokenizer of its own reads the same text in its own tokens."""
    texts = [files.tokenizer.decode(document.ids.tolist()) for document in documents]
    if tokenizer.digest == files.meta.tokenizer_digest:
        ids = [document.ids.tolist() for document in documents]
    else:
        ids = tokenizer.encode_batch(texts)
    reader = own_reader(load(), tokenizer.eos)
    nats = document_nats(reader, ids, stride=settings.stride, batch=settings.batch, report=report)
    return document_rows(documents, texts, ids, nats)


def _answer_parts(
    job: JobFile,
    settings: EvaluateConfig,
    load: Callable[[], Transformer],
    tokenizer: ChatTokenizer,
) -> Iterator[Part]:
    """Answers to all questions; with a reference their KL to it, with a reward model its score."""
    questions = [
        (question, sample)
        for question in _read(job.state / "questions.jsonl")
        for sample in range(question["samples"])
    ]

    @functools.cache
    def others() -> dict[str, Transformer]:
        device = load().embedding.weight.device
        return {
            name: load_model(Path(job.inputs[name]), device=device)
            for name in ("reference", "reward")
            if name in job.inputs
        }

    number = 0
    for is_greedy in (True, False):
        chosen = [item for item in questions if item[0]["is_greedy"] is is_greedy]
        for first in range(0, len(chosen), PART_ANSWERS):
            last = min(first + PART_ANSWERS, len(chosen))

            def make(
                report: Report,
                chosen: list[tuple[dict[str, Any], int]] = chosen,
                places: range = range(first, last),
                is_greedy: bool = is_greedy,
            ) -> Rows:
                rows: Rows = []
                for start in places[:: settings.batch]:
                    batch = chosen[start : min(start + settings.batch, places.stop)]
                    rows += _answer_batch(
                        batch, start, settings, load(), tokenizer, others(), is_greedy=is_greedy
                    )
                    report(len(rows), len(places))
                return rows

            yield Part(f"answers-{number:05d}.jsonl", last - first, make)
            number += 1


def _answer_batch(
    batch: Sequence[tuple[dict[str, Any], int]],
    start: int,
    settings: EvaluateConfig,
    policy: Transformer,
    tokenizer: ChatTokenizer,
    others: dict[str, Transformer],
    *,
    is_greedy: bool,
) -> list[dict[str, Any]]:
    room = policy.shape.context - 8
    longest = min(settings.max_new_tokens, room)
    prompts = [
        _prompt_ids(tokenizer, question["prompt"], is_chat=settings.is_chat)[
            -(room - longest + 8) :
        ]
        for question, _ in batch
    ]
    end = tokenizer.im_end if settings.is_chat else tokenizer.eos
    made = generate(
        policy,
        prompts,
        max_new_tokens=longest,
        temperature=0.0 if is_greedy else settings.temperature,
        seed=settings.seed,
        eos=end,
        pad=tokenizer.pad,
        rows=range(start, start + len(batch)),
    )
    rows: list[dict[str, Any]] = []
    for index, (question, sample) in enumerate(batch):
        answer = made.answer(index, keep_stop=True)
        row: dict[str, Any] = {
            "id": question["id"],
            "sample": sample,
            "prompt": question["prompt"],
            "answer": tokenizer.decode(made.answer(index)).strip(),
            "is_ended": bool(made.ended[index]),
            "tokens": len(answer),
        }
        whole = torch.tensor([prompts[index] + answer], device=policy.embedding.weight.device)
        if "reference" in others:
            row["kl"] = _answer_logprob(policy, whole, len(answer)) - _answer_logprob(
                others["reference"], whole, len(answer)
            )
        if "reward" in others:
            hidden = others["reward"].hidden(whole)[:, -1]
            row["reward_model"] = float(others["reward"].score(hidden))
        rows.append(row)
    return rows


def _answer_logprob(model: Transformer, whole: Tensor, length: int) -> float:
    """Log-probability of the last `length` tokens of one row, in nats, at temperature 1."""
    if length == 0:
        return 0.0
    hidden = model.hidden(whole[:, :-1])[:, -length:]
    return float(token_logprobs(model.head_weight, hidden, whole[:, -length:]).sum())


def _prompt_ids(tokenizer: ChatTokenizer, prompt: str, *, is_chat: bool) -> list[int]:
    if is_chat:
        message = {"role": "user", "content": prompt}
        return tokenizer.render([message], for_generation=True).ids
    return [tokenizer.eos, *tokenizer.encode(prompt)]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


if __name__ == "__main__":
    main()
