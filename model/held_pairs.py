"""Held-out pairs under a policy: how likely each answer is."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from model.dialogues import Pair, Renderer, labelled_logprobs, pair_tensors
from model.parts import Part, Rows
from model.scoring import Report
from model.transformer import Transformer
from storage.checkpoint import ModelCard
from storage.preferences import read_preferences
from storage.tokenizer import ChatTokenizer

PART_PAIRS = 256


def pair_parts(
    policy: Path,
    preferences: Path,
    load: Callable[[], Transformer],
    tokenizer: ChatTokenizer,
    batch_rows: int,
) -> Iterator[Part]:
    """Both answers of every held-out pair that fits the context of the policy in the folder."""
    renderer = Renderer(tokenizer, ModelCard.read(policy).shape.context)
    pairs = renderer.pairs(read_preferences(preferences, "held"))
    for number, start in enumerate(range(0, len(pairs), PART_PAIRS)):
        chosen = pairs[start : start + PART_PAIRS]

        def make(report: Report, chosen: Sequence[Pair] = chosen) -> Rows:
            return pair_rows(load(), chosen, batch_rows, report)

        yield Part(f"pairs-{number:05d}.jsonl", len(chosen), make)


def pair_rows(model: Transformer, pairs: Sequence[Pair], batch_rows: int, report: Report) -> Rows:
    """`chosen` and `rejected` of each pair: the log-probability of the whole answer, in nats, and
    `.._tokens`, how many it has with its end."""
    device = model.embedding.weight.device
    by_length = sorted(range(len(pairs)), key=lambda row: pairs[row].length)
    rows: Rows = [{} for _ in pairs]
    for start in range(0, len(pairs), batch_rows):
        members = by_length[start : start + batch_rows]
        tensors = pair_tensors([pairs[row] for row in members])
        found = labelled_logprobs(model, {name: x.to(device) for name, x in tensors.items()})
        sides = found.double().sum(-1).view(2, len(members)).T.tolist()
        for row, (chosen, rejected) in zip(members, sides, strict=True):
            pair = pairs[row]
            rows[row] = {"id": pair.name, "chosen": chosen, "rejected": rejected}
            rows[row] |= {"chosen_tokens": len(pair.chosen), "rejected_tokens": len(pair.rejected)}
        report(min(start + batch_rows, len(pairs)), len(pairs))
    return rows
