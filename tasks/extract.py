"""From raw files to documents: read, refuse, find the main text, normalise, tell the language."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from conf.extract import ExtractConfig
from storage.corpus import SHARD, Corpus, ShardEntry, ShardWriter, document_of
from storage.source import Source, SourceFile
from tasks.fanout import Part, PartItem, fan_out
from tasks.han import traditional_share
from tasks.language import HAN_SHARE, ScriptShares, languages_of, script_shares
from tasks.main_text import PageReader, page_reader
from tasks.normalise import normalise
from tasks.pieces import cut
from tasks.pii import mask
from tasks.raw_record import RawRecord, Refusal
from tasks.records import read_records
from tasks.rows import open_text
from tasks.stage import Job, stage
from tasks.url_rules import UrlRules, one_expression, write_blocked

REFUSED = "refused.parquet"
"""Beside a shard: `url` and `reason` of every record that became no document."""
EXAMPLES = 20
BATCH_PIECES = 256
BATCH_CHARS = 4_000_000
SHARD_VERSION = 4

UrlRulesOf = tuple[Path | None, tuple[str, ...], str | None]
"""What `UrlRules.open` takes: a compiled block list, words, an expression."""


@stage(version=4)
def extract(job: Job, settings: ExtractConfig) -> Corpus:
    """Make documents of raw files.

    reads raw files   writes Corpus   cost one part per file, only for files that are new
    """
    rules = (_compile_block_lists(job), settings.url_words, _url_expression(job))
    shards = _shards(job, settings)
    parts = fan_out(
        job,
        build_shard,
        [_item(shard, settings, job, rules) for shard in shards],
        version=SHARD_VERSION,
    )
    entries = [
        ShardEntry(part.fingerprint, part.digest, int(part.metrics["documents"]), landing, name)
        for part, (landing, name) in zip(
            parts, ((shard.landing, shard.name) for shard in shards), strict=True
        )
    ]
    Corpus.write_shards(job.files, entries, "extract")
    _report(job, shards, parts)
    return Corpus(job.path)


@dataclass(frozen=True)
class ShardPlan:
    """The files of one shard: one, or a bucket of small ones; of one landing and one spec."""

    landing: int
    files: tuple[SourceFile, ...]
    source: str

    @property
    def name(self) -> str:
        """Told by content, as the manifest is: a file that is renamed changes no byte."""
        digest = xxhash.xxh3_64_hexdigest("".join(file.digest for file in self.files).encode())
        return f"{self.source}-{digest[:8]}"


def _shards(job: Job, settings: ExtractConfig) -> list[ShardPlan]:
    """A shard per file or piece of a large one; small files of one spec and landing share shards, by a
    hash of the content."""
    plans: list[ShardPlan] = []
    for number, landing in enumerate(job.sources.get("sources", Source()).landings):
        groups: dict[tuple[int, str, int], list[SourceFile]] = {}
        pieces = cut(job, landing.files, settings.shard_bytes)
        for position, file in enumerate(pieces):
            groups.setdefault(_bucket(file, position, pieces, settings), []).append(file)
        for files in groups.values():
            plans.append(ShardPlan(number, tuple(files), source_name(settings, files[0])))
    return plans


def _bucket(
    file: SourceFile, position: int, files: Sequence[SourceFile], settings: ExtractConfig
) -> tuple[int, str, int]:
    kin = (file.spec_index, file.spec.domain)
    if not _is_small(file, settings):
        return *kin, -1 - position
    total = sum(
        other.size
        for other in files
        if (other.spec_index, other.spec.domain) == kin and _is_small(other, settings)
    )
    return *kin, int(file.digest, 16) % (1 + total // settings.bucket_bytes)


def _is_small(file: SourceFile, settings: ExtractConfig) -> bool:
    # Archives and tables keep a shard each, however small: they are what arrives day by day.
    is_single = file.format in ("html", "text", "markdown", "latex", "code")
    return is_single and file.size < settings.bucket_bytes // 4


def source_name(settings: ExtractConfig, file: SourceFile) -> str:
    """Name of a file's spec in the column `source`: its domain, numbered where it is not the first."""
    domain = file.spec.domain
    before = sum(spec.domain == domain for spec in settings.sources[: file.spec_index])
    return domain if before == 0 else f"{domain}-{before + 1}"


def _item(plan: ShardPlan, settings: ExtractConfig, job: Job, rules: UrlRulesOf) -> PartItem:
    # A piece says itself where it was cut.
    listed = {"sources", "block_lists", "url_expressions", "shard_bytes"}
    identity = {
        "files": [list(file.key[:2]) for file in plan.files],
        "spec": plan.files[0].spec.identity(),
        "source": plan.source,
        "settings": {k: v for k, v in settings.identity().items() if k not in listed},
        **{
            name: job.sources.get(name, Source()).identity()
            for name in ("block_lists", "url_expressions")
        },
    }
    return PartItem(identity, (plan, settings, rules), f"{plan.files[0].name} ({plan.name})")


