"""Supervised fine-tuning: learn what the assistant says, and nothing else of a conversation."""

from collections.abc import Mapping

from torch import Tensor

from model.batches import Batch
from model.transformer import Transformer, token_logprobs


def sft_loss(model: Transformer, batch: Batch, totals: Mapping[str, float]) -> Tensor:
    """Negative log-likelihood of the batch's labels, in nats, over all labels of the step.

    `ids` and `labels` are (B, T); a label is negative where the assistant does not speak. A mean of
    micro-batch means would weigh tokens of short batches more.
    """
    hidden = model.hidden(batch["ids"])
    return -token_logprobs(model.head_weight, hidden, batch["labels"]).sum() / totals["tokens"]
