"""Documents: text written once, in shards; every later stage adds keep bits, row by row.

A shard is a part artifact (`files/shard.parquet`). A corpus names its shards in
`files/manifest.json`; one that a later stage derived also holds, for each shard, a row-aligned
`files/keep-00000.parquet`: `keep` (cumulative over all stages), `reason` (why this stage dropped
the row) and, where spans were removed, `cuts` (cumulative, in characters of the shard's text).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import xxhash

from storage.artifact import Artifact

if TYPE_CHECKING:
    import polars as pl

MANIFEST = "manifest.json"
SHARD = "shard.parquet"
ROW_GROUP_ROWS = 65_536
ROW_GROUP_CHARS = 1 << 24
"""A row group ends here too, so that writing one never holds more than some 50 MB of text."""
DOCUMENT_COLUMNS = (
    "doc_id",
    "source",
    "domain",
    "url",
    "language",
    "han_share",
    "latin_share",
    "traditional_share",
    "n_chars",
    "text_hash",
    "text",
    "split",
)


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the manifest names it."""

    part: str
    """Fingerprint of the part artifact that holds the text."""
    digest: str
    rows: int
    landing: int
    """Index of the landing its file came with; shards never span landings."""
    name: str
    """What it was made from; for people."""


@dataclass(frozen=True)
class Shard:
    """One shard of a corpus: the text of its part, and this corpus' keep bits."""

    entry: ShardEntry
    index: int
    part_path: Path
    keep_path: Path | None
    """None for a corpus that has dropped nothing yet."""

    @property
    def rows(self) -> int:
        """Documents, dropped ones included."""
        return self.entry.rows

    @property
    def landing(self) -> int:
        """Index of the landing."""
        return self.entry.landing

    @property
    def text_path(self) -> Path:
        """The Parquet file of the documents."""
        return self.part_path / "files" / SHARD

    @property
    def keep(self) -> "pl.Series | None":
        """Boolean per row, cumulative; None when every row is kept."""
        return None if self.keep_path is None else self.decisions()["keep"]

    @property
    def has_cuts(self) -> bool:
        """Whether spans were taken out of its texts."""
        import polars as pl

        return self.keep_path is not None and "cuts" in pl.read_parquet_schema(self.keep_path)

    def decisions(self) -> "pl.DataFrame":
        """The keep file: `keep`, `reason` and, where there are some, `cuts`; all kept without one."""
        import polars as pl

        if self.keep_path is not None:
            return pl.read_parquet(self.keep_path)
        return pl.DataFrame(
            {"keep": [True] * self.rows, "reason": [None] * self.rows},
            schema={"keep": pl.Boolean, "reason": pl.String},
        )

    def read(
        self,
        columns: Sequence[str] | None = None,
        *,
        kept_only: bool = True,
        is_cut: bool = True,
    ) -> "pl.DataFrame":
        """The documents with `shard` and `row` added, in order; all columns by default.

        `is_cut` takes removed spans out of `text`; without it positions are those of the shard.
        """
        import polars as pl

        frame = pl.read_parquet(self.text_path, columns=list(columns or DOCUMENT_COLUMNS))
        if frame.height != self.rows:
            raise ValueError(
                f"{self.text_path}: {frame.height} rows found, the manifest says {self.rows}; "
                f"run `bessemer verify --full` and build the corpus again"
            )
        frame = frame.with_row_index("row").with_columns(
            pl.lit(self.index, dtype=pl.UInt32).alias("shard")
        )
        if self.keep_path is None:
            return frame
        decisions = self.decisions()
        if is_cut and "text" in frame.columns and "cuts" in decisions.columns:
            texts = [
                without_spans(text, cuts) if cuts else text
                for text, cuts in zip(frame["text"], decisions["cuts"].to_list(), strict=True)
            ]
            frame = frame.with_columns(pl.Series("text", texts, dtype=pl.String))
        return frame.filter(decisions["keep"]) if kept_only else frame

    def uncut_spans(
        self, spans: Mapping[int, Sequence[Mapping[str, int]]]
    ) -> dict[int, list[dict[str, int]]]:
        """Spans of rows' cut texts as spans of the shard's own texts.

        One that reaches over an earlier cut covers it; one beyond the end of the text ends there.
        """
        lengths = self.read(["n_chars"], kept_only=False)["n_chars"]
        before = self.decisions()["cuts"] if self.has_cuts else None

        def uncut(row: int, span: Mapping[str, int]) -> dict[str, int]:
            cuts = [] if before is None else before[row].to_list()
            end = min(_uncut(span["end"] - 1, cuts) + 1, int(lengths[row]))
            return {"start": _uncut(span["start"], cuts), "end": end}

        return {row: [uncut(row, span) for span in of_row] for row, of_row in spans.items()}


