"""Finds passages that an earlier document has, word for word, and where to cut them.

Source: Lee et al. 2022, Deduplicating Training Data Makes Language Models Better (exact substrings), with
anchors (see `tasks/kernels/passages.py`) in place of a suffix array, which would hold the whole text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.dedup import DedupConfig
from storage.corpus import Shard
from tasks.near_duplicates import SignedShard
from tasks.signatures import SIGN_ROWS, text_buffers, texts_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import polars as pl

ANCHORS = "anchors.npy"
"""uint64, the anchors of every row after one another."""
ANCHOR_ENDS = "anchor_ends.npy"
"""(rows,) int64, where each row's end."""
PASSAGES = "passages.parquet"
"""What a landing cuts: shard, row, start, end (characters), and a document that has it."""


def build_anchors(files: Path, shard: Shard, settings: DedupConfig) -> dict[str, Any]:
    """Write the anchors of a shard's documents, those dropped today too. Cost: 50 MB of text a second."""
    import numpy as np

    from tasks.kernels import passages as kernel
    from tasks.kernels.compiling import alone

    texts = texts_of(shard)
    with alone():
        kernel.anchors(*text_buffers(texts[:1]), settings.passage_tokens)
    anchors, ends, total = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
    for start in range(0, len(texts), SIGN_ROWS):
        buffers = text_buffers(texts[start : start + SIGN_ROWS])
        of_piece, of_ends = kernel.anchors(*buffers, settings.passage_tokens)
        anchors.append(of_piece)
        ends.append(of_ends + total)
        total += len(of_piece)
    np.save(files / ANCHORS, np.concatenate(anchors))
    np.save(files / ANCHOR_ENDS, np.concatenate(ends))
    return {"documents": len(texts), "anchors": total}


def build_passages(
    files: Path,
    shards: Sequence[SignedShard],
    first_new: int,
    earlier: Sequence[Path],
    settings: DedupConfig,
) -> dict[str, Any]:
    """Write what to cut from the shards from `first_new` on.

    A run of `passage_tokens` tokens is cut from every kept document but the first that has it, in order of
    landing, shard and row; a document's own repetitions stay. Compared with the text as it was before any cut
    of this stage, so `earlier` decisions change nothing here.
    """
    import polars as pl

    del earlier
    firsts = _first_rows(shards)
    shared = _shared_anchors(shards, firsts, firsts[first_new])
    found = _runs(shards, firsts, shared, settings)
    owner = pl.col("owner").min().over("hash")
    copies = (
        found.with_columns(of=owner)
        .filter((pl.col("of") != pl.col("owner")) & (pl.col("owner") >= firsts[first_new]))
        .sort("owner", "start", "end")
    )
    table = _joined(copies, firsts)
    table.write_parquet(files / PASSAGES, compression="zstd")
    return {
        "candidates": found.height,
        "pairs_checked": copies.height,
        "units": int(firsts[-1] - firsts[first_new]),
        "passages": table.height,
        "chars": int((table["end"] - table["start"]).sum()),
    }


def _first_rows(shards: Sequence[SignedShard]) -> "npt.NDArray[np.int64]":
    import numpy as np

    return np.cumsum([0, *(signed.shard.rows for signed in shards)])


def _kept(signed: SignedShard) -> "npt.NDArray[np.bool_]":
    import numpy as np

    keep = signed.shard.keep
    return np.ones(signed.shard.rows, np.bool_) if keep is None else keep.to_numpy()


def _shared_anchors(
    shards: Sequence[SignedShard], firsts: "npt.NDArray[np.int64]", first_new: int
) -> "npt.NDArray[np.uint64]":
    """Anchors that several kept documents have, one of them new; sorted."""
    import numpy as np
    import polars as pl

    frames: list[pl.DataFrame] = []
    for signed, first in zip(shards, firsts, strict=False):
        anchors, ends = np.load(signed.signed / ANCHORS), np.load(signed.signed / ANCHOR_ENDS)
        rows = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
        is_kept = _kept(signed)[rows]
        frames.append(pl.DataFrame({"hash": anchors[is_kept], "owner": rows[is_kept] + first}))
    owner = pl.col("owner")
    groups = pl.concat(frames).group_by("hash").agg(least=owner.min(), most=owner.max())
    is_shared = (pl.col("least") != pl.col("most")) & (pl.col("most") >= first_new)
    return groups.filter(is_shared)["hash"].sort().to_numpy()


def _runs(
    shards: Sequence[SignedShard],
    firsts: "npt.NDArray[np.int64]",
    shared: "npt.NDArray[np.uint64]",
    settings: DedupConfig,
) -> "pl.DataFrame":
    """Every run with a shared anchor: hash, owner (number of the document), start, end."""
    import numpy as np
    import polars as pl

    from tasks.kernels import passages as kernel

    schema = {"hash": pl.UInt64, "owner": pl.Int64, "start": pl.UInt32, "end": pl.UInt32}
    frames: list[pl.DataFrame] = [pl.DataFrame(schema=schema)]
    for signed, first in zip(shards, firsts, strict=False):
        anchors, ends = np.load(signed.signed / ANCHORS), np.load(signed.signed / ANCHOR_ENDS)
        rows = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))
        meant = np.unique(rows[np.isin(anchors, shared)])
        meant = meant[_kept(signed)[meant]]
        if not len(meant):
            continue
        texts = texts_of(signed.shard).take(meant)
        hashes, where = kernel.runs(*text_buffers(texts), settings.passage_tokens, shared)
        columns = {"hash": hashes, "owner": meant[where[:, 0]] + first}
        columns |= {"start": where[:, 1], "end": where[:, 2]}
        frames.append(pl.DataFrame(columns, schema=schema))
    return pl.concat(frames)


def _joined(copies: "pl.DataFrame", firsts: "npt.NDArray[np.int64]") -> "pl.DataFrame":
    """Overlapping runs of a document as one passage, with the document that has its first run."""
    import numpy as np
    import polars as pl

    before = pl.col("end").cum_max().shift(1).over("owner")
    passages = (
        copies.with_columns(begins=(before.is_null() | (pl.col("start") > before)).cum_sum())
        .group_by("begins", maintain_order=True)
        .agg(pl.col("owner", "of", "start").first(), pl.col("end").max())
    )

    def named(column: str) -> "tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]":
        numbers = passages[column].to_numpy()
        shards = np.searchsorted(firsts, numbers, side="right") - 1
        return shards, numbers - firsts[shards]

    (shard, row), (of_shard, of_row) = named("owner"), named("of")
    columns = {"shard": shard, "row": row, "start": passages["start"], "end": passages["end"]}
    columns |= {"of_shard": of_shard, "of_row": of_row}
    return pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.UInt32))
