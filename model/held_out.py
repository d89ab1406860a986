"""Losses of windows that nothing is learnt from: of held-out documents, and of what may be trained on."""

import math

import numpy as np
import numpy.typing as npt
import torch

from conf.pretrain import PretrainConfig
from model.batches import Batch, Windows
from model.ranks import Ranks
from model.transformer import AttentionMask, Transformer, token_logprobs
from storage.tokens import TokenFiles

EVALUATION_TOKENS = 16_384
"""In one forward pass."""


class HeldOut:
    """Held-out documents of each domain, whole ones up to a number of tokens, split over the ranks."""

    def __init__(self, files: TokenFiles, settings: PretrainConfig, ranks: Ranks) -> None:
        self._settings, self._ranks = settings, ranks
        self._domains: dict[str, tuple[Windows, int]] = {}
        for name in files.domains:
            ends = files.ends(name, "held").astype(np.int64)
            documents = int(np.searchsorted(ends, settings.held_tokens, side="right"))
            if documents:
                tokens = files.tokens(name, "held")[: ends[documents - 1]]
                size = int(files.text_bytes(name)[:documents].sum())
                windows = Windows(tokens, settings.row_tokens, files.meta.eos)
                self._domains[name] = (windows, size)

    def losses(self, model: Transformer) -> dict[str, float]:
        """Nats per token, bits per byte, of each domain and (`held_loss`) of the tokens of all; the eos of
        each document counts as a token."""
        found: dict[str, float] = {}
        total = tokens = 0.0
        for name, (windows, size) in self._domains.items():
            own = window_nats(model, windows, self._settings, self._ranks)
            [nats] = self._ranks.add([float(own.sum())])
            found[f"held_loss/{name}"] = nats / len(windows.tokens)
            total, tokens = total + nats, tokens + len(windows.tokens)
            if size:
                found[f"held_bits_per_byte/{name}"] = nats / math.log(2) / size
        if tokens:
            found["held_loss"] = total / tokens
        return found


def window_losses(
    model: Transformer, windows: Windows, settings: PretrainConfig, ranks: Ranks
) -> npt.NDArray[np.float64]:
    """Nats per label of every window, (windows,), the same on all ranks."""
    parts = ranks.gather(window_nats(model, windows, settings, ranks))
    nats = np.empty(len(windows))
    for rank, part in enumerate(parts):
        nats[rank :: ranks.world] = part
    labels = np.full(len(windows), windows.context)
    labels[-1:] = len(windows.tokens) - windows.context * (len(windows) - 1)
    return nats / labels


@torch.no_grad()
def window_nats(
    model: Transformer, windows: Windows, settings: PretrainConfig, ranks: Ranks
) -> npt.NDArray[np.float64]:
    """Nats of all labels of each of this rank's windows: every `world`-th, beginning with its number."""
    own = np.arange(len(windows))[ranks.rank :: ranks.world]
    at_once = max(1, EVALUATION_TOKENS // windows.context)
    nats = [np.empty(0)]
    for start in range(0, len(own), at_once):
        ids, labels = windows.at(own[start : start + at_once])
        is_start = torch.from_numpy(ids == windows.eos)
        batch = Batch(
            {"ids": torch.from_numpy(ids), "is_start": is_start}, weights={}, tokens=ids.size
        ).to(ranks.device)
        hidden = model.hidden(batch["ids"], mask=document_mask(batch, settings))
        wanted = torch.from_numpy(labels).to(ranks.device)
        nats.append(
            -token_logprobs(model.head_weight, hidden, wanted).double().sum(1).cpu().numpy()
        )
    return np.concatenate(nats)


def document_mask(batch: Batch, settings: PretrainConfig) -> AttentionMask | None:
    """What keeps a token from seeing other documents of its row, if the settings want that."""
    if not settings.is_document_masked:
        return None
    return AttentionMask(documents=batch["is_start"].cumsum(1))