def _compile_block_lists(job: Job) -> Path | None:
    source = job.sources.get("block_lists", Source())
    if not source.landings:
        return None
    job.state.mkdir(parents=True, exist_ok=True)
    path = job.state / "blocked.npy"
    lines = (line for file in source.files for line in _lines(file))
    job.metrics["blocked_entries"] = write_blocked(lines, path)
    return path


def _url_expression(job: Job) -> str | None:
    """One expression of all lists of them; none without any."""
    source = job.sources.get("url_expressions", Source())
    found = [one_expression(_lines(file), file.name) for file in source.files]
    return "|".join(filter(None, found)) or None


def _lines(file: SourceFile) -> Iterator[str]:
    with file.fetched() as path, open_text(path) as stream:
        yield from (line.decode("utf-8", "replace") for line in stream)


# One shard, in a worker process


def build_shard(
    files: Path, plan: ShardPlan, settings: ExtractConfig, url_rules: UrlRulesOf
) -> dict[str, Any]:
    """Write `shard.parquet` and `refused.parquet` of some files; returns counts."""
    reader = page_reader(
        settings.pages, settings.languages, wall_seconds=settings.page_wall_seconds
    )
    rules = UrlRules.open(*url_rules)
    counts = Counts()
    refused: list[Refusal] = []
    found = (
        piece
        for file in plan.files
        for record in _records(file, settings, rules)
        for piece in _pieces(record, file, settings, reader, counts)
    )
    with ShardWriter(files / SHARD) as writer:
        for batch in _batches(found):
            for document in _documents(batch, plan.source, settings):
                if isinstance(document, Refusal):
                    refused.append(document)
                else:
                    writer.append(document)
                    counts.add(document)
    _write_refused(files / REFUSED, refused)
    return counts.figures(refused, sum(file.size for file in plan.files))


@dataclass(frozen=True)
class Piece:
    """A text that may become a document, with the address that it gets."""

    text: str
    url: str
    file: SourceFile


def _batches(pieces: Iterator[Piece | Refusal]) -> Iterator[list[Piece | Refusal]]:
    """Neighbours, so many that telling their languages together pays and their memory does not matter."""
    batch: list[Piece | Refusal] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text) if isinstance(piece, Piece) else 0
        if len(batch) == BATCH_PIECES or chars > BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class Counts:
    """Figures of a shard while it is read."""

    def __init__(self) -> None:
        self.records = 0
        self.cheap_pages = 0
        self.chars = 0
        self.bytes = 0
        self.masked: Counter[str] = Counter()
        self.documents: Counter[tuple[str, str]] = Counter()

    def add(self, document: Mapping[str, Any]) -> None:
        """Count a document that is kept."""
        self.documents[document["language"], document["split"]] += 1
        self.chars += document["n_chars"]
        self.bytes += len(document["text"].encode("utf-8"))

    def figures(self, refused: Sequence[Refusal], raw_bytes: int) -> dict[str, Any]:
        """Plain JSON figures: records = documents + refused."""
        languages: Counter[str] = Counter()
        for (language, _), count in self.documents.items():
            languages[language] += count
        return {
            "records": self.records,
            "documents": self.documents.total(),
            "held": sum(n for (_, split), n in self.documents.items() if split == "held"),
            "raw_bytes": raw_bytes,
            "chars": self.chars,
            "bytes": self.bytes,
            "cheap_pages": self.cheap_pages,
            "languages": dict(sorted(languages.items())),
            "masked": dict(sorted(self.masked.items())),
            "refused": dict(sorted(Counter(refusal.reason for refusal in refused).items())),
        }


def _records(
    file: SourceFile, settings: ExtractConfig, rules: UrlRules
) -> Iterator[RawRecord | Refusal]:
    return read_records(
        file,
        text_documents=settings.text_documents,
        url_reason=rules.reason,
        max_page_bytes=settings.pages.max_bytes,
    )


def _pieces(
    record: RawRecord | Refusal,
    file: SourceFile,
    settings: ExtractConfig,
    reader: PageReader,
    counts: Counts,
) -> Iterator[Piece | Refusal]:
    """The pieces of a record's text; those after the first carry their number in the address."""
    counts.records += 1
    text = record if isinstance(record, Refusal) else _text_of(record, settings, reader, counts)
    if isinstance(text, Refusal):
        yield text
        return
    for number, piece in enumerate(pieces_of(text, settings)):
        url = f"{record.url}#piece-{number + 1}" if number else record.url
        yield Piece(piece, url, file) if piece else Refusal(url, "empty")


