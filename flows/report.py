"""The report of a run: one self-contained page, made from the records alone; a failed run has one too."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from conf.contract import METRICS
from flows import alignment_page, charts, drawing
from flows.headlines import headlines
from flows.page_parts import (
    Detail,
    Exact,
    Section,
    Table,
    blank,
    flat,
    read_metrics,
    series_of,
    shown_answer,
    stage_tables,
    write_page,
)
from flows.runs import RunRecord, StageRecord
from storage.scores import Figure, Scores
from storage.store import Store

CURVES = (
    ("loss", "nats", False),
    ("held_loss", "nats", False),
    ("lr", "", False),
    ("gradient_norm", "", True),
    ("tokens_per_second", "", False),
)
TITLES = {"lr": "learning rate", "kl": "KL to the reference"}
LEARNT = (
    " Train is the model on training documents: where it is far lower, they are learnt by heart."
)
RATING_PAGE = "rate.html"
SHOWN_PROMPTS, MOST_PROMPTS = 12, 60
CORPUS_STAGES = ("extract", "filter", "dedup", "decontaminate")


def write_report(run_dir: Path, store: Store) -> Path:
    """Write `report.html` into the folder of a run, from its record and the artifacts it names."""
    run = RunRecord.read(run_dir)
    paths = {
        name: path
        for name, stage in run.stages.items()
        if stage.fingerprint and (path := store.find(stage.fingerprint)) is not None
    }
    scores = {
        name: Scores(path).figures() for name, path in paths.items() if _kind(run, name) == "scores"
    }
    sections = [
        _errors(run),
        _effects(run, paths),
        _graph(run),
        _corpus(run),
        _tokens(run),
        *_training(run, paths),
        _language_model(alignment_page.without_changes(run, scores)),
        _exams(scores),
        _checkpoints(run, paths),
        alignment_page.before_and_after(run, scores),
        _judged(run, paths, scores, run_dir),
        _samples(run, paths),
        _scores(scores),
        _costs(run),
    ]
    title = f"{run.recipe}: {_verdict(run)}"
    return write_page(run_dir / "report.html", title, _subtitle(run), sections)


def _kind(run: RunRecord, name: str) -> str | None:
    return run.stages[name].kind


def _verdict(run: RunRecord) -> str:
    failed = [name for name, stage in run.stages.items() if stage.status == "failed"]
    if failed:
        return f"{', '.join(failed)} failed"
    return "cancelled" if run.status == "cancelled" else "finished"


def _subtitle(run: RunRecord) -> str:
    hits = sum(stage.status == "hit" for stage in run.stages.values())
    seconds = sum(stage.seconds for stage in run.stages.values() if stage.status == "built")
    return (
        f"run {run.run_id}, started {run.started}: {len(run.stages)} stages, {hits} from the store, "
        f"{seconds:,.0f} s of work"
    )


def _effects(run: RunRecord, paths: Mapping[str, Path]) -> Section:
    """The figures that the stages themselves call telling."""
    section = Section(
        "effects",
        "What every stage did",
        "Measured on held-out truth; each figure with its 95 % interval, its number of trials n and, "
        "where there is one, the level of chance.",
    )
    rows: list[Sequence[Any]] = []
    for item in headlines(run, paths):
        figure = item.figure
        interval = f"{figure.low:.3f} to {figure.high:.3f}"
        node = "" if any(row[0] == item.node for row in rows) else item.node
        chance = blank(figure.chance)
        rows.append((node, item.label, Exact(figure.value), interval, figure.n, chance))
    if rows:
        columns = ("node", "figure", "value", "95 % interval", "n", "chance")
        section.tables = [Table("", columns, rows)]
    return section


def _scores(scores: Mapping[str, Mapping[str, Figure]]) -> Section:
    """Every group of figures that several nodes share, node against node, and all of them as tables."""
    section = Section(
        "scores", "All scores", "Each node against the others; the mark across is chance."
    )
    shared: dict[str, list[charts.Interval]] = {}
    for node, figures in scores.items():
        for name, figure in figures.items():
            if "/" in name and "bits_per_byte" not in name and "accuracy" not in name:
                row = (node, figure.value, figure.low, figure.high, figure.chance)
                shared.setdefault(name, []).append(row)
    section.charts = [
        charts.intervals(rows, title=_title(name), across="mean")
        for name, rows in shared.items()
        if len(rows) > 1 and "nats_per_token" not in name
    ]
    for node, figures in scores.items():
        rows = [
            (name, figure.value, figure.low, figure.high, figure.n, blank(figure.chance))
            for name, figure in figures.items()
        ]
        columns = ("figure", "value", "low", "high", "n", "chance")
        section.tables.append(Table(node, columns, rows, is_detail=True))
    return section


def _title(name: str) -> str:
    return TITLES.get(name) or name.replace("/", ": ").replace("_", " ")


def _graph(run: RunRecord) -> Section:
    edges = [
        (source, name)
        for name, stage in run.stages.items()
        for source in stage.reads
        if source in run.stages
    ]
    marks = {name: drawing.Mark(_note(stage), stage.status) for name, stage in run.stages.items()}
    rows = [
        (name, stage.stage, stage.status, stage.seconds, (stage.fingerprint or "")[:12])
        for name, stage in run.stages.items()
    ]
    return Section(
        "graph",
        "The graph",
        wide=[drawing.graph(edges, marks)] if run.stages else [],
        tables=[
            Table(
                "all stages",
                ("node", "stage", "status", "seconds", "fingerprint"),
                rows,
                is_detail=True,
            )
        ],
    )


def _note(stage: StageRecord) -> str:
    match stage.status:
        case "hit":
            return "cached"
        case "built":
            return f"{stage.seconds:,.1f} s"
        case _:
            return stage.status


def _corpus(run: RunRecord) -> Section:
    section = Section("corpus", "The corpus", "Documents that are left after each stage.")
    nodes = [stage for stage in run.stages.values() if stage.stage in CORPUS_STAGES]
    counts = [(stage.node, _count(stage.metrics, "kept", "documents")) for stage in nodes]
    counts = [(name, count) for name, count in counts if count is not None]
    if counts:
        section.charts.append(
            charts.bars(
                [name for name, _ in counts],
                [count for _, count in counts],
                title="documents kept",
                across="documents",
            )
        )
    for stage in nodes:
        section.tables += stage_tables(stage)
    return section


def _count(metrics: Mapping[str, Any], *names: str) -> float | None:
    """The first of some figures that is there; a nested one by its last name."""
    for name in names:
        value = metrics.get(name)
        if isinstance(value, int | float):
            return value
        if isinstance(value, dict) and isinstance(value.get("kept"), int | float):
            return value["kept"]
    return None


def _tokens(run: RunRecord) -> Section:
    section = Section("tokens", "Tokenizer and tokens")
    for stage in run.stages.values():
        if stage.stage in ("tokenizer", "tokenize"):
            section.tables += stage_tables(stage)
            section.tables.append(_figures(stage))
    return section


def _figures(stage: StageRecord) -> Table:
    """All figures of a stage, nested ones by their path."""
    rows = list(flat(stage.metrics))
    return Table(f"{stage.node}: figures", ("figure", "value"), rows, is_detail=True)


def _training(run: RunRecord, paths: Mapping[str, Path]) -> Iterator[Section]:
    """Curves of every stage that trained, nodes of one stage in the same charts."""
    curves = {name: read_metrics(path / "logs" / METRICS) for name, path in paths.items()}
    by_stage: dict[str, list[str]] = {}
    for name, rows in curves.items():
        if rows:
            by_stage.setdefault(run.stages[name].stage, []).append(name)
    for stage, nodes in by_stage.items():
        wanted = [
            *CURVES,
            *((name, up, False) for name, up in alignment_page.CURVES.get(stage, ())),
        ]
        section = Section(f"training-{stage}", f"Training: {stage}")
        for metric, up, is_log in wanted:
            series = series_of(metric, {node: curves[node] for node in nodes})
            if series:
                section.charts.append(
                    charts.lines(series, title=_title(metric), across="step", up=up, is_log=is_log)
                )
        if stage == "ppo":
            section.charts += alignment_page.rewards({node: curves[node] for node in nodes})
        for node in nodes:
            section.tables += [*stage_tables(run.stages[node]), _figures(run.stages[node])]
        yield section


def _language_model(scores: Mapping[str, Mapping[str, Figure]]) -> Section:
    section = Section(
        "bits",
        "Held-out documents",
        "Bits per byte on the same documents: the models, n-gram models of the same training tokens, xz -9.",
    )
    domains: dict[str, list[charts.Interval]] = {}
    for node, figures in scores.items():
        for name, figure in figures.items():
            who, _, domain = name.rpartition("bits_per_byte/")
            if domain and "bits_per_byte/" in name:
                who = f"{node} train" if who == "train/" else who.strip("/") or node
                row = (who, figure.value, figure.low, figure.high, None)
                domains.setdefault(domain, []).append(row)
    if any(name.startswith("train/") for figures in scores.values() for name in figures):
        section.text += LEARNT
    if len(domains) == 2:
        domains.pop("all", None)  # the one domain is all
    section.charts = [
        charts.intervals(
            sorted(rows, key=lambda row: row[0].removesuffix(" train") not in scores),
            title=_title(domain),
            across="bits per byte",
        )
        for domain, rows in domains.items()
    ]
    return section


def _exams(scores: Mapping[str, Mapping[str, Figure]]) -> Section:
    section = Section("exams", "Exams and minimal pairs", "The mark across is chance.")
    names = dict.fromkeys(
        name for figures in scores.values() for name in figures if name.endswith("/accuracy")
    )
    for name in names:
        rows = [
            (node, figures[name].value, figures[name].low, figures[name].high, figures[name].chance)
            for node, figures in scores.items()
            if name in figures
        ]
        section.charts.append(
            charts.intervals(rows, title=_title(name.removesuffix("/accuracy")), across="accuracy")
        )
    return section


def _checkpoints(run: RunRecord, paths: Mapping[str, Path]) -> Section:
    """Scores over the steps of a training, where its weights were kept on the way."""
    section = Section(
        "checkpoints", "Scores on the way", "Measured on the weights after so many steps."
    )
    curves = {
        name: Scores(path).curve() for name, path in paths.items() if _kind(run, name) == "scores"
    }
    names = dict.fromkeys(name for rows in curves.values() for row in rows for name in row)
    for name in names:
        if name.count("/") != 1 or not name.startswith("bits_per_byte/") | name.endswith(
            "/accuracy"
        ):
            continue
        series = {
            node: ([row["step"] for row in rows], [row[name]["value"] for row in rows])
            for node, rows in curves.items()
            if all(name in row for row in rows) and rows
        }
        section.charts.append(charts.lines(series, title=_title(name), across="step", up=""))
    return section


def _judged(
    run: RunRecord,
    paths: Mapping[str, Path],
    scores: Mapping[str, Mapping[str, Figure]],
    run_dir: Path,
) -> Section:
    """What a judge and people said of answers: one chart for each kind of figure, and the page to rate on."""
    section = Section("judged", "Answers as they were judged", "The mark across is chance.")
    for node, figures in scores.items():
        if run.stages[node].stage not in ("judge", "rate"):
            continue
        if (rating := paths[node] / "files" / RATING_PAGE).is_file():
            told = run.stages[node].metrics
            said = f"{node}: rate {told['pairs']} blind pairs ({told['ratings']} ratings so far)"
            section.links.append((said, quote(os.path.relpath(rating, run_dir))))
        kinds: dict[str, list[charts.Interval]] = {}
        for name, figure in figures.items():
            kind, _, who = name.partition("/")
            row = (
                who.replace("_", " ") or kind,
                figure.value,
                figure.low,
                figure.high,
                figure.chance,
            )
            kinds.setdefault(kind, []).append(row)
        section.charts += [
            charts.intervals(rows, title=f"{node}: {_title(kind)}", across=kind.replace("_", " "))
            for kind, rows in kinds.items()
        ]
    return section


def _samples(run: RunRecord, paths: Mapping[str, Path]) -> Section:
    """Answers to the same prompts, one column a checkpoint."""
    section = Section("samples", "The same prompts, answered by each checkpoint")
    nodes = [name for name in paths if run.stages[name].stage == "evaluate"]
    answers: dict[str, dict[str, str]] = {}
    for node in nodes:
        for row in Scores(paths[node]).answers():
            if row.get("sample", 0) == 0:
                answers.setdefault(row["prompt"], {})[node] = shown_answer(row)
    if answers:
        rows = [
            [prompt, *(given.get(node, "") for node in nodes)] for prompt, given in answers.items()
        ]
        columns = ("prompt", *nodes)
        section.tables = [Table("", columns, rows[:SHOWN_PROMPTS], is_samples=True)]
        if more := rows[SHOWN_PROMPTS:MOST_PROMPTS]:
            section.tables.append(
                Table("more prompts", columns, more, is_samples=True, is_detail=True)
            )
    return section


def _costs(run: RunRecord) -> Section:
    built = [(name, stage.seconds) for name, stage in run.stages.items() if stage.status == "built"]
    section = Section("costs", "What it cost")
    if built:
        section.charts = [
            charts.bars(
                [name for name, _ in built],
                [seconds for _, seconds in built],
                title="seconds of each stage that ran",
                across="seconds",
            )
        ]
    return section


def _errors(run: RunRecord) -> Section:
    """What is not there, and why; open where the reason lies in the stage itself."""
    return Section(
        "errors",
        "What went wrong",
        details=[
            Detail(name, stage.error, is_open=stage.status == "failed")
            for name, stage in run.stages.items()
            if stage.error
        ],
    )
