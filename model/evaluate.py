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
from model.transformer import AttentionMask, Cache, Transformer, token_logprobs
from model.weights import load_model
from model.worker import run
from storage.checkpoint import TOKENIZER
from storage.tokenizer import ChatTokenizer
from storage.tokens import TokenFiles

NO_LABEL = -1
WORTH_SHARING = 8
"""Tokens below which one more pass costs more than computing them again."""

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

    What the continuations of a request share is computed once, and what the requests with the same
    few-shot prefix share is computed once for all of them. A prompt that does not fit loses its oldest
    examples first, then its own beginning.
    """
    context = model.shape.context
    results: list[dict[str, Any]] = [{} for _ in requests]
    groups: dict[tuple[str, ...], list[_Encoded]] = {}
    for index, request in enumerate(requests):
        encoded = _encode(tokenizer, request, index, context)
        groups.setdefault((request["header"], *request["prefix"]), []).append(encoded)
    apart: list[_Encoded] = []
    batches: list[tuple[int, list[_Encoded]]] = []
    for members in groups.values():
        shared = _common([member.ids[0][: member.shared] for member in members])
        if shared < WORTH_SHARING or len(members) == 1:
            apart += members
        else:
            batches += [(shared, batch) for batch in _by_length(members, settings.batch, context)]
    batches += [(0, batch) for batch in _by_length(apart, settings.batch, context)]
    done, prefix = 0, None
    for shared, batch in batches:
        start = batch[0].ids[0][:shared]
        if prefix is None or prefix[0] != start:
            prefix = (start, _prefix_cache(model, start))
        for member, values in zip(batch, _score_batch(model, batch, prefix[1]), strict=True):
            results[member.request] = {"logprobs": values}
        done += len(batch)
        report(done, len(requests))
    return results


@dataclass(frozen=True)
class _Encoded:
    """The continuations of one request behind their prompt."""

    request: int
    ids: list[list[int]]
    """Ids of each continuation with all that stands before it."""
    scored: list[int]
    """How many of the last ids belong to the continuation."""
    shared: int
    """Ids that all start with and that lie before the last one read for any score; 0 for a few."""


def _encode(
    tokenizer: ChatTokenizer, request: dict[str, Any], index: int, context: int
) -> _Encoded:
    def rows(before: str, continuations: Sequence[str]) -> list[list[int]]:
        return [[tokenizer.eos, *tokenizer.encode(before + text)] for text in continuations]

    examples: list[str] = list(request["prefix"])
    while True:
        before = request["header"] + "".join(examples) + request["prompt"]
        [longest] = rows(before, [max(request["continuations"], key=len)])
        if len(longest) <= context + 1 or not examples:
            break
        examples.pop(0)
    ids = rows(before, request["continuations"])
    read = len(tokenizer.encode(before)) + 1
    # A merge across the boundary can leave nothing behind it: then the last token is the answer's.
    scored = [min(max(1, len(row) - read), context) for row in ids]
    cut = max(0, max(len(row) for row in ids) - context - 1)
    cut = min(cut, *(len(row) - count - 1 for row, count in zip(ids, scored, strict=True)))
    ids = [row[cut:][-(context + 1) :] for row in ids]
    least = min(len(row) - count - 1 for row, count in zip(ids, scored, strict=True))
    shared = min(_common(ids), least)
    return _Encoded(index, ids, scored, shared if shared >= WORTH_SHARING else 0)


def _common(rows: Sequence[list[int]]) -> int:
    """How many ids all rows start with."""
    first, last = min(rows), max(rows)
    limit = min(len(first), len(last))
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _by_length(requests: Sequence[_Encoded], rows: int, context: int) -> list[list[_Encoded]]:
    """Batches of about so many continuations that fit the context, the longest prompts first."""
    batches: list[list[_Encoded]] = []
    held, prompt, ending = rows, 0, 0
    for request in sorted(requests, key=lambda request: (-request.shared, -len(request.ids[0]))):
        ending = max(ending, max(len(row) for row in request.ids) - 1 - request.shared)
        if held + len(request.ids) > rows or prompt + ending > context:
            batches.append([])
            held, prompt = 0, request.shared
            ending = max(len(row) for row in request.ids) - 1 - request.shared
        batches[-1].append(request)
        held += len(request.ids)
    return batches


def _prefix_cache(model: Transformer, ids: list[int]) -> Cache | None:
    if not ids:
        return None
    device = model.embedding.weight.device
    cache = Cache(model.shape, 1, len(ids), device=device)
    model.hidden(torch.tensor([ids], device=device), cache=cache)
    return cache


def _score_batch(
    model: Transformer, batch: Sequence[_Encoded], prefix: Cache | None
) -> list[list[float]]:
    """Log-probabilities of the continuations of some requests, whose prompts start with the prefix."""
    device = model.embedding.weight.device
    endings = [row[request.shared :] for request in batch for row in request.ids]
    counts = [count for request in batch for count in request.scored]
    ids, labels = _padded(
        [row[:-1] for row in endings],
        [
            [NO_LABEL] * (len(row) - 1 - count) + row[-count:]
            for row, count in zip(endings, counts, strict=True)
        ],
        device,
    )
    cache, mask = None, None
    if any(request.shared for request in batch):
        prompts = [request.ids[0][: request.shared] for request in batch]
        cache, padding = _read_prompts(model, prompts, prefix, room=ids.shape[1])
        owner = torch.tensor(
            [place for place, request in enumerate(batch) for _ in request.ids], device=device
        )
        cache.select(owner)
        mask = AttentionMask(padding=padding[owner])
    hidden = model.hidden(ids, mask=mask, cache=cache)
    logprobs = iter(token_logprobs(model.head_weight, hidden, labels).double().sum(1).tolist())
    return [[next(logprobs) for _ in request.ids] for request in batch]


def _read_prompts(
    model: Transformer, prompts: Sequence[list[int]], prefix: Cache | None, *, room: int
) -> tuple[Cache, Tensor]:
    """A cache that holds the prompts, padded at the left, with room behind; and (B,) their padding.

    The last columns, as many as the longest prompt has behind the prefix, are computed for every row;
    the columns before them are copied from the prefix.
    """
    device = model.embedding.weight.device
    start = 0 if prefix is None else prefix.length
    longest = max(len(prompt) for prompt in prompts)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    cache = Cache(model.shape, len(prompts), longest + room, device=device)
    # At least one column is computed, so that a prompt that is nothing but the prefix is one too.
    copied = min(start, longest - 1)
    if prefix is not None:
        for row, prompt in enumerate(prompts):
            pad = longest - len(prompt)
            for new, old in zip(cache.layers, prefix.layers, strict=True):
                for target, source in zip(new, old, strict=True):
                    target[row, :, pad:copied] = source[0, :, : max(copied - pad, 0)]
    cache.length = copied
    ids = torch.tensor(
        [([0] * (longest - len(prompt)) + prompt)[copied:] for prompt in prompts], device=device
    )
    model.hidden(ids, mask=AttentionMask(padding=padding), cache=cache)
    return cache, padding


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
