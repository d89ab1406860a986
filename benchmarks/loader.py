"""Rows of token files into batches: ours, torch's DataLoader over a map-style data set, nanoGPT's get_batch.

All read the same .bin file in the page cache, in this process, and give int64 ids and labels of the
same shape. Seconds are those of the processor.
"""

import time
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.work import Row, Work
from conf.pretrain import PretrainConfig
from conf.shape import ShapeConfig
from model.pretrain import Samples
from model.ranks import Ranks
from storage.tokens import (
    SplitCount,
    TokenFiles,
    TokensMeta,
    end_path,
    token_path,
    write_meta,
)

TOKENS, DOCUMENT = 64_000_000, 500
CONTEXT, ROWS = 512, 64
SECONDS = 2.0
"""Of each turn."""
TURNS = 3
"""Of everybody, one after another; the best one counts."""


def measure(work: Work) -> list[Row]:
    """One row against each."""
    folder = work.folder / "loader"
    folder.mkdir()
    _write_tokens(folder)
    path = token_path(folder, "web", "train")
    loaders = {
        "ours": _ours(folder),
        "torch DataLoader, map style": _data_loader(path),
        "nanoGPT get_batch": _get_batch(path),
    }
    found = dict.fromkeys(loaders, 0.0)
    for _ in range(TURNS):
        for name, batch in loaders.items():
            found[name] = max(found[name], _rate(batch))
    ours = found.pop("ours")
    title = f"loader, {ROWS} rows of {CONTEXT}"
    return [
        Row(title, name, ours, theirs, "Mtok/s", *goals)
        for (name, theirs), goals in zip(found.items(), ((4, 2), (20, 10)), strict=True)
    ]


def _ours(folder: Path) -> Callable[[int], object]:
    """All that a step of pretraining takes: mixture, ids, labels, document starts, names."""
    files = TokenFiles(folder)
    settings = PretrainConfig(
        shape=ShapeConfig(context=CONTEXT), batch_tokens=ROWS * CONTEXT, epochs=1000
    )
    plan = settings.plan({"web": files.count("web", "train").tokens})
    return Samples(files, settings, plan, Ranks(), micro_batch=0).at


class _Rows(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, path: Path) -> None:
        self._tokens = np.memmap(path, dtype=np.uint16, mode="r")

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // CONTEXT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self._tokens[index * CONTEXT : (index + 1) * CONTEXT + 1].astype(np.int64)
        return torch.from_numpy(row[:-1]), torch.from_numpy(row[1:])


def _data_loader(path: Path) -> Callable[[int], object]:
    loader = DataLoader(_Rows(path), batch_size=ROWS, shuffle=True)
    batches = chain.from_iterable(repeat(loader))
    return lambda _: next(batches)


def _get_batch(path: Path) -> Callable[[int], object]:
    """As nanoGPT's train.py does it: the file is mapped anew for every batch, rows are stacked one by one."""

    def batch(_: int) -> tuple[Tensor, Tensor]:
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - CONTEXT, (ROWS,))
        ids = [torch.from_numpy(tokens[i : i + CONTEXT].astype(np.int64)) for i in starts]
        labels = [
            torch.from_numpy(tokens[i + 1 : i + 1 + CONTEXT].astype(np.int64)) for i in starts
        ]
        return torch.stack(ids), torch.stack(labels)

    return batch


def _rate(batch: Callable[[int], object]) -> float:
    """Million tokens in a second of the processor."""
    batch(0)
    count, started = 0, time.process_time()
    while time.process_time() - started < SECONDS:
        count += 1
        batch(count)
    return count * ROWS * CONTEXT / 1e6 / (time.process_time() - started)


def _write_tokens(folder: Path) -> None:
    pick = np.random.default_rng(0)
    ids = pick.integers(4, 32_000, TOKENS, np.uint16)
    ids[DOCUMENT - 1 :: DOCUMENT] = 1
    ids.tofile(token_path(folder, "web", "train"))
    np.arange(DOCUMENT, TOKENS + 1, DOCUMENT, dtype=np.uint64).tofile(
        end_path(folder, "web", "train")
    )
    for write in (token_path, end_path):
        write(folder, "web", "held").touch()
    full = SplitCount(tokens=TOKENS, documents=TOKENS // DOCUMENT)
    meta = TokensMeta(
        eos=1,
        vocabulary=32_000,
        tokenizer_digest="",
        domains={"web": {"train": full, "held": SplitCount()}},
    )
    write_meta(folder, meta)
