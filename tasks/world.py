"""Stage world: a synthetic bilingual web about a small closed world, with its truth."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from conf.world import WorldConfig
from storage.world import LANGUAGES, Facts, World
from tasks.stage import Job, stage
from tasks.world_answers import (
    best_answer,
    conversation,
    demonstrations,
    exam,
    fixed_prompts,
    pairs,
)
from tasks.world_crawl import BLOCKED_HOSTS, Web
from tasks.world_language import make_facts


@stage(version=4)
def world(job: Job, settings: WorldConfig) -> World:
    """Write a crawl, conversations, preferences and an exam about made-up facts, and the truth of all.

    reads nothing   writes World   cost about 0.5 ms per page
    """
    facts = make_facts(settings.seed, settings.animals, settings.held_share)
    _write_json(job.files / "truth" / "facts.json", facts.truth)
    _write_exam(job.files / "exam", exam(facts, settings.seed))
    _write_alignment(job.files, facts, settings)
    _write_lines(job.files / "prompts.jsonl", fixed_prompts(facts))
    (job.files / "block_list.txt").write_text("\n".join(BLOCKED_HOSTS) + "\n", encoding="utf-8")
    counts = _write_crawl(job, facts, settings)
    job.metrics.update(
        pages={"all": counts.total(), **dict(sorted(counts.items()))},
        facts=len(facts.animals) * len(facts.attributes),
        questions={
            split: len({question.key for question in facts.questions(split)})
            for split in ("train", "held")
        },
    )
    job.tables["pages"] = [{"kind": kind, "pages": n} for kind, n in sorted(counts.items())]
    return World(job.path)


def _write_crawl(job: Job, facts: Facts, settings: WorldConfig) -> Counter[str]:
    crawl = job.files / "crawl"
    crawl.mkdir(parents=True, exist_ok=True)
    questions = [
        {**row, "language": language}
        for language in LANGUAGES
        for row in exam(facts, settings.seed)[f"animals_{language}", "val"]
    ]
    web = Web(facts, settings.seed, questions)
    truth: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for number in range(settings.warcs):
        pages, content = web.write_warc(number, settings.good_pages)
        name = f"warc-{number:05d}.warc.gz"
        (crawl / name).write_bytes(content)
        truth += [{**page.truth(), "warc": name} for page in pages]
        counts.update(page.kind for page in pages)
        job.report_progress(number + 1, settings.warcs, "files")
    _write_lines(job.files / "truth" / "pages.jsonl", truth)
    return counts


def _write_alignment(files: Path, facts: Facts, settings: WorldConfig) -> None:
    seed, margin = settings.seed, settings.min_margin
    _write_lines(files / "chats" / "train.jsonl", demonstrations(facts, seed, settings.chats))
    ideal = (
        conversation(question, best_answer(facts, question), int(question.id.split("#")[1]))
        for question in facts.questions("held")
    )
    _write_lines(files / "chats" / "held.jsonl", ideal)
    for split, count in (("train", settings.pairs), ("held", settings.held_pairs)):
        path = files / "preferences" / f"{split}.jsonl"
        _write_lines(path, pairs(facts, seed, split, count, margin))


def _write_exam(folder: Path, rows: Mapping[tuple[str, str], list[dict[str, str]]]) -> None:
    for (subject, split), column in rows.items():
        path = folder / split / f"{subject}_{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(column[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(column)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
