"""Log-probabilities of continuations: of what requests share, everything is computed once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.transformer import AttentionMask, Cache, Transformer, token_logprobs
from storage.tokenizer import ChatTokenizer

NO_LABEL = -1
WORTH_SHARING = 8
"""Tokens below which one more pass costs more than computing them again."""

Report = Callable[[int, int], None]
"""Told how much of how much is done."""


def score_requests(
    model: Transformer,
    tokenizer: ChatTokenizer,
    requests: Sequence[dict[str, Any]],
    batch_rows: int,
    report: Report,
) -> list[dict[str, Any]]:
    """Log-probability of every continuation of every request, in nats, in the requests' order.

    What the continuations of a request share is computed once, and what the requests with the same
    few-shot prefix share is computed once for all of them. A prompt that does not fit loses its oldest
    examples first, then its own beginning.
    """
    context = model.shape.context
    results: list[dict[str, Any]] = [{} for _ in requests]
    groups: dict[tuple[str, ...], list[Encoded]] = {}
    for index, request in enumerate(requests):
        member = encoded(tokenizer, request, index, context)
        groups.setdefault((request["header"], *request["prefix"]), []).append(member)
    apart: list[Encoded] = []
    batches: list[tuple[int, list[Encoded]]] = []
    for members in groups.values():
        shared = _common([member.ids[0][: member.shared] for member in members])
        if shared < WORTH_SHARING or len(members) == 1:
            apart += members
        else:
            batches += [(shared, batch) for batch in _by_length(members, batch_rows, context)]
    batches += [(0, batch) for batch in _by_length(apart, batch_rows, context)]
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
class Encoded:
    """The continuations of one request behind their prompt."""

    request: int
    ids: list[list[int]]
    """Ids of each continuation with all that stands before it."""
    scored: list[int]
    """How many of the last ids belong to the continuation."""
    shared: int
    """Ids that all start with and that lie before the last one read for any score; 0 for a few."""


def encoded(tokenizer: ChatTokenizer, request: dict[str, Any], index: int, context: int) -> Encoded:
    """The ids of a request, cut to the context: its oldest examples go first, then its own beginning."""

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
    return Encoded(index, ids, scored, shared if shared >= WORTH_SHARING else 0)


def _common(rows: Sequence[list[int]]) -> int:
    """How many ids all rows start with."""
    first, last = min(rows), max(rows)
    limit = min(len(first), len(last))
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _by_length(requests: Sequence[Encoded], rows: int, context: int) -> list[list[Encoded]]:
    """Batches of about so many continuations that fit the context, the longest prompts first."""
    batches: list[list[Encoded]] = []
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
    model: Transformer, batch: Sequence[Encoded], prefix: Cache | None
) -> list[list[float]]:
    """Log-probabilities of the continuations of some requests, whose prompts start with the prefix."""
    device = model.embedding.weight.device
    endings = [row[request.shared :] for request in batch for row in request.ids]
    counts = [count for request in batch for count in request.scored]
    ids, labels = padded(
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


def padded(
    inputs: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Two (rows, longest) tensors, filled up on the right, where no real token looks."""
    width = max(len(row) for row in inputs)
    return (
        torch.tensor([[*row, *[0] * (width - len(row))] for row in inputs], device=device),
        torch.tensor([[*row, *[NO_LABEL] * (width - len(row))] for row in labels], device=device),
    )
