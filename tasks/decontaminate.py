"""Take out what overlaps with the exams in use, so that their figures mean something."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.decontaminate import DecontaminateConfig
from storage.corpus import Corpus, Shard, joined_spans
from storage.source import Source
from tasks.exam_questions import ExamText, read_exams
from tasks.fanout import Part, PartItem, fan_out
from tasks.held_overlap import held_overlaps
from tasks.shard_batches import texts_at
from tasks.stage import Job, stage
from tasks.text_statistics import batches, buffers, word_hashes

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

HITS = "hits.parquet"
HITS_VERSION = 2
WORDS_PER_HAN = 0.625
"""A Chinese word is about 1.6 characters."""
LISTED_HITS = 200


@stage(version=4)
def decontaminate(job: Job, corpus: Corpus, settings: DecontaminateConfig) -> Corpus:
    """Drop (or cut) documents that hold exam questions; drop held-out documents that training ones hold.

    reads Corpus, exam files   writes Corpus, `exam_hits.parquet` (every hit) and `held_hits.parquet`
    cost one pass over the words of every shard, another one with `held_overlap`
    """
    questions = list(read_exams(job.sources.get("exams", Source()), settings.fields))
    index = Index.of(questions, settings)
    shards = corpus.shards
    job.state.mkdir(parents=True, exist_ok=True)
    path = index.save(job.state / "exam_index.npz")
    parts = fan_out(
        job, build_hits, _items(job, corpus, shards, settings, path), version=HITS_VERSION
    )
    report = Report(questions, index)
    held = _held_hits(job, corpus, settings)
    frames = _without_held(shards, _decisions(shards, parts, settings, report), held)
    Corpus.write(job.files, corpus, frames, "decontaminate")
    held.write_parquet(job.files / "held_hits.parquet", compression="zstd")
    report.hits().write_parquet(job.files / "exam_hits.parquet", compression="zstd")
    report.dropped += held.height
    job.parts += [s.entry.part for s in shards if s.entry.part not in job.parts]
    report.write(job)
    return Corpus(job.path)


@dataclass(frozen=True)
class Index:
    """The runs of words to look for, hashed; each belongs to one question."""

    table: "NDArray[np.uint64]"
    owners: "NDArray[np.int32]"
    widths: "NDArray[np.int64]"
    """Lengths of the runs in words: the n-gram's, and those of the short questions."""
    how: tuple[str, ...]
    """Per question: `ngrams`, `whole` or `ignored` (too short, or a phrase that several share)."""

    @classmethod
    def of(cls, questions: Sequence[ExamText], settings: DecontaminateConfig) -> "Index":
        """Hash the n-grams of long questions and short questions as a whole."""
        import numpy as np

        from tasks.kernels import overlap

        alone = [np.array(word_hashes(q.question), np.uint64) for q in questions]
        seen = Counter(hashes.tobytes() for hashes in alone)
        keys: list[NDArray[np.uint64]] = []
        owners: list[NDArray[np.int32]] = []
        widths: set[int] = set()
        how: list[str] = []
        for number, (question, hashes) in enumerate(zip(questions, alone, strict=True)):
            whole = np.array(word_hashes(question.whole), np.uint64)
            is_long = len(whole) >= settings.ngram_words
            # A stem that several questions share ("which of these is right?") is no leak by itself.
            is_short = (
                len(hashes) < settings.ngram_words
                and _weight(question.question, len(hashes)) >= settings.short_min_words
                and seen[hashes.tobytes()] == 1
            )
            grams = [(whole, settings.ngram_words)] if is_long else []
            grams += [(hashes, len(hashes))] if is_short else []
            for words, width in grams:
                keys.append(overlap.gram_keys(words, width))
                owners.append(np.full(len(keys[-1]), number, np.int32))
                widths.add(width)
            how.append("ngrams" if is_long else "whole" if is_short else "ignored")
        return cls._filled(keys, owners, widths, tuple(how))

    @classmethod
    def _filled(
        cls,
        keys: "list[NDArray[np.uint64]]",
        owners: "list[NDArray[np.int32]]",
        widths: set[int],
        how: tuple[str, ...],
    ) -> "Index":
        import numpy as np

        from tasks.kernels import overlap

        all_keys = np.concatenate([np.zeros(0, np.uint64), *keys])
        all_owners = np.concatenate([np.zeros(0, np.int32), *owners])
        room = 1 << max(4, int(2 * len(all_keys)).bit_length())
        table, values = np.zeros(room, np.uint64), np.zeros(room, np.int32)
        overlap.fill(table, values, all_keys, all_owners)
        return cls(table, values, np.array(sorted(widths), np.int64), how)

    def save(self, path: Path) -> Path:
        """Write the arrays for the workers."""
        import numpy as np

        with path.open("wb") as stream:
            np.savez(stream, table=self.table, owners=self.owners, widths=self.widths)
        return path


