"""What a model is asked about a corpus' topics, and which answers are new: for documents and for questions."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conf.dedup import DedupConfig
from conf.synthesize import SynthesizeConfig
from storage.corpus import Corpus
from storage.topics import Topics
from tasks.completions import Answer, Endpoint
from tasks.near_duplicates import copies_among
from tasks.shard_batches import kept_batches, texts_at
from tasks.signatures import keys_of, sign_texts
from tasks.stage import Job

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Ask:
    """One question, and what it is about."""

    topic: int
    language: str
    prompt: str


def answers(
    job: Job, corpus: Corpus, topics: Topics, settings: SynthesizeConfig
) -> list[tuple[Ask, Answer]]:
    """Ask about the topics in turn; every answer that came, with its question, in order.

    Answers lie in the attempt's `state/` from the moment they come: a stage that was killed asks on. Once
    they are an artifact they are content: a forced rebuild asks anew and gives other bytes.
    """
    asks = questions(corpus, topics, settings)
    job.state.mkdir(parents=True, exist_ok=True)
    endpoint = Endpoint(settings, job.state)
    found, is_spent = endpoint.ask([ask.prompt for ask in asks])
    if is_spent:
        job.log.warning(
            "the budget was spent after %d of %d answers; raise max_requests or max_total_tokens for more",
            sum(answer is not None for answer in found),
            len(asks),
        )
    came = [(ask, answer) for ask, answer in zip(asks, found, strict=True) if answer]
    job.metrics |= {
        "model": settings.model,
        "host": endpoint.host,
        "asked": len(asks),
        "answered": len(came),
        "requests": sum(answer.requests for _, answer in came),
        "tokens": sum(answer.tokens for _, answer in came),
        "is_budget_spent": is_spent,
    }
    return came


def questions(corpus: Corpus, topics: Topics, settings: SynthesizeConfig) -> list[Ask]:
    """The prompts, a function of the corpus, its topics and the settings alone."""
    import numpy as np

    chosen = [
        (entry, language)
        for entry in topics.entries
        if (language := _language(entry)) in settings.prompts and entry["terms"]
    ]
    if not chosen:
        return []
    rounds = -(-settings.count // len(chosen))
    examples = _examples(corpus, topics, [entry["topic"] for entry, _ in chosen], rounds)
    asks: list[Ask] = []
    for number in range(settings.count):
        entry, language = chosen[number % len(chosen)]
        rng = np.random.default_rng([settings.seed, number])
        size = min(settings.terms, len(entry["terms"]))
        terms = [entry["terms"][i] for i in sorted(rng.permutation(len(entry["terms"]))[:size])]
        of_topic = examples[entry["topic"]]
        example = of_topic[(number // len(chosen) + settings.seed) % len(of_topic)]
        places = {
            "terms": ("、" if language == "zh" else ", ").join(terms),
            "example": example[: settings.example_chars],
        }
        prompt = re.sub(r"{(\w+)}", lambda m, p=places: p[m[1]], settings.prompts[language])
        asks.append(Ask(entry["topic"], language, prompt))
    return asks


def _language(entry: Mapping[str, Any]) -> str:
    """The language of most of a topic's documents."""
    counts: Counter[str] = Counter()
    for place, documents in entry["by"].items():
        counts[place.split("/")[0]] += documents
    return min(counts, key=lambda name: (-counts[name], name), default="")


def _examples(
    corpus: Corpus, topics: Topics, numbers: Sequence[int], wanted: int
) -> dict[int, list[str]]:
    """Of every topic so many texts, those with the smallest ids; at least one, if need be empty."""
    import polars as pl

    columns = {"topic": pl.UInt16, "doc_id": pl.UInt64, "shard": pl.UInt32, "row": pl.UInt32}
    best = pl.DataFrame(schema=columns)
    for shard in corpus.shards:
        frame = shard.read(["doc_id"])
        of_rows = topics.of_shard(shard.index).gather(frame["row"])
        frame = frame.with_columns(topic=of_rows).filter(pl.col("topic").is_in(numbers))
        every = pl.concat([best, frame.select(pl.col(n).cast(t) for n, t in columns.items())])
        best = every.sort("doc_id", "shard", "row").group_by("topic").head(wanted)
    texts = {
        (shard.index, row): text
        for shard in corpus.shards
        for row, text in texts_at(
            shard, best.filter(pl.col("shard") == shard.index)["row"].to_list()
        ).items()
    }
    found: dict[int, list[str]] = {number: [] for number in numbers}
    for topic, _, shard, row in best.sort("doc_id", "shard", "row").iter_rows():
        found[topic].append(texts[shard, row])
    return {number: of_topic or [""] for number, of_topic in found.items()}


def repeated(corpus: Corpus, texts: Sequence[str], threshold: float) -> list[bool]:
    """For each text whether it is a copy of a kept document, or of an earlier text that is none.

    Cost: the corpus is signed once, 100 MB/s; in memory are the texts and what may be like them.
    """
    import polars as pl

    settings = DedupConfig(threshold=threshold, least_recall=0.99)
    column = pl.Series(texts, dtype=pl.String)
    known = [set(keys.tolist()) for keys in keys_of(sign_texts(column, settings)[0], settings)]
    alike: list[str] = []
    for shard in corpus.shards if texts else ():
        for frame in kept_batches(shard, ["text"]):
            alike += _alike(frame["text"], known, settings)
    found = copies_among(pl.Series([*alike, *texts], dtype=pl.String), settings)
    return [of is not None for of in found[len(alike) :]]


def _alike(texts: "pl.Series", known: Sequence[set[int]], settings: DedupConfig) -> list[str]:
    """The texts that share a band of their signature with one that is known."""
    import numpy as np

    bands = keys_of(sign_texts(texts, settings)[0], settings)
    is_alike = np.zeros(len(texts), np.bool_)
    for keys, of_band in zip(bands, known, strict=True):
        is_alike |= np.isin(keys, np.fromiter(of_band, np.uint64, len(of_band)))
    return texts.filter(is_alike).to_list()
