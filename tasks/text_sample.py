"""A bounded, language-balanced, seeded sample of a corpus, and of conversations."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conf.tokenizer import TokenizerConfig
from storage.conversations import Conversations
from storage.corpus import Corpus
from tasks.shard_batches import kept_batches, texts_at

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Sample:
    """Texts to learn from."""

    texts: list[str]
    bytes: dict[str, int]
    """UTF-8 bytes taken per language; conversations under `conversations/<language>`."""


def sample_texts(
    corpus: Corpus, conversations: Conversations | None, settings: TokenizerConfig
) -> Sample:
    """The sample: kept documents of the training split, in pieces, in order of the corpus.

    Each piece has a place in a random order that depends on its document's id and the seed alone; a
    language's share is filled in that order. Held-out documents and conversations are never taken.
    """
    share = settings.conversations_share if conversations else 0.0
    spoken, of_spoken = _conversations(conversations, settings, int(share * settings.sample_bytes))
    budget = settings.sample_bytes - sum(of_spoken.values())
    written, of_written = _documents(corpus, settings, budget)
    return Sample(written + spoken, of_written | of_spoken)


def shares(totals: Mapping[str, int], budget: int, balance: str) -> dict[str, int]:
    """Bytes to take per group: equal as far as a group has them, or in proportion to the groups."""
    whole = sum(totals.values())
    if balance == "natural":
        return {name: min(total, budget * total // max(whole, 1)) for name, total in totals.items()}
    taken: dict[str, int] = {}
    for left, (name, total) in zip(
        range(len(totals), 0, -1), sorted(totals.items(), key=lambda item: item[1]), strict=True
    ):
        taken[name] = min(total, (budget - sum(taken.values())) // left)
    return taken


def _documents(
    corpus: Corpus, settings: TokenizerConfig, budget: int
) -> tuple[list[str], dict[str, int]]:
    import polars as pl

    totals: Counter[str] = Counter()
    chosen: pl.DataFrame | None = None
    for shard in corpus.shards:
        for frame in kept_batches(shard, ["doc_id", "language", "split", "text"]):
            numbered = frame.with_columns(shard=pl.lit(shard.index, pl.UInt32))
            pieces = _pieces(numbered, settings)
            totals.update(dict(pieces.group_by("language").agg(pl.col("bytes").sum()).iter_rows()))
            # No language gets more than the whole budget: what lies behind it need not be remembered.
            chosen = pieces if chosen is None else pl.concat([chosen, pieces])
            chosen = _first(chosen, dict.fromkeys(totals, budget))
    if chosen is None or chosen.is_empty():
        return [], {}
    chosen = _first(chosen, shares(totals, budget, settings.balance)).sort("shard", "row", "piece")
    taken = dict(
        chosen.group_by("language").agg(pl.col("bytes").sum()).sort("language").iter_rows()
    )
    return list(_texts_of(corpus, chosen, settings.chunk_chars)), taken


def _pieces(documents: "pl.DataFrame", settings: TokenizerConfig) -> "pl.DataFrame":
    """One row per piece of a training document, without its text."""
    import polars as pl

    measured = documents.filter(pl.col("split") == "train").select(
        "shard",
        "row",
        "doc_id",
        "language",
        bytes=pl.col("text").str.len_bytes().cast(pl.Int64),
        pieces=(pl.col("text").str.len_chars() / settings.chunk_chars).ceil().cast(pl.Int64),
    )
    pieces = (
        measured.filter(pl.col("pieces") > 0)
        .with_columns(
            piece=pl.int_ranges(0, pl.col("pieces")), bytes=pl.col("bytes") // pl.col("pieces")
        )
        .explode("piece")
    )
    ids, numbers = pieces["doc_id"].to_numpy(), pieces["piece"].to_numpy()
    order = _order(ids, numbers, settings.sample_seed)
    return pieces.select("shard", "row", "piece", "language", "bytes", pl.Series("order", order))


def _order(ids: Any, pieces: Any, seed: int) -> Any:
    """A random uint64 per piece, a pure function of its document's id, its number and the seed.

    Source: Steele, Lea and Flood 2014 (splitmix64's finalizer).
    """
    import numpy as np

    x = ids.astype(np.uint64) ^ np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    x = x + (pieces.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _first(pieces: "pl.DataFrame", wanted: Mapping[str, int]) -> "pl.DataFrame":
    """The pieces that fill every language's share of bytes, in their random order."""
    import polars as pl

    ordered = pieces.sort("order", "shard", "row", "piece").with_columns(
        before=pl.col("bytes").cum_sum().over("language") - pl.col("bytes"),
        wanted=pl.col("language").replace_strict(dict(wanted), default=0, return_dtype=pl.Int64),
    )
    return ordered.filter(pl.col("before") < pl.col("wanted")).drop("before", "wanted")


def _texts_of(corpus: Corpus, chosen: "pl.DataFrame", chunk_chars: int) -> Iterator[str]:
    shards = corpus.shards
    for (index,), pieces in chosen.group_by("shard", maintain_order=True):
        texts = texts_at(shards[int(index)], pieces["row"].unique().to_list())
        for row, piece in pieces.select("row", "piece").iter_rows():
            yield texts[row][piece * chunk_chars : (piece + 1) * chunk_chars]


def _conversations(
    conversations: Conversations | None, settings: TokenizerConfig, budget: int
) -> tuple[list[str], dict[str, int]]:
    if conversations is None or not budget:
        return [], {}
    import xxhash

    found: dict[str, list[tuple[int, str]]] = {}
    for row in conversations.rows("train"):
        text = "\n".join(message["content"] for message in row["messages"])
        place = xxhash.xxh3_64_intdigest(row["id"].encode("utf-8"), settings.sample_seed % 2**64)
        found.setdefault(f"conversations/{row['language']}", []).append((place, text))
    sizes = {
        name: sum(len(text.encode("utf-8")) for _, text in rows) for name, rows in found.items()
    }
    texts: list[str] = []
    taken: dict[str, int] = {}
    for name, wanted in sorted(shares(sizes, budget, settings.balance).items()):
        taken[name] = 0
        for _, text in sorted(found[name]):
            if taken[name] >= wanted:
                break
            texts.append(text)
            taken[name] += len(text.encode("utf-8"))
    return texts, taken
