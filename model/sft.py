"""Supervised fine-tuning: learn what the assistant says, and nothing else of a conversation.

Worker: `python -m model.sft JOBFILE`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.contract import JobFile
from conf.sft import SftConfig
from model.batches import Batch
from model.dialogues import Dialogue, Renderer, dialogue_tensors, labelled_logprobs
from model.engine import Loss, build_engine
from model.journal import Journal
from model.loop import train
from model.lora import add_lora, merge_lora
from model.ranks import Ranks
from model.transformer import AttentionMask, Transformer
from model.tuning import (
    batches_of,
    computing_in,
    loop_plan,
    order_of,
    spread,
    steps_of,
    training_figures,
    update_rule,
)
from model.weights import Checkpoints, load_model, save_model
from model.worker import identity_of_job, run
from storage.checkpoint import TOKENIZER
from storage.conversations import is_withheld, read_conversations
from storage.tokenizer import ChatTokenizer

EVALUATED_ROWS = 32
"""Held-out conversations in one forward pass."""


def main() -> None:
    """Entry of the worker."""
    run(work)


def work(job: JobFile, ranks: Ranks, journal: Journal) -> dict[str, Any]:
    """Fine-tune the job's policy; the figures of the result."""
    settings = SftConfig.model_validate(job.settings)
    source = Path(job.inputs["policy"])
    model, tokenizer = load_model(source), ChatTokenizer(source / TOKENIZER)
    renderer = Renderer.within(tokenizer, settings.context, model.shape.context)
    folder = Path(job.inputs["conversations"])
    learnt = read_conversations(folder, "train")
    if settings.withheld_share:
        learnt = (
            row for row in learnt if not is_withheld(row["messages"], settings.withheld_share)
        )
    rows = renderer.dialogues(learnt, settings.learn_from)
    fitted = renderer.counts.take()
    held = renderer.dialogues(read_conversations(folder, "held"), settings.learn_from)
    held = [held[row] for row in spread(len(held), settings.held_rows)]
    steps = steps_of(settings, len(rows))
    batch_at = batches_of(
        order_of(settings, [len(row.ids) for row in rows], ranks),
        lambda numbers: sft_batch([rows[row] for row in numbers]),
        job.launch,
        ranks,
    )
    add_lora(model, settings.lora, settings.seed)
    engine = build_engine(model, job.launch, ranks, update_rule(settings))
    state = train(
        engine,
        batch_at=batch_at,
        loss=step_loss(settings),
        plan=loop_plan(settings, steps, job.launch),
        checkpoints=Checkpoints(job.state / "checkpoints", identity_of_job(job, settings), ranks),
        journal=journal,
        evaluate=lambda step: held_losses(engine.whole(), held, settings, ranks),
    )
    tuned = engine.whole()
    merge_lora(tuned)
    if ranks.is_first:
        save_model(job.files, tuned, role="policy", tokenizer=source / TOKENIZER)
    return {
        **training_figures(settings, steps, len(rows), state),
        "train": fitted,
        "held_rows": len(held),
        "held_tokens": sum(sum(row.is_answer) for row in held),
        **state.evaluation,
    }


def sft_batch(rows: Sequence[Dialogue]) -> Batch:
    """A micro-batch of conversations."""
    tensors = dialogue_tensors(rows)
    return Batch(
        tensors=tensors,
        weights={"tokens": float((tensors["labels"] >= 0).sum())},
        tokens=tensors["ids"].numel(),
        samples=[row.name for row in rows],
    )


def step_loss(settings: SftConfig) -> Loss:
    """Negative log-likelihood of the step's labels, in nats per label; those are what the assistant says.

    A mean of micro-batch means would weigh tokens of short batches more.
    """

    def loss(model: Transformer, batch: Batch, totals: Mapping[str, float]) -> dict[str, Tensor]:
        logprobs = labelled_logprobs(model, batch.tensors, mask_of(batch, settings))
        return {"loss": -logprobs.sum() / max(totals["tokens"], 1.0)}

    return loss


def mask_of(batch: Batch, settings: SftConfig) -> AttentionMask | None:
    """What is seen beyond the tokens before: nothing, or all that stands before the first answer."""
    is_whole = settings.prompt_attention == "both_ways"
    return AttentionMask(prefix=batch["prefix"]) if is_whole else None


@torch.no_grad()
def held_losses(
    model: Transformer, rows: Sequence[Dialogue], settings: SftConfig, ranks: Ranks
) -> dict[str, float]:
    """Nats per answer token of held-out conversations: all together, and by domain."""
    nats: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    # Every rank goes through the same domains, so that their sums meet.
    domains = sorted({row.domain for row in rows})
    by_length = sorted(rows, key=lambda row: len(row.ids))[ranks.rank :: ranks.world]
    for start in range(0, len(by_length), EVALUATED_ROWS):
        part = by_length[start : start + EVALUATED_ROWS]
        batch = sft_batch(part).to(ranks.device)
        with computing_in(settings.precision, ranks.device):
            logprobs = labelled_logprobs(model, batch.tensors, mask_of(batch, settings))
        found = logprobs.double().sum(-1)
        for row, logprob in zip(part, found.tolist(), strict=True):
            nats[row.domain] -= logprob
            tokens[row.domain] += sum(row.is_answer)
    sums = ranks.add([*(nats[d] for d in domains), *(tokens[d] for d in domains)])
    total_nats, total_tokens = sums[: len(domains)], sums[len(domains) :]
    losses = {
        f"held_loss/{domain}": nats_here / tokens_here
        for domain, nats_here, tokens_here in zip(domains, total_nats, total_tokens, strict=True)
    }
    return {"held_loss": sum(total_nats) / sum(total_tokens), **losses} if domains else {}


if __name__ == "__main__":
    main()