def _weight(question: str, words: int) -> float:
    han = sum("\u3400" <= character <= "\u9fff" for character in question)
    return words - han + WORDS_PER_HAN * han


def _items(
    job: Job, corpus: Corpus, shards: Sequence[Shard], settings: DecontaminateConfig, index: Path
) -> list[PartItem]:
    exams = job.sources["exams"] if "exams" in job.sources else Source()
    has_cuts = any(shard.has_cuts for shard in shards)
    return [
        PartItem(
            identity={
                "text": shard.entry.digest,
                "cuts": [corpus.record.digest, shard.index] if has_cuts else None,
                "exams": exams.identity(),
                "specs": [spec.identity() for spec in settings.exams],
                "fields": list(settings.fields),
                "ngram_words": settings.ngram_words,
                "short_min_words": settings.short_min_words,
            },
            arguments=(shard, index),
            label=f"overlap of {shard.entry.name}",
        )
        for shard in shards
    ]


def build_hits(files: Path, shard: Shard, index: Path) -> dict[str, Any]:
    """Write `hits.parquet`: row, start and end (UTF-8 bytes of the text) and question of every hit."""
    import numpy as np
    import polars as pl

    from tasks.kernels import overlap

    with np.load(index, allow_pickle=False) as arrays:
        table, owners, widths = arrays["table"], arrays["owners"], arrays["widths"]
    found: list[NDArray[np.int64]] = [np.zeros((0, 4), np.int64)]
    first_row = 0
    for text, _ in batches(shard):
        content, offsets = buffers(text)
        rows = overlap.hits(content, offsets, widths, table, owners)
        rows[:, 0] += first_row
        found.append(rows)
        first_row += len(text)
    every = np.concatenate(found)
    frame = pl.DataFrame(
        {name: every[:, k] for k, name in enumerate(("row", "start", "end", "question"))}
    )
    files.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(files / HITS, compression="zstd")
    return {"hits": len(every), "rows": shard.rows}


# Decisions


def _decisions(
    shards: Sequence[Shard], parts: Sequence[Part], settings: DecontaminateConfig, report: "Report"
) -> Iterator["pl.DataFrame"]:
    import polars as pl

    for shard, part in zip(shards, parts, strict=True):
        kept = shard.decisions()["keep"].to_list()
        hits = [row for row in pl.read_parquet(part.files / HITS).iter_rows() if kept[row[0]]]
        report.add(shard, hits, sum(kept))
        keep, reason = [True] * shard.rows, [None] * shard.rows
        if settings.action == "drop" or not hits:
            _drop({hit[0]: hit for hit in reversed(hits)}, report, keep, reason)
            yield _frame(keep, reason)
        else:
            cuts = _cuts(shard, hits, settings)
            many = {row for row, spans in cuts.items() if len(spans) > settings.max_cuts}
            _drop({h[0]: h for h in reversed(hits) if h[0] in many}, report, keep, reason)
            spans = [cuts.get(row, []) if row not in many else [] for row in range(shard.rows)]
            yield _frame(keep, reason).with_columns(
                pl.Series(
                    "cuts",
                    spans,
                    dtype=pl.List(pl.Struct({"start": pl.UInt32, "end": pl.UInt32})),
                )
            )


def _held_hits(job: Job, corpus: Corpus, settings: DecontaminateConfig) -> "pl.DataFrame":
    """Held-out documents of which training documents hold too much; no rows where it is not asked."""
    import polars as pl

    names = ("shard", "row", "share", "of_shard", "of_row")
    if settings.held_overlap is None:
        return pl.DataFrame(schema={n: pl.Float64 if n == "share" else pl.UInt32 for n in names})
    found = held_overlaps(job, corpus, words=settings.ngram_words)
    hits = found.filter(pl.col("share") >= settings.held_overlap)
    held = sum(int((frame["split"] == "held").sum()) for frame in corpus.scan(["split"]))
    job.metrics["held"] = {"documents": held, "overlapping": found.height, "dropped": hits.height}
    job.tables["held_hits"] = hits.head(LISTED_HITS).to_dicts()
    return hits


