"""The stage that makes preference pairs: from files, and from a policy's own answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from conf.pairs import PairsConfig
from storage.checkpoint import Policy
from storage.conversations import Conversations
from storage.jsonl import SPLITS, SplitWriter, content_id, read_jsonl
from storage.preferences import Preference, Preferences
from tasks.launch import run_worker
from tasks.preference_formats import PairRow, parse_pair
from tasks.stage import Job, stage
from tasks.tally import Tally, in_split_order

ANSWERED = "answered-{split}.jsonl"
"""In `state/`, written by the worker: pairs whose rejected answer is the policy's own."""


@stage(version=1, uses_torch=True)
def pairs(
    job: Job,
    settings: PairsConfig,
    policy: Policy | None = None,
    conversations: Conversations | None = None,
) -> Preferences:
    """Read pairs from files; with a policy and conversations, add pairs of the reference answer
    (chosen) against the policy's own (rejected).

    reads sources, Policy, Conversations   writes Preferences   cost one answer per conversation
    """
    if (policy is None) != (conversations is None):
        raise ValueError(
            "pairs has only one of the inputs policy and conversations; own answers need both: "
            "name both in `from`, or neither"
        )
    if policy is None and not settings.sources:
        raise ValueError(
            "pairs has nothing to read; set `sources` to files of pairs, or name the inputs policy "
            "and conversations in `from`"
        )
    if policy is not None and conversations is not None:
        inputs = {"policy": policy, "conversations": conversations}
        job.metrics["answered"] = run_worker(job, "model.pairs", settings, inputs)
    tally = Tally(settings.held_share, settings.on_bad_row, settings.keep_duplicates)
    with SplitWriter(job.files) as writer:
        if settings.sources:
            _from_files(job, tally, writer)
        for split in SPLITS:
            for row in _answered(job.state / ANSWERED.format(split=split)):
                writer.write(split, row)
    job.metrics |= {**tally.figures(), **writer.counts}
    job.tables |= tally.tables()
    return Preferences(job.path)


def _from_files(job: Job, tally: Tally, writer: SplitWriter) -> None:
    files = in_split_order(job.sources["sources"])
    for number, file in enumerate(files):
        job.report_progress(number, len(files), "files")
        for _, row in tally.parsed(file, parse_pair):
            tally.layouts[row.layout] += 1
            preference = _preference(row, file.spec.domain)
            if split := tally.place(file, preference["id"], row.prompt):
                writer.write(split, preference)


def _preference(row: PairRow, domain: str) -> Preference:
    return Preference(
        id=content_id([row.prompt, row.chosen, row.rejected]),
        prompt=row.prompt,
        chosen=row.chosen,
        rejected=row.rejected,
        margin=row.margin,
        domain=domain,
    )


def _answered(path: Path) -> Iterator[dict[str, Any]]:
    return cast("Iterator[dict[str, Any]]", read_jsonl(path) if path.exists() else iter(()))
