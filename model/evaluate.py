"""The worker of the evaluate stage: scores documents and continuations, and writes answers.

`python -m model.evaluate JOBFILE`. Each part is written whole when it is done and skipped when it
is there already, so that a run that was ended goes on behind the last finished part.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.contract import JobFile
from conf.evaluate import EvaluateConfig
from model.generate import generate
from model.journal import Journal
from model.ranks import Ranks
from model.transformer import Cache, Transformer, token_logprobs
from model.weights import load_model
from model.worker import run
from storage.checkpoint import TOKENIZER
from storage.tokenizer import ChatTokenizer
from storage.tokens import TokenFiles

NO_LABEL = -1

Report = Callable[[int, int], None]
"""Told how much of how much is done."""


@dataclass(frozen=True)
class Window:
    """A stretch of a document: all of `ids` is read, the last `scored` labels count."""

    document: int
    ids: list[int]
    scored: int


def main() -> None:
    """Entry of the worker."""
    run(work)


def work(job: JobFile, ranks: Ranks, journal: Journal) -> dict[str, Any]:
    """Do every part of the job that is asked for and not yet done; how much of each there is."""
    settings = EvaluateConfig.model_validate(job.settings)
    folder = Path(job.inputs["policy"])
    policy, tokenizer = load_model(folder, device=ranks.device), ChatTokenizer(folder / TOKENIZER)
    requests = _read(job.state / "requests.jsonl")

    def report(unit: str) -> Report:
        return lambda done, total: journal.progress(done, total, {}, unit=unit)

    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "scored": lambda: score_requests(
            policy, tokenizer, requests, settings, report("continuations")
        ),
        "answers": lambda: _answers(job, settings, policy, tokenizer, report("answers")),
    }
    if "tokens" in job.inputs:
        files = TokenFiles(Path(job.inputs["tokens"]))
        parts["documents"] = lambda: score_documents(policy, files, settings, report("documents"))
    with torch.inference_mode():
        return {name: _once(job.state / f"{name}.jsonl", make) for name, make in parts.items()}


def score_documents(
    model: Transformer,
    files: TokenFiles,
    settings: EvaluateConfig,
    report: Report,
) -> list[dict[str, Any]]:
    """Nats of every held-out document, each token scored once, the separator before the first.

    Long documents are read in windows of the model's context; a window after the first scores the
    last `stride` of it. The document's end token is not scored: it is no byte of the text.
    """
    rows: list[dict[str, Any]] = []
    windows: list[Window] = []
    context = model.shape.context
    step = max(1, int(context * settings.stride))
    for domain in files.domains:
        for ids, size in files.held_documents(domain, settings.held_documents):
            tokens = [files.meta.eos, *ids.tolist()]
            windows += windows_of(len(rows), tokens, context, step)
            rows.append({"domain": domain, "bytes": size, "tokens": len(ids), "nats": 0.0})
    windows.sort(key=lambda window: (-len(window.ids), window.document))
    device = model.embedding.weight.device
    for start in range(0, len(windows), settings.batch):
        batch = windows[start : start + settings.batch]
        ids, labels = _padded(
            [window.ids[:-1] for window in batch],
            [
                [NO_LABEL] * (len(window.ids) - 1 - window.scored) + window.ids[-window.scored :]
                for window in batch
            ],
            device,
        )
        nats = -token_logprobs(model.head_weight, model.hidden(ids), labels).double().sum(1)
        for window, value in zip(batch, nats.tolist(), strict=True):
            rows[window.document]["nats"] += value
        report(min(start + settings.batch, len(windows)), len(windows))
    return rows


def windows_of(document: int, tokens: list[int], context: int, step: int) -> list[Window]:
    """Windows of at most context + 1 tokens (inputs and their labels) that score each label once."""
    windows = [Window(document, tokens[: context + 1], min(len(tokens) - 1, context))]
    done = context + 1
    while done < len(tokens):
        end = min(done + step, len(tokens))
        windows.append(Window(document, tokens[max(0, end - context - 1) : end], end - done))
        done = end
    return windows


def score_requests(
    model: Transformer,
    tokenizer: ChatTokenizer,
    requests: Sequence[dict[str, Any]],
    settings: EvaluateConfig,
    report: Report,
) -> list[dict[str, Any]]:
    """Log-probability of every continuation of every request, in nats, in the requests' order.

    Requests with the same few-shot prefix share its keys and values, computed once. A prompt that
    does not fit loses its oldest examples first, then its own beginning.
    """
    results: list[dict[str, Any]] = [{} for _ in requests]
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault((request["header"], *request["prefix"]), []).append(index)
    done = 0
    for members in groups.values():
        rows = [
            _Row(index, place, *_encode(tokenizer, requests[index], text, model.shape.context))
            for index in members
            for place, text in enumerate(requests[index]["continuations"])
        ]
        for index in members:
            results[index] = {"logprobs": [0.0] * len(requests[index]["continuations"])}
        for row, value in zip(rows, _score_rows(model, rows, settings.batch), strict=True):
            results[row.request]["logprobs"][row.place] = value
        done += len(members)
        report(done, len(requests))
    return results


@dataclass(frozen=True)
class _Row:
    request: int
    place: int
    ids: list[int]
    scored: int


def _encode(
    tokenizer: ChatTokenizer, request: dict[str, Any], continuation: str, context: int
) -> tuple[list[int], int]:
    """Ids behind the separator, and how many of the last belong to the continuation."""
    examples: list[str] = list(request["prefix"])
    while True:
        before = request["header"] + "".join(examples) + request["prompt"]
        ids = [tokenizer.eos, *tokenizer.encode(before + continuation)]
        if len(ids) <= context + 1 or not examples:
            break
        examples.pop(0)
    scored = len(ids) - 1 - len(tokenizer.encode(before))
    # A merge across the boundary can leave nothing behind it: then the last token is the answer's.
    scored = max(1, scored)
    return ids[-(context + 1) :], min(scored, context)


def _score_rows(model: Transformer, rows: Sequence[_Row], batch: int) -> list[float]:
    shared = _shared_length([row.ids for row in rows], max(row.scored for row in rows))
    device = model.embedding.weight.device
    prefix = None
    if shared >= 8:  # below that one more pass costs more than it saves
        prefix = Cache(model.shape, 1, shared, device=device)
        model.hidden(torch.tensor([rows[0].ids[:shared]], device=device), cache=prefix)
    else:
        shared = 0
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
    values = [0.0] * len(rows)
    for start in range(0, len(order), batch):
        chosen = [rows[index] for index in order[start : start + batch]]
        ids, labels = _padded(
            [row.ids[shared:-1] for row in chosen],
            [
                [NO_LABEL] * (len(row.ids) - shared - 1 - row.scored) + row.ids[-row.scored :]
                for row in chosen
            ],
            device,
        )
        cache = None if prefix is None else _spread(prefix, model, len(chosen), ids.shape[1])
        hidden = model.hidden(ids, cache=cache)
        logprobs = token_logprobs(model.head_weight, hidden, labels).double().sum(1)
        for index, value in zip(order[start : start + batch], logprobs.tolist(), strict=True):
            values[index] = value
    return values


def _shared_length(rows: Sequence[list[int]], scored: int) -> int:
    """Tokens that all rows start with, at least one token before any that is scored."""
    shortest = min(len(row) for row in rows) - scored - 1
    first, last = min(rows), max(rows)
    shared = 0
    while shared < shortest and first[shared] == last[shared]:
        shared += 1
    return max(shared, 0)


def _spread(prefix: Cache, model: Transformer, rows: int, tokens: int) -> Cache:
    """A cache of many rows that all start with the prefix, with room for more tokens."""
    cache = Cache(model.shape, rows, prefix.length + tokens, device=prefix.layers[0][0].device)
    for (keys, values), (old_keys, old_values) in zip(cache.layers, prefix.layers, strict=True):
        keys[:, :, : prefix.length] = old_keys
        values[:, :, : prefix.length] = old_values
    cache.length = prefix.length
    return cache


def _answers(
    job: JobFile,
    settings: EvaluateConfig,
    policy: Transformer,
    tokenizer: ChatTokenizer,
    report: Report,
) -> list[dict[str, Any]]:
    """Answers to all questions; with a reference their KL to it, with a reward model its score."""
    questions = [
        (question, sample)
        for question in _read(job.state / "questions.jsonl")
        for sample in range(question["samples"])
    ]
    others = {
        name: load_model(Path(job.inputs[name]), device=policy.embedding.weight.device)
        for name in ("reference", "reward")
        if name in job.inputs
    }
    rows: list[dict[str, Any]] = []
    for is_greedy in (True, False):
        chosen = [item for item in questions if item[0]["is_greedy"] is is_greedy]
        for start in range(0, len(chosen), settings.batch):
            batch = chosen[start : start + settings.batch]
            rows += _answer_batch(
                batch, start, settings, policy, tokenizer, others, is_greedy=is_greedy
            )
            report(len(rows), len(questions))
    return rows


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


def _padded(
    inputs: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Two (rows, longest) tensors, filled up on the right, where no real token looks."""
    width = max(len(row) for row in inputs)
    return (
        torch.tensor([[*row, *[0] * (width - len(row))] for row in inputs], device=device),
        torch.tensor([[*row, *[NO_LABEL] * (width - len(row))] for row in labels], device=device),
    )


def _once(path: Path, make: Callable[[], list[dict[str, Any]]]) -> int:
    """Rows of the part, made and written whole unless it is there."""
    if not path.exists():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make())
        draft = path.with_suffix(".draft")
        draft.write_text(text, "utf-8")
        draft.replace(path)
    return len(_read(path))


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


if __name__ == "__main__":
    main()