def _text_of(
    record: RawRecord, settings: ExtractConfig, reader: PageReader, counts: Counts
) -> str | Refusal:
    """The normalised text of a record; of a page, its main text."""
    if record.page is not None:
        page = reader.read(record.page, record.charset)
        if page.text is None:
            return Refusal(record.url, page.reason or "empty")
        counts.cheap_pages += page.is_cheap
        text = page.text
    else:
        text = record.text or ""
    if len(text) > settings.max_record_chars:
        return Refusal(record.url, "large")
    text = normalise(text, settings.normalise)
    if settings.mask_personal:
        text, masked = mask(text, settings.mask_personal)
        counts.masked.update(masked)
    return text or Refusal(record.url, "empty")


def pieces_of(text: str, settings: ExtractConfig) -> Iterator[str]:
    """The text whole, or cut into pieces of at most `max_document_chars`.

    A piece ends with a paragraph where its second half has such an end, else with a line, else anywhere.
    """
    limit = settings.max_document_chars or len(text)
    start = 0
    while len(text) - start > limit:
        ends = (text.rfind(mark, start + limit // 2, start + limit) for mark in ("\n\n", "\n"))
        end = next((found for found in ends if found > 0), start + limit)
        yield text[start:end].strip()
        start = end
    yield text[start:].strip()


def _documents(
    batch: Sequence[Piece | Refusal], source: str, settings: ExtractConfig
) -> Iterator[dict[str, Any] | Refusal]:
    """Rows of the pieces, in order; a piece in another language than those asked for is refused."""
    shares = {
        place: script_shares(piece.text)
        for place, piece in enumerate(batch)
        if isinstance(piece, Piece)
    }
    languages = _languages(batch, shares)
    for place, piece in enumerate(batch):
        if isinstance(piece, Refusal):
            yield piece
            continue
        language = languages[place]
        if settings.languages and language not in settings.languages:
            yield Refusal(piece.url, f"language:{language}")
            continue
        of_text, spec = shares[place], piece.file.spec
        yield document_of(
            piece.text,
            source=source,
            domain=spec.domain,
            url=normalise(piece.url, settings.normalise),
            language=language,
            han_share=of_text.han,
            latin_share=of_text.latin,
            traditional_share=traditional_share(piece.text) if of_text.han else 0.0,
            split=spec.split,
            held_share=settings.held_share,
        )


def _languages(
    batch: Sequence[Piece | Refusal], shares: Mapping[int, ScriptShares]
) -> dict[int, str]:
    """Languages by place: what the source says, else what the text looks like."""
    told: dict[int, str] = {}
    unsure: dict[int, str] = {}
    for place, piece in enumerate(batch):
        if isinstance(piece, Refusal):
            continue
        if piece.file.spec.language:
            told[place] = piece.file.spec.language
        # Words of a programming language are near English ones; a classifier says anything.
        elif piece.file.format == "code" and shares[place].han < HAN_SHARE:
            told[place] = "en"
        else:
            unsure[place] = piece.text
    found = languages_of([*unsure.values()], [shares[place] for place in unsure])
    return told | dict(zip(unsure, found, strict=True))


def _write_refused(path: Path, refused: Sequence[Refusal]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"url": refusal.url.encode("utf-8", "replace").decode("utf-8"), "reason": refusal.reason}
        for refusal in refused
    ]
    schema = pa.schema([("url", pa.string()), ("reason", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")


# Figures


def _report(job: Job, shards: Sequence[ShardPlan], parts: Sequence[Part]) -> None:
    figures = [part.metrics for part in parts]
    job.metrics |= _summed(figures)
    by_source: dict[str, list[dict[str, Any]]] = {}
    for shard, figure in zip(shards, figures, strict=True):
        by_source.setdefault(shard.source, []).append(figure)
    job.metrics["sources"] = {source: _summed(group) for source, group in by_source.items()}
    job.tables["sources"] = [
        {"source": source, **{k: v for k, v in figure.items() if not isinstance(v, dict)}}
        for source, figure in job.metrics["sources"].items()
    ]
    job.tables["refused"] = [
        {"reason": reason, "records": count}
        for reason, count in sorted(
            job.metrics["refused"].items(), key=lambda item: (-item[1], item[0])
        )
    ]
    job.tables["refused_examples"] = _refused_examples(parts)


def _summed(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    keys = ("records", "documents", "held", "raw_bytes", "chars", "bytes", "cheap_pages")
    total: dict[str, Any] = {key: sum(int(figure[key]) for figure in figures) for key in keys}
    for key in ("languages", "masked", "refused"):
        counter: Counter[str] = Counter()
        for figure in figures:
            counter.update(figure[key])
        total[key] = dict(sorted(counter.items()))
    return total


def _refused_examples(parts: Sequence[Part]) -> list[dict[str, str]]:
    """A few refused addresses per reason, the same ones every time."""
    import pyarrow.parquet as pq

    rng = random.Random(0)
    groups: dict[str, list[str]] = {}
    for part in parts:
        for row in pq.read_table(part.files / REFUSED).to_pylist():
            groups.setdefault(row["reason"], []).append(row["url"])
    return [
        {"reason": reason, "url": url}
        for reason, urls in sorted(groups.items())
        for url in rng.sample(urls, min(3, len(urls)))
    ]
