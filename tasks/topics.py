"""What a corpus is about: documents as TF-IDF vectors, grouped by k-means."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from conf.topics import TopicsConfig
from storage.corpus import Corpus, Shard
from storage.topics import TOPICS, Topics, topics_path
from tasks.shard_batches import kept_batches, texts_at
from tasks.stage import Job, stage
from tasks.text_statistics import STOP_CHARACTERS, STOP_WORDS

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

BATCH_ROWS = 1000
SHOWN_TERMS = 12
DIGITS = 5
"""Centres are rounded after each round: the last bits of a matrix product differ between machines."""
_RUN = re.compile(r"[a-z]{3,}|[\u4e00-\u9fff\u3400-\u4dbf]+")


@stage(version=1)
def topics(job: Job, corpus: Corpus, settings: TopicsConfig) -> Topics:
    """Group the kept documents by the terms they have in common.

    reads Corpus   writes Topics   cost the first characters of every document once; memory: the
    sample's vectors (documents x terms x 4 bytes)

    A term is an English word of three letters and more, or two Chinese characters in a row. Vectors are
    (1 + ln tf) ln(n / df), of length 1 (Salton and Buckley 1988); groups by spherical k-means (Dhillon
    and Modha 2001), begun as k-means++ does.
    """
    sample = _sample(corpus.shards, settings)
    vocabulary, weights = _vocabulary(sample, settings)
    centres = _centres(_vectors(sample, vocabulary, weights), settings)
    counts: Counter[tuple[int, str]] = Counter()
    job.files.mkdir(parents=True, exist_ok=True)
    for shard in corpus.shards:
        _assign(job, shard, (vocabulary, weights, centres), settings, counts)
        job.report_progress(shard.index + 1, len(corpus.shards), "shards")
    entries = _entries(list(vocabulary), centres, counts)
    content = json.dumps(entries, ensure_ascii=False, indent=1)
    (job.files / TOPICS).write_text(content + "\n", "utf-8")
    job.metrics |= {"documents": counts.total(), "topics": len(entries), "terms": len(vocabulary)}
    job.tables["topics"] = [
        {"topic": e["topic"], "documents": e["documents"], "terms": " ".join(e["terms"])}
        for e in entries
    ]
    return Topics(job.path)


def terms_of(text: str) -> Iterator[str]:
    """The terms of a text, in order, repeats included."""
    for found in _RUN.finditer(text.lower()):
        run = found.group()
        if run[0] <= "z":
            if run not in STOP_WORDS:
                yield run
            continue
        for first, second in itertools.pairwise(run):
            if first not in STOP_CHARACTERS and second not in STOP_CHARACTERS:
                yield first + second


def _counted(texts: Sequence[str], settings: TopicsConfig) -> list[Counter[str]]:
    return [Counter(terms_of(text[: settings.document_chars])) for text in texts]


def _sample(shards: Sequence[Shard], settings: TopicsConfig) -> list[Counter[str]]:
    """Terms of the documents with the smallest ids: a sample that stays the same."""
    import polars as pl

    if not shards:
        return []
    chosen = shards[0].read(["doc_id"]).clear()
    for shard in shards:
        chosen = pl.concat([chosen, shard.read(["doc_id"])]).sort("doc_id", "shard", "row")
        chosen = chosen.head(settings.sample_documents)
    found: list[Counter[str]] = []
    for shard in shards:
        rows = chosen.filter(pl.col("shard") == shard.index)["row"].to_list()
        found += _counted([*texts_at(shard, rows).values()], settings)
    return found


def _vocabulary(
    sample: Sequence[Counter[str]], settings: TopicsConfig
) -> "tuple[dict[str, int], NDArray[np.float32]]":
    """Term -> column, and the weight ln(n / df) of every column."""
    import numpy as np

    frequency: Counter[str] = Counter(term for terms in sample for term in terms)
    most = max(2.0, settings.max_term_share * len(sample))
    usable = [(-n, term) for term, n in frequency.items() if 2 <= n <= most]
    chosen = sorted(usable)[: settings.terms]
    weights = np.log(len(sample) / np.array([-n for n, _ in chosen], np.float32))
    return {term: column for column, (_, term) in enumerate(chosen)}, weights.astype(np.float32)


def _vectors(
    documents: Sequence[Counter[str]],
    vocabulary: Mapping[str, int],
    weights: "NDArray[np.float32]",
) -> "NDArray[np.float32]":
    """(documents, terms), each row of length 1, or 0 where it holds no term."""
    import numpy as np

    vectors = np.zeros((len(documents), len(vocabulary)), np.float32)
    for row, terms in enumerate(documents):
        for term, count in terms.items():
            if (column := vocabulary.get(term)) is not None:
                vectors[row, column] = 1 + np.log(count)
    vectors *= weights
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=vectors, where=lengths > 0)


def _centres(vectors: "NDArray[np.float32]", settings: TopicsConfig) -> "NDArray[np.float32]":
    """(topics, terms): fewer topics than asked for where there are fewer different documents."""
    import numpy as np

    vectors = vectors[vectors.any(axis=1)]
    rng = np.random.default_rng(settings.seed)
    centres = _first_centres(vectors, settings.topics, rng)
    if not len(centres):
        return centres
    labels = np.zeros(0, np.int64)
    for _ in range(settings.rounds):
        before, labels = labels, (vectors @ centres.T).argmax(axis=1)
        if np.array_equal(before, labels):
            break
        for topic in range(len(centres)):
            if (members := labels == topic).any():
                mean = vectors[members].sum(axis=0)
                centres[topic] = np.round(mean / np.linalg.norm(mean), DIGITS)
    return centres


def _first_centres(
    vectors: "NDArray[np.float32]", wanted: int, rng: "np.random.Generator"
) -> "NDArray[np.float32]":
    """Documents far from one another: each is drawn by its squared distance to the nearest before."""
    import numpy as np

    chosen: list[int] = []
    distance = np.ones(len(vectors), np.float64)
    while len(chosen) < wanted and distance.sum() > 0:
        edges = np.cumsum(np.round(distance, DIGITS))
        if not edges[-1]:
            break
        chosen.append(int(np.searchsorted(edges, rng.random() * edges[-1], side="right")))
        nearness = vectors @ vectors[chosen[-1]]
        distance = np.minimum(distance, np.clip(2 - 2 * nearness.astype(np.float64), 0, None))
    return vectors[chosen].copy()


def _assign(
    job: Job,
    shard: Shard,
    model: "tuple[dict[str, int], NDArray[np.float32], NDArray[np.float32]]",
    settings: TopicsConfig,
    counts: "Counter[tuple[int, str]]",
) -> None:
    """Write the topic of every row of a shard, and count them by language and source."""
    import numpy as np
    import polars as pl

    vocabulary, weights, centres = model
    found: list[int | None] = [None] * shard.rows
    for batch in _small_batches(shard):
        vectors = _vectors(_counted(batch["text"].to_list(), settings), vocabulary, weights)
        nearest = (vectors @ centres.T).argmax(axis=1) if len(centres) else np.zeros(0, np.int64)
        for row, language, source, topic, vector in zip(
            batch["row"], batch["language"], batch["source"], nearest, vectors, strict=False
        ):
            if vector.any():
                found[row] = int(topic)
                counts[int(topic), f"{language}/{source}"] += 1
    column = pl.DataFrame({"topic": found}, schema={"topic": pl.UInt16})
    column.write_parquet(topics_path(job.files, shard.index), compression="zstd")


def _small_batches(shard: Shard) -> "Iterator[pl.DataFrame]":
    for frame in kept_batches(shard, ["text", "language", "source"]):
        yield from frame.iter_slices(BATCH_ROWS)


def _entries(
    terms: list[str], centres: "NDArray[np.float32]", counts: "Counter[tuple[int, str]]"
) -> list[dict[str, Any]]:
    """Per topic its heaviest terms and where its documents come from."""
    entries: list[dict[str, Any]] = []
    for topic, centre in enumerate(centres):
        heaviest = sorted(range(len(terms)), key=lambda i, c=centre: (-float(c[i]), terms[i]))
        by = {place: n for (number, place), n in sorted(counts.items()) if number == topic}
        entries.append(
            {
                "topic": topic,
                "terms": [terms[i] for i in heaviest[:SHOWN_TERMS] if centre[i] > 0],
                "documents": sum(by.values()),
                "by": by,
            }
        )
    return entries
