"""Map a function over shards in worker processes; every shard's result is an artifact of its own.

reads items   writes one part per item   cost only the items whose part is not in the store

Where several machines share a store, two that build the same part wait for each other.
"""

import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.errors import PartsFailed
from storage.identity import fingerprint as fingerprint_of
from storage.record import Record
from storage.store import Store
from storage.store_local import read_record
from tasks.fanout_local import Ended, build_here
from tasks.fanout_part import Build, Task, build_part, note_part
from tasks.stage import Job


@dataclass(frozen=True)
class PartItem:
    """One piece of work."""

    identity: dict[str, Any]
    """What decides the result, plain JSON values; the build function and the version are added."""
    arguments: tuple[Any, ...] = ()
    """Given to the build function after the folder to write in; must pickle."""
    label: str = ""
    """Names the item in messages."""
    cost: float = 0.0
    """How long it takes beside the others, in any unit; the dearest are begun first."""


@dataclass(frozen=True)
class Part:
    """A built item: a committed artifact of kind `part`."""

    fingerprint: str
    digest: str
    path: Path
    metrics: dict[str, Any]
    is_reused: bool
    """Whether it was in the store before this fan-out."""

    @property
    def files(self) -> Path:
        """Folder of what the build function wrote."""
        return self.path / "files"


@dataclass
class _Progress:
    """Counts finished items, and why some failed."""

    job: Job
    total: int
    done: int = 0
    failures: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, fingerprint: str, failure: str | None) -> None:
        """One more item is finished; `failure` says how when it did not succeed."""
        self.done += 1
        if failure is not None:
            self.failures[fingerprint] = failure
        else:
            note_part(self.job, fingerprint)
        self.job.report_progress(self.done, self.total, "parts")


def fan_out(job: Job, build: Build, items: Sequence[PartItem], *, version: int = 1) -> list[Part]:
    """Build the part of every item that the store does not hold; the parts, in item order.

    `build(files, *arguments)` is a function of a module; it writes under `files` and returns plain
    JSON figures. It runs in the main thread of a worker process, of this machine or of the job's
    cluster, or of this process when the job has one worker. Raises PartsFailed, after all other items
    are done, when some raised or their worker died.
    """
    tasks = [_task(job, build, item, version) for item in items]
    parts = _look_up(job.store, [task.record.fingerprint for task in tasks], is_reused=True)
    missing = {t.record.fingerprint: t for t in tasks if parts[t.record.fingerprint] is None}
    progress = _Progress(job, len(parts), len(parts) - len(missing))
    for fingerprint in [fp for fp in parts if fp not in missing]:
        note_part(job, fingerprint)
    if missing:
        _build_all(job, sorted(missing.values(), key=lambda task: -task.cost), progress)
        parts |= _look_up(job.store, list(missing), is_reused=False)
    found = [part for task in tasks if (part := parts[task.record.fingerprint])]
    if progress.failures or len(found) < len(tasks):
        raise _failed(missing, progress.failures, len(parts))
    job.parts += [fp for fp in parts if fp not in job.parts]
    job.metrics["shards"] = _counted(job, built=len(missing), reused=len(parts) - len(missing))
    return found


def _task(job: Job, build: Build, item: PartItem, version: int) -> Task:
    name = f"{build.__module__}.{build.__qualname__}"
    if "<" in name:
        raise ValueError(f"{name} cannot be sent to a worker; use a function of a module")
    identity = {"part": name, "version": version, **item.identity}
    record = Record(
        fingerprint=fingerprint_of(identity),
        kind="part",
        stage=f"{job.stage}/part",
        digest="",
        identity=identity,
        node=job.node,
    )
    label = item.label or name
    return Task(job.store.url, job.store.cache, build, item.arguments, record, label, item.cost)


def _look_up(
    store: Store, fingerprints: Sequence[str], *, is_reused: bool
) -> dict[str, Part | None]:
    def part(fingerprint: str, path: Path | None) -> Part | None:
        record = read_record(path) if path else None
        if path is None or record is None:
            return None
        return Part(fingerprint, record.digest, path, record.metrics, is_reused)

    unique = list(dict.fromkeys(fingerprints))
    return {fp: part(fp, path) for fp, path in zip(unique, store.find_all(unique), strict=True)}


def _counted(job: Job, *, built: int, reused: int) -> dict[str, int]:
    """Figures of this fan-out added to those of earlier ones of the same job."""
    before = job.metrics.get("shards", {"built": 0, "reused": 0})
    return {"built": before["built"] + built, "reused": before["reused"] + reused}


def _failed(tasks: dict[str, Task], failures: dict[str, str], total: int) -> PartsFailed:
    lines = [f"{tasks[fp].label}: {reason}" for fp, reason in failures.items()]
    shown = "\n".join(lines[:5]) + (f"\n... and {len(lines) - 5} more" if len(lines) > 5 else "")
    return PartsFailed(
        f"{len(lines)} of {total} parts failed; the others are kept and will be reused.\n{shown}"
    )


def _build_all(job: Job, tasks: list[Task], progress: _Progress) -> None:
    # Closed by hand, since an error keeps what it went through alive.
    with closing(_ended(job, tasks)) as ended:
        for task, failure in ended:
            progress.add(task.record.fingerprint, failure)


def _ended(job: Job, tasks: list[Task]) -> Generator[Ended]:
    if job.fanout.kind != "local":
        from tasks.fanout_cluster import build_there

        yield from build_there(job, tasks)
    # A build may set timers, which only a main thread can; others get a process even for one item.
    elif job.workers == 1 and threading.current_thread() is threading.main_thread():
        yield from ((task, build_part(task)) for task in tasks)
    else:
        yield from build_here(tasks, job.workers)