def _without_held(
    shards: Sequence[Shard], frames: "Iterator[pl.DataFrame]", held: "pl.DataFrame"
) -> "Iterator[pl.DataFrame]":
    import polars as pl

    for shard, frame in zip(shards, frames, strict=True):
        rows = held.filter(pl.col("shard") == shard.index)["row"].to_list()
        hits = pl.Series([False] * shard.rows, dtype=pl.Boolean).scatter(rows, True)
        is_hit = frame["keep"] & hits
        reason = pl.when(is_hit).then(pl.lit("held_out:in_training")).otherwise(pl.col("reason"))
        yield frame.with_columns(keep=frame["keep"] & ~is_hit, reason=reason)


def _drop(
    rows: dict[int, tuple[int, ...]], report: "Report", keep: list[bool], reason: list[Any]
) -> None:
    for row, (_, _, _, question) in rows.items():
        keep[row], reason[row] = False, f"exam:{report.questions[question].exam}"
    report.dropped += len(rows)


def _frame(keep: list[bool], reason: list[Any]) -> "pl.DataFrame":
    import polars as pl

    return pl.DataFrame(
        {"keep": keep, "reason": reason}, schema={"keep": pl.Boolean, "reason": pl.String}
    )


def _cuts(
    shard: Shard, hits: Sequence[tuple[int, ...]], settings: DecontaminateConfig
) -> dict[int, list[dict[str, int]]]:
    """Spans to cut per row, in characters of the shard's own text."""
    texts = texts_at(shard, [*{hit[0] for hit in hits}])
    cuts: dict[int, list[dict[str, int]]] = {}
    margin = settings.cut_margin_chars
    for row, start, end, _ in hits:
        content = texts[row].encode("utf-8")
        first = len(content[:start].decode("utf-8"))
        last = first + len(content[start:end].decode("utf-8"))
        cuts.setdefault(row, []).append({"start": max(0, first - margin), "end": last + margin})
    return shard.uncut_spans({row: joined_spans(spans) for row, spans in cuts.items()})


# Figures


class Report:
    """Who overlaps with what."""

    def __init__(self, questions: Sequence[ExamText], index: Index) -> None:
        self.questions = questions
        self.dropped = 0
        self._index = index
        self._documents = 0
        self._hit_documents = 0
        self._by_exam: Counter[str] = Counter()
        self._listed: list[dict[str, Any]] = []
        self._hits: list[tuple[int, ...]] = []

    def add(self, shard: Shard, hits: Sequence[tuple[int, ...]], documents: int) -> None:
        """Count the hits of one shard."""
        self._hits += [(shard.index, *hit) for hit in hits]
        self._documents += documents
        pairs = list(dict.fromkeys((row, question) for row, _, _, question in hits))
        self._hit_documents += len({row for row, _ in pairs})
        self._by_exam.update(
            exam for _, exam in {(row, self.questions[question].exam) for row, question in pairs}
        )
        room = LISTED_HITS - len(self._listed)
        if pairs and room > 0:
            self._list(shard, pairs[:room])

    def hits(self) -> "pl.DataFrame":
        """Every hit in a kept document: where (in UTF-8 bytes of its text), exam and question."""
        import polars as pl

        names = ("shard", "row", "start", "end", "number")
        frame = pl.DataFrame(self._hits, dict.fromkeys(names, pl.UInt32), orient="row")
        questions = pl.DataFrame(
            {
                "exam": [question.exam for question in self.questions],
                "question": [question.question for question in self.questions],
            },
            {"exam": pl.String, "question": pl.String},
        ).with_row_index("number")
        return frame.join(questions, on="number", how="left", maintain_order="left").drop("number")

    def _list(self, shard: Shard, pairs: Sequence[tuple[int, int]]) -> None:
        frame = shard.read(["url", "domain"], kept_only=False)
        self._listed += [
            {
                "shard": shard.entry.name,
                "row": row,
                "domain": frame["domain"][row],
                "url": frame["url"][row],
                "exam": self.questions[question].exam,
                "question": self.questions[question].question[:200],
            }
            for row, question in pairs
        ]

    def write(self, job: Job) -> None:
        """Put figures and tables on the job."""
        exams: dict[str, dict[str, int]] = {}
        for question, how in zip(self.questions, self._index.how, strict=True):
            figures = exams.setdefault(
                question.exam, {"questions": 0, "ngrams": 0, "whole": 0, "ignored": 0}
            )
            figures["questions"] += 1
            figures[how] += 1
        for exam, figures in exams.items():
            figures["documents"] = self._by_exam[exam]
        job.metrics |= {
            "documents": self._documents,
            "kept": self._documents - self.dropped,
            "overlapping": self._hit_documents,
            "questions": len(self.questions),
            "ignored_questions": self._index.how.count("ignored"),
            "exams": exams,
        }
        job.tables["exams"] = [{"exam": exam, **figures} for exam, figures in exams.items()]
        job.tables["hits"] = self._listed
