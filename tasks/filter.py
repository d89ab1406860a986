"""Drop documents that are not worth training on: rules on statistics, explained rule by rule."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from conf.filter import FilterConfig, Rule
from storage.corpus import Corpus, Shard
from storage.source import Source
from tasks.fanout import Part, PartItem, fan_out
from tasks.kept_rows import text_digest
from tasks.length_outliers import carried_on, measured, with_sigmas, write_lengths
from tasks.line_cuts import line_cut_parts, read_line_cuts
from tasks.quality import (
    OWN,
    PERPLEXITY,
    QUALITY,
    bounds_of,
    by_source,
    quality_parts,
    read_scores,
    write_bounds,
)
from tasks.rows import open_text
from tasks.shard_batches import texts_at
from tasks.stage import Job, stage
from tasks.text_statistics import build_statistics, read_statistics

if TYPE_CHECKING:
    import polars as pl

EXAMPLES = "examples.json"
"""In `logs/`: dropped and borderline documents of every rule."""
EXCERPT_CHARS = 400
SHOWN_CHARS = 120
"""Of an example, in the tables for people."""
RULE_FIGURES = ("evaluated", "fires", "fires_alone", "first", "bytes_lost", "tokens_lost")
OUTLIER = "length_outlier"
LITTLE_LEFT = "little_left"
STATISTICS_VERSION = 5
TOKENS_PER_HAN = 0.7
TOKENS_PER_BYTE = 0.25
"""What a 32k vocabulary makes of Chinese characters and of other bytes, roughly."""


@stage(version=4)
def filter(  # noqa: A001 - the stage's word
    job: Job, corpus: Corpus, settings: FilterConfig, pinned: Corpus | None = None
) -> Corpus:
    """Drop documents that break a rule or whose length is far from their source's.

    reads Corpus   writes Corpus and `lengths.json`   cost statistics once per shard; bounds are
    applied in a second

    `pinned` is an earlier result, whose usual lengths stay in force: new shards then change no
    decision on old ones.
    """
    shards = corpus.shards
    parts = fan_out(
        job,
        build_statistics,
        _items(job, shards, settings),
        version=STATISTICS_VERSION,
    )
    rules = settings.rules()
    lengths = measured(_lengths(shards, parts, settings), settings.outlier_spread)
    if pinned is not None:
        lengths = carried_on(pinned, lengths, settings)
    scores = quality_parts(job, shards, settings)
    bounds = _bounds(job, shards, scores, settings, pinned)
    cuts = line_cut_parts(job, shards, settings)
    tally = Tally(rules, settings.examples)

    def keeps() -> Iterator["pl.DataFrame"]:
        for shard, part in zip(shards, parts, strict=True):
            frame = _frame(shard, part)
            _check_statistics(rules, frame.columns)
            if bounds is not None:
                frame = frame.hstack(read_scores(scores[shard.index])).join(
                    bounds, on="language", how="left", maintain_order="left"
                )
            if cuts:
                frame = frame.hstack(read_line_cuts(cuts[shard.index]))
            frame = _judged(frame, rules, lengths, settings)
            tally.add(shard, frame)
            yield frame.select("keep", "reason", *(["cuts"] if cuts else []))

    Corpus.write(job.files, corpus, keeps(), "filter")
    write_lengths(job.files, lengths, settings)
    job.parts += [s.entry.part for s in shards if s.entry.part not in job.parts]
    tally.report(job, shards)
    return Corpus(job.path)


def _items(job: Job, shards: Sequence[Shard], settings: FilterConfig) -> list[PartItem]:
    listed = job.sources.get("bad_words", Source())
    words = _bad_words(listed) if settings.bad_words else []
    return [
        PartItem(
            identity={
                "text": shard.entry.digest,
                "bad_words": listed.identity(),
                # Spans that an earlier stage cut change the text below the shard's digest.
                "cuts": text_digest(shard) or None,
            },
            arguments=(shard, words),
            label=f"statistics of {shard.entry.name}",
        )
        for shard in shards
    ]


def _bad_words(source: Source) -> list[str]:
    words: set[str] = set()
    for file in source.files:
        with file.fetched() as path, open_text(path) as stream:
            words |= {line.strip() for line in stream.read().decode("utf-8-sig").splitlines()}
    return sorted(words - {""})


def _bounds(
    job: Job,
    shards: Sequence[Shard],
    scores: Sequence[Part],
    settings: FilterConfig,
    pinned: Corpus | None,
) -> "pl.DataFrame | None":
    """Bounds of the scores, written and reported; none where nothing is scored."""
    if not scores:
        return None
    frames = [
        shard.read(["language", "source"], kept_only=False)
        .hstack(read_scores(part))
        .filter(shard.decisions()["keep"])
        .select("language", "source", "perplexity", "quality")
        for shard, part in zip(shards, scores, strict=True)
    ]
    bounds = bounds_of([frame.drop("source") for frame in frames], settings, pinned)
    write_bounds(job.files, bounds)
    if frames:
        job.tables["quality_by_source"] = by_source(frames)
    return bounds


# Judging


def _frame(shard: Shard, part: Part) -> "pl.DataFrame":
    columns = ["doc_id", "source", "domain", "language"]
    return (
        shard.read(columns, kept_only=False)
        .hstack(read_statistics(part.files))
        .hstack([shard.decisions()["keep"].alias("before")])
    )


def _lengths(
    shards: Sequence[Shard], parts: Sequence[Part], settings: FilterConfig
) -> "list[pl.DataFrame]":
    """Per shard: `language`, `source`, `chars` and how many `documents` that lengths are judged by have those."""
    import polars as pl

    return [
        _frame(shard, part)
        .filter(pl.col("before") & (pl.col("chars") >= max(1, settings.min_chars)))
        .group_by("language", "source", pl.col("chars").cast(pl.Int64))
        .agg(documents=pl.len().cast(pl.Int64))
        for shard, part in zip(shards, parts, strict=True)
    ]


def _judged(
    frame: "pl.DataFrame", rules: Sequence[Rule], lengths: "pl.DataFrame", settings: FilterConfig
) -> "pl.DataFrame":
    """With `e:RULE` (evaluated) and `f:RULE` (fires) per row, `reason`, `keep` and `fired`.

    Rules of one name in several languages share their columns: a row is in one language.
    """
    import polars as pl

    masks: dict[str, tuple[pl.Expr, pl.Expr]] = {}
    for rule in rules:
        evaluated = pl.col("before") & _applies(rule)
        fires = evaluated & _is_outside(rule)
        if rule.name in masks:
            earlier = masks[rule.name]
            evaluated, fires = earlier[0] | evaluated, earlier[1] | fires
        masks[rule.name] = (evaluated, fires)
    if settings.outlier_sigmas is not None:
        frame = with_sigmas(frame, lengths, settings)
        evaluated = pl.col("before") & pl.col("sigmas").is_not_null()
        masks[OUTLIER] = (evaluated, evaluated & (pl.col("sigmas") > settings.outlier_sigmas))
    masks |= _score_masks(frame.columns)
    if "left" in frame.columns:
        evaluated = pl.col("before") & (pl.col("left") < pl.col("chars"))
        masks[LITTLE_LEFT] = evaluated, evaluated & (pl.col("left") < max(1, settings.min_chars))
    frame = frame.with_columns(
        *(e.fill_null(value=False).alias(f"e:{name}") for name, (e, _) in masks.items()),
        *(f.fill_null(value=False).alias(f"f:{name}") for name, (_, f) in masks.items()),
    )
    reason = pl.coalesce(
        *(pl.when(pl.col(f"f:{name}")).then(pl.lit(name)) for name in masks),
        pl.lit(None, dtype=pl.String),
    )
    fired = pl.sum_horizontal(
        pl.lit(0, dtype=pl.UInt32), *(pl.col(f"f:{name}").cast(pl.UInt32) for name in masks)
    )
    return frame.with_columns(reason=reason, fired=fired).with_columns(
        keep=pl.col("before") & pl.col("reason").is_null()
    )


def _score_masks(columns: Sequence[str]) -> "dict[str, tuple[pl.Expr, pl.Expr]]":
    """Per rule on scores: evaluated, fires."""
    import polars as pl

    if "perplexity" not in columns:
        return {}
    fires = {
        PERPLEXITY: pl.col("perplexity") > pl.col("max_perplexity"),
        QUALITY: pl.col("quality") < pl.col("min_quality"),
        OWN: pl.col("is_dropped_by_own"),
    }
    before = pl.col("before")
    return {name: (before & fire.is_not_null(), before & fire) for name, fire in fires.items()}


def _check_statistics(rules: Sequence[Rule], known: Sequence[str]) -> None:
    """Raises ValueError for a rule on something that is not counted."""
    named = {name for rule in rules for name in (rule.statistic, *rule.needs)}
    if unknown := named - {*known}:
        numbers = sorted({*known} - {"doc_id", "source", "domain", "language", "before"})
        raise ValueError(
            f"filter: a rule is about {', '.join(sorted(unknown))}, which is not counted; "
            f"choose among {', '.join(numbers)}"
        )


def _applies(rule: Rule) -> "pl.Expr":
    import polars as pl

    applies = pl.col(rule.statistic).is_not_null()
    if rule.languages:
        applies &= pl.col("language").is_in(list(rule.languages))
    for statistic, least in rule.needs.items():
        applies &= pl.col(statistic) >= least
    return applies


def _is_outside(rule: Rule) -> "pl.Expr":
    import polars as pl

    outside = pl.lit(value=False)
    if rule.minimum is not None:
        outside |= pl.col(rule.statistic) < rule.minimum
    if rule.maximum is not None:
        outside |= pl.col(rule.statistic) > rule.maximum
    return outside


# Counting


@dataclass
class Tally:
    """Counts and examples of every rule, added up shard by shard."""

    rules: Sequence[Rule]
    examples: int
    counts: dict[tuple[str, str, str], dict[str, float]] = field(
        default_factory=dict[tuple[str, str, str], dict[str, float]]
    )
    """(rule, language, domain) -> figures."""
    totals: dict[tuple[str, str], dict[str, float]] = field(
        default_factory=dict[tuple[str, str], dict[str, float]]
    )
    """(language, domain) -> documents before and after."""
    chosen: dict[tuple[str, str], list[dict[str, Any]]] = field(
        default_factory=dict[tuple[str, str], list[dict[str, Any]]]
    )
    """(`dropped` or `borderline`, rule) -> rows, best first."""

    def add(self, shard: Shard, frame: "pl.DataFrame") -> None:
        """Count one judged shard."""
        import polars as pl

        han_bytes = 3 * pl.col("han")
        frame = frame.with_columns(
            shard=pl.lit(shard.index, dtype=pl.UInt32),
            tokens=TOKENS_PER_HAN * pl.col("han")
            + TOKENS_PER_BYTE * (pl.col("bytes").cast(pl.Int64) - han_bytes),
        )
        self._add_counts(frame)
        kept, dropped = frame.filter("keep").lazy(), frame.filter(~pl.col("keep")).lazy()
        plans = {("dropped", name): _sample(dropped, name) for name in self._names(frame)}
        for rule in self.rules:
            if any((rule.minimum, rule.maximum)):
                plans["borderline", rule.name] = _closest(kept, rule)
        # All at once: begun one by one, so many small queries would take longer than the counting.
        shortest = [plan.bottom_k(self.examples, by="order") for plan in plans.values()]
        for place, rows in zip(plans, pl.collect_all(shortest), strict=True):
            self._keep_examples(place, rows.sort("order", "row").to_dicts())

    @staticmethod
    def _names(frame: "pl.DataFrame") -> list[str]:
        return [name[2:] for name in frame.columns if name.startswith("f:")]

    def _add_counts(self, frame: "pl.DataFrame") -> None:
        import polars as pl

        is_alone = pl.col("fired") == 1
        aggregates: list[pl.Expr] = [
            pl.col("before").sum().alias("documents"),
            pl.col("keep").sum().alias("kept"),
            *(
                pl.col(name).filter(pl.col(keep)).sum().alias(f"{name}|{keep}")
                for name in ("bytes", "tokens")
                for keep in ("before", "keep")
            ),
        ]
        for name in self._names(frame):
            fires, is_first = pl.col(f"f:{name}"), pl.col("reason") == name
            aggregates += [
                pl.col(f"e:{name}").sum().alias(f"evaluated|{name}"),
                fires.sum().alias(f"fires|{name}"),
                (fires & is_alone).sum().alias(f"fires_alone|{name}"),
                is_first.sum().alias(f"first|{name}"),
                pl.col("bytes").filter(is_first).sum().alias(f"bytes_lost|{name}"),
                pl.col("tokens").filter(is_first).sum().alias(f"tokens_lost|{name}"),
            ]
        groups = frame.group_by(["language", "domain"], maintain_order=True).agg(aggregates)
        for row in groups.iter_rows(named=True):
            self._add_group(row)

    def _add_group(self, row: Mapping[str, Any]) -> None:
        place = (str(row["language"]), str(row["domain"]))
        total = self.totals.setdefault(place, {})
        for name, value in row.items():
            if name in ("language", "domain"):
                continue
            figure, _, rule = name.partition("|")
            if rule in ("", "before", "keep"):
                total[name] = total.get(name, 0) + (value or 0)
            else:
                counts = self.counts.setdefault((rule, *place), {})
                counts[figure] = counts.get(figure, 0) + (value or 0)

    def _keep_examples(self, place: tuple[str, str], rows: list[dict[str, Any]]) -> None:
        held = self.chosen.setdefault(place, [])
        held += rows
        held.sort(key=lambda row: (row["order"], row["shard"], row["row"]))
        del held[self.examples :]

    def report(self, job: Job, shards: Sequence[Shard]) -> None:
        """Write figures, tables and examples of the whole corpus to the job."""
        documents = sum(total["documents"] for total in self.totals.values())
        job.metrics |= {
            "documents": int(documents),
            "kept": int(sum(total["kept"] for total in self.totals.values())),
            "bytes": int(sum(t["bytes|before"] for t in self.totals.values())),
            "bytes_kept": int(sum(t["bytes|keep"] for t in self.totals.values())),
            "rules": {name: self._rule_figures(name) for name in self._rule_names()},
            "kept_by": {
                f"{language}/{domain}": {"documents": int(t["documents"]), "kept": int(t["kept"])}
                for (language, domain), t in sorted(self.totals.items())
            },
        }
        job.tables["rules"] = [
            {"rule": name, **{k: v for k, v in figures.items() if k != "by"}}
            for name, figures in job.metrics["rules"].items()
        ]
        job.tables["rules_by_domain"] = [
            {"rule": rule, "language": language, "domain": domain}
            | {name: round(group.get(name, 0)) for name in RULE_FIGURES}
            for (rule, language, domain), group in sorted(self.counts.items())
            if group.get("fires")
        ]
        job.tables["kept"] = [
            {"language": language, "domain": domain, "documents": int(t["documents"]),
             "kept": int(t["kept"]), "bytes": int(t["bytes|before"]),
             "bytes_kept": int(t["bytes|keep"]), "tokens_kept": round(t["tokens|keep"])}
            for (language, domain), t in sorted(self.totals.items())
        ]  # fmt: skip
        self._write_examples(job, shards)

    def _rule_names(self) -> list[str]:
        names = dict.fromkeys(rule.name for rule in self.rules)
        return [*names, *(n for n in dict.fromkeys(k[0] for k in self.counts) if n not in names)]

    def _rule_figures(self, name: str) -> dict[str, Any]:
        groups = {key[1:]: value for key, value in self.counts.items() if key[0] == name}
        return {
            **{f: round(sum(group.get(f, 0) for group in groups.values())) for f in RULE_FIGURES},
            "by": {
                f"{language}/{domain}": {f: round(group.get(f, 0)) for f in RULE_FIGURES}
                for (language, domain), group in sorted(groups.items())
                if group.get("fires")
            },
        }

    def _write_examples(self, job: Job, shards: Sequence[Shard]) -> None:
        content: dict[str, dict[str, list[dict[str, Any]]]] = {"dropped": {}, "borderline": {}}
        texts = _texts(shards, [row for rows in self.chosen.values() for row in rows])
        for (kind, rule), rows in sorted(self.chosen.items()):
            if rows:
                content[kind][rule] = [
                    {**row, "excerpt": texts[row["shard"], row["row"]][:EXCERPT_CHARS]}
                    for row in rows
                ]
        fired = content["dropped"].keys()
        for kind, of_kind in content.items():
            job.tables[f"{kind}_examples"] = [
                {"rule": rule, "language": row["language"], "domain": row["domain"]}
                | ({"value": round(row["value"], 4)} if "value" in row else {})
                | {"text": row["excerpt"][:SHOWN_CHARS]}
                for rule, rows in of_kind.items()
                for row in rows
                if rule in fired
            ]
        job.logs.mkdir(parents=True, exist_ok=True)
        (job.logs / EXAMPLES).write_text(
            json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8"
        )


def _sample(dropped: "pl.LazyFrame", rule: str) -> "pl.LazyFrame":
    """Documents that a rule dropped first, by their ids: a sample that stays the same."""
    import polars as pl

    columns = ["shard", "row", "language", "domain", pl.col("doc_id").alias("order")]
    return dropped.filter(pl.col("reason") == rule).select(columns)


def _closest(kept: "pl.LazyFrame", rule: Rule) -> "pl.LazyFrame":
    """Kept documents near a bound of the rule, `order` being the relative distance."""
    import polars as pl

    value = pl.col(rule.statistic).cast(pl.Float64)
    bounds = [bound for bound in (rule.minimum, rule.maximum) if bound]
    distance = pl.min_horizontal(*((value - bound).abs() / abs(bound) for bound in bounds))
    columns = ["shard", "row", "language", "domain", value.alias("value"), distance.alias("order")]
    return kept.filter(_applies(rule)).select(columns).filter(pl.col("order") < 1)


def _texts(
    shards: Sequence[Shard], rows: Sequence[Mapping[str, Any]]
) -> dict[tuple[int, int], str]:
    wanted: dict[int, set[int]] = {}
    for row in rows:
        wanted.setdefault(row["shard"], set()).add(row["row"])
    found: dict[tuple[int, int], str] = {}
    for index, places in wanted.items():
        texts = texts_at(shards[index], [*places])
        found |= {(index, place): text for place, text in texts.items()}
    return found
