"""The worker of the evaluate stage: scores documents and continuations, and writes answers.

`python -m model.evaluate JOBFILE`. The work is cut into parts (a few subjects, documents of a domain,
some questions), which the ranks share. Each is written whole when it is done and skipped when it is
there already: a run that was ended goes on behind the parts that are done, on any number of ranks.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from conf.contract import JobFile
from conf.evaluate import EvaluateConfig
from model.generate import generate
from model.journal import Journal
from model.loop import Stopped
from model.ranks import Ranks
from model.scoring import NO_LABEL, Report, padded, score_requests
from model.transformer import Transformer, token_logprobs
from model.weights import load_model
from model.worker import run
from storage.checkpoint import TOKENIZER, kept_looks
from storage.tokenizer import ChatTokenizer
from storage.tokens import Split, TokenFiles

PART_REQUESTS = PART_DOCUMENTS = PART_ANSWERS = 256
"""About so many in a part: enough to fill batches, few enough to lose little. Not a setting: a resumed job
must cut as the one before."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Window:
    """A stretch of a document: all of `ids` is read, the last `scored` labels count."""

    document: int
    ids: list[int]
    scored: int


@dataclass(frozen=True)
class Document:
    """A document to be scored, in the ids of the token files."""

    domain: str
    split: Split
    ids: npt.NDArray[Any]
    bytes: int | None
    """UTF-8 bytes of its text, where the token files tell."""


@dataclass(frozen=True)
class Part:
    """A stretch of the work, and the file of the attempt's state that its rows are written to."""

    file: str
    size: int
    make: Callable[[Report], Rows]


def main() -> None:
    """Entry of the worker."""
    run(work)


def work(job: JobFile, ranks: Ranks, journal: Journal) -> dict[str, Any]:
    """Do every part of the job that is not yet done; how many rows of each kind there are.

    Raises Stopped between two parts when the job is asked to stop.
    """
    every = [*_parts(job, ranks)]
    parts = every[ranks.rank :: ranks.world]
    done, total = 0, sum(part.size for part in parts)
    with torch.inference_mode():
        for part in parts:
            if ranks.is_stopping:
                raise Stopped(f"stopped before {part.file}; the parts before it are kept")
            before = done

            def report(now: int, of: int, size: int = part.size, before: int = before) -> None:
                journal.progress(before + size * now // max(of, 1), total, {}, unit="rows")

            _once(job.state / part.file, part.make, report)
            done += part.size
    return {
        kind: sum(part.size for part in every if part.file.startswith(kind))
        for kind in ("scored", "documents", "answers")
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
            documents = [*_documents(files, settings, is_look=step is not None)]
            for number, start in enumerate(range(0, len(documents), PART_DOCUMENTS)):
                chosen = documents[start : start + PART_DOCUMENTS]
                make = functools.partial(
                    _scored_documents, load, files, tokenizer, chosen, settings
                )
                yield Part(f"{prefix}documents-{number:05d}.jsonl", len(chosen), make)
    yield from _answer_parts(job, settings, functools.partial(model_of, None), tokenizer)


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


def _documents(files: TokenFiles, settings: EvaluateConfig, *, is_look: bool) -> Iterator[Document]:
    for domain in files.domains:
        for ids, size in files.held_documents(domain, settings.held_documents):
            yield Document(domain, "held", ids, size)
        if settings.train_documents and not is_look:
            for ids in files.train_documents(domain, settings.train_documents):
                yield Document(domain, "train", ids, None)


def _scored_documents(
    load: Callable[[], Transformer],
    files: TokenFiles,
    tokenizer: ChatTokenizer,
    documents: Sequence[Document],
    settings: EvaluateConfig,
    report: Report,
) -> Rows:
    """Nats of each document. A policy with a tokenizer of its own reads the same text in its own tokens."""
    texts = [files.tokenizer.decode(document.ids.tolist()) for document in documents]
    if tokenizer.digest == files.meta.tokenizer_digest:
        ids = [document.ids.tolist() for document in documents]
    else:
        ids = tokenizer.encode_batch(texts)
    nats = document_nats(load(), ids, tokenizer.eos, settings, report)
    return [
        {
            "domain": document.domain,
            "split": document.split,
            "bytes": document.bytes or len(text.encode("utf-8")),
            "characters": len(text),
            "tokens": len(tokens),
            "nats": value,
        }
        for document, text, tokens, value in zip(documents, texts, ids, nats, strict=True)
    ]


def document_nats(
    model: Transformer,
    documents: Sequence[list[int]],
    separator: int,
    settings: EvaluateConfig,
    report: Report,
) -> list[float]:
    """Nats of every document, each token scored once, the separator before the first; 0 for an empty one.

    Long documents are read in windows of the model's context; a window after the first scores the
    last `stride` of it. The document's end token is not scored: it is no byte of the text.
    """
    found = [0.0] * len(documents)
    context = model.shape.context
    step = max(1, int(context * settings.stride))
    windows = [
        window
        for place, ids in enumerate(documents)
        if ids
        for window in windows_of(place, [separator, *ids], context, step)
    ]
    windows.sort(key=lambda window: (-len(window.ids), window.document))
    device = model.embedding.weight.device
    for start in range(0, len(windows), settings.batch):
        batch = windows[start : start + settings.batch]
        ids, labels = padded(
            [window.ids[:-1] for window in batch],
            [
                [NO_LABEL] * (len(window.ids) - 1 - window.scored) + window.ids[-window.scored :]
                for window in batch
            ],
            device,
        )
        nats = -token_logprobs(model.head_weight, model.hidden(ids), labels).double().sum(1)
        for window, value in zip(batch, nats.tolist(), strict=True):
            found[window.document] += value
        report(min(start + settings.batch, len(windows)), len(windows))
    return found


def windows_of(document: int, tokens: list[int], context: int, step: int) -> list[Window]:
    """Windows of at most context + 1 tokens (inputs and their labels) that score each label once."""
    windows = [Window(document, tokens[: context + 1], min(len(tokens) - 1, context))]
    done = context + 1
    while done < len(tokens):
        end = min(done + step, len(tokens))
        windows.append(Window(document, tokens[max(0, end - context - 1) : end], end - done))
        done = end
    return windows


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


def _once(path: Path, make: Callable[[Report], Rows], report: Report) -> None:
    """The rows of a part, made and written whole unless the file is there."""
    if not path.exists():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make(report))
        draft = path.with_suffix(".draft")
        draft.write_text(text, "utf-8")
        draft.replace(path)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


if __name__ == "__main__":
    main()