@dataclass(frozen=True)
class Corpus(Artifact):
    """An ordered list of shards of documents, and which of their rows are kept."""

    kind: ClassVar[str] = "corpus"

    @property
    def shards(self) -> list[Shard]:
        """Every shard in order: landings in order of arrival, files in order within a landing."""
        manifest = json.loads((self.files / MANIFEST).read_text("utf-8"))
        return [
            self._shard(index, ShardEntry(**entry))
            for index, entry in enumerate(manifest["shards"])
        ]

    @property
    def stage(self) -> str:
        """Name of the stage that made this corpus: the one that the reasons speak for."""
        return str(json.loads((self.files / MANIFEST).read_text("utf-8"))["stage"])

    def scan(
        self,
        columns: Sequence[str] | None = None,
        *,
        kept_only: bool = True,
        is_cut: bool = True,
    ) -> "Iterator[pl.DataFrame]":
        """One frame per shard, empty ones too, with the columns `shard` and `row` added."""
        for shard in self.shards:
            yield shard.read(columns, kept_only=kept_only, is_cut=is_cut)

    def documents(self, *, kept_only: bool = True) -> Iterator[dict[str, Any]]:
        """Every document as a dict of its columns, with `shard` and `row`."""
        for frame in self.scan(kept_only=kept_only):
            yield from frame.iter_rows(named=True)

    def dropped(self, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Documents that this stage dropped, with `reason`, uncut; at most `limit`."""
        found = 0
        for shard in self.shards:
            if shard.keep_path is None:
                continue
            reasons = shard.decisions()["reason"]
            frame = shard.read(kept_only=False, is_cut=False).with_columns(reasons)
            for document in frame.filter(reasons.is_not_null()).iter_rows(named=True):
                if limit is not None and found >= limit:
                    return
                found += 1
                yield document

    @staticmethod
    def write_shards(files: Path, shards: Sequence[ShardEntry], stage: str) -> None:
        """Write the manifest of a corpus that keeps every row of its shards."""
        files.mkdir(parents=True, exist_ok=True)
        manifest = {"shards": [asdict(shard) for shard in shards], "stage": stage}
        (files / MANIFEST).write_text(
            json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", "utf-8"
        )

    @classmethod
    def write(
        cls,
        files: Path,
        upstream: Self,
        keeps: "Sequence[pl.DataFrame] | Iterable[pl.DataFrame]",
        stage: str,
    ) -> None:
        """Write the manifest and the keep files of a corpus derived from `upstream`.

        One frame per shard, row by row: `keep`, `reason` (text where this stage drops, else null)
        and optionally `cuts` (list of structs `start`, `end`, in characters of the shard's own
        text). Rows that were dropped before stay dropped, without a reason of this stage; cuts are
        joined with earlier ones. The caller lists the same parts in `job.parts`.

        Raises ValueError if frames and shards do not fit.
        """
        shards = upstream.shards
        cls.write_shards(files, [shard.entry for shard in shards], stage)
        for shard, keep in zip(shards, keeps, strict=True):
            if keep.height != shard.rows:
                raise ValueError(
                    f"{shard.entry.name}: {keep.height} decisions for {shard.rows} rows; "
                    f"give one for every row, dropped rows included"
                )
            _write_parquet(_cumulative(shard, keep), files / f"keep-{shard.index:05d}.parquet")

    def _shard(self, index: int, entry: ShardEntry) -> Shard:
        keep = self.files / f"keep-{index:05d}.parquet"
        return Shard(
            entry=entry,
            index=index,
            part_path=self.path.parent / entry.part,
            keep_path=keep if keep.exists() else None,
        )


class ShardWriter:
    """Writes documents to one Parquet file, a row group at a time; a context manager."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.rows = 0
        self._schema = shard_schema()
        self._pending: list[Mapping[str, Any]] = []
        self._pending_chars = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(
            path,
            self._schema,
            compression="zstd",
            compression_level=3,
            # The inferred type knows only the default, a bool.
            use_dictionary=["source", "domain", "language", "split"],  # pyright: ignore[reportArgumentType]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._writer.close()

    def append(self, document: Mapping[str, Any]) -> None:
        """Add a document: every column, or those of `document_of` and nothing else."""
        self._pending.append(document)
        self._pending_chars += len(document["text"])
        self.rows += 1
        if len(self._pending) >= ROW_GROUP_ROWS or self._pending_chars >= ROW_GROUP_CHARS:
            self._flush()

    def _flush(self) -> None:
        import polars as pl

        # pyarrow's own way from lists is slower, and imports pandas.
        kinds = {"uint64": pl.UInt64, "uint32": pl.UInt32, "float": pl.Float32}
        if self._pending:
            columns = [
                pl.Series(
                    field.name,
                    [document[field.name] for document in self._pending],
                    kinds.get(str(field.type), pl.String),
                )
                for field in self._schema
            ]
            table = pl.DataFrame(columns).to_arrow(compat_level=pl.CompatLevel.oldest())
            self._writer.write_table(table.cast(self._schema))
        self._pending, self._pending_chars = [], 0


def document_of(
    text: str,
    *,
    source: str,
    domain: str = "default",
    url: str = "",
    language: str = "",
    han_share: float = 0.0,
    latin_share: float = 0.0,
    traditional_share: float = 0.0,
    split: str = "auto",
    held_share: float = 0.02,
) -> dict[str, Any]:
    """A row of a shard. Its id is a hash of address and text; the id alone decides the split.

    `split` is `auto`, or `train` / `held` where the source says so. Copies of a text at one address
    share an id; copies at two addresses do not, dedup finds them.
    """
    text_bytes = text.encode("utf-8")
    doc_id = xxhash.xxh3_64_intdigest(url.encode("utf-8") + b"\0" + text_bytes)
    return {
        "doc_id": doc_id,
        "source": source,
        "domain": domain,
        "url": url,
        "language": language,
        "han_share": han_share,
        "latin_share": latin_share,
        "traditional_share": traditional_share,
        "n_chars": len(text),
        "text_hash": xxhash.xxh3_64_intdigest(text_bytes),
        "text": text,
        "split": split_of(doc_id, held_share) if split == "auto" else split,
    }


def split_of(doc_id: int, held_share: float) -> str:
    """`held` for a share of all ids, `train` for the others; a pure function of the id."""
    # Hashed once more: the id itself orders other things (samples, buckets).
    position = xxhash.xxh3_64_intdigest(doc_id.to_bytes(8, "little"), seed=1) / 2**64
    return "held" if position < held_share else "train"


def shard_schema() -> Any:
    """Columns of a shard, in order, as a `pyarrow.Schema` (which has no types of its own)."""
    import pyarrow as pa

    kinds = (
        pa.uint64(),
        pa.string(),
        pa.string(),
        pa.string(),
        pa.string(),
        pa.float32(),
        pa.float32(),
        pa.float32(),
        pa.uint32(),
        pa.uint64(),
        pa.large_string(),
        pa.string(),
    )
    return pa.schema(
        [
            pa.field(name, kind, nullable=False)
            for name, kind in zip(DOCUMENT_COLUMNS, kinds, strict=True)
        ]
    )


def without_spans(text: str, spans: Sequence[Mapping[str, int]]) -> str:
    """The text without the characters of sorted, disjoint spans `start` <= i < `end`."""
    kept: list[str] = []
    position = 0
    for span in spans:
        kept.append(text[position : span["start"]])
        position = span["end"]
    kept.append(text[position:])
    return "".join(kept)


def joined_spans(spans: Iterable[Mapping[str, int]]) -> list[dict[str, int]]:
    """Sorted, disjoint spans that cover the same characters; touching ones become one."""
    joined: list[dict[str, int]] = []
    for span in sorted(spans, key=lambda span: (span["start"], span["end"])):
        if joined and span["start"] <= joined[-1]["end"]:
            joined[-1]["end"] = max(joined[-1]["end"], span["end"])
        elif span["start"] < span["end"]:
            joined.append({"start": span["start"], "end": span["end"]})
    return joined


def _uncut(position: int, cuts: Sequence[Mapping[str, int]]) -> int:
    for cut in cuts:
        if cut["start"] <= position:
            position += cut["end"] - cut["start"]
    return position


def _cumulative(shard: Shard, keep: "pl.DataFrame") -> "pl.DataFrame":
    import polars as pl

    before = shard.decisions()
    frame = pl.DataFrame(
        {
            "keep": before["keep"] & keep["keep"],
            "reason": keep["reason"].cast(pl.String),
        }
    ).with_columns(pl.when(before["keep"]).then(pl.col("reason")).alias("reason"))
    sources = [item["cuts"].to_list() for item in (before, keep) if "cuts" in item.columns]
    if not sources:
        return frame
    joined = [
        joined_spans(span for cuts in of_row if cuts for span in cuts)
        for of_row in zip(*sources, strict=True)
    ]
    spans = pl.List(pl.Struct({"start": pl.UInt32, "end": pl.UInt32}))
    return frame.with_columns(pl.Series("cuts", joined, dtype=spans))


def _write_parquet(frame: "pl.DataFrame", path: Path) -> None:
    frame.write_parquet(path, compression="zstd", row_group_size=ROW_GROUP_ROWS)
