"""One part: what a worker is told about it, and how it is built and committed."""

import functools
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.record import Record
from storage.store import PARTS_BUILT, Store
from storage.store_local import empty_folder
from tasks.memory import give_back
from tasks.stage import Job

POLL_SECONDS = 0.2

Build = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """All that a worker process is told about one item."""

    store_url: str
    cache: Path | None
    build: Build
    arguments: tuple[Any, ...]
    record: Record
    label: str
    cost: float
    reads: tuple[str, ...] = ()
    """Fingerprints of artifacts in the arguments, of which the worker's machine may have no copy."""


def build_part(task: Task) -> str | None:
    """Build and commit one part; how it failed, or None. Never raises, so that others go on."""
    try:
        _build_and_commit(task)
    except Exception as error:  # noqa: BLE001 - told to the parent, which raises it with the label
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    return None


@functools.cache
def _open(url: str, cache: Path | None) -> Store:
    """One store for each process: on S3 its connection and its lease keeper are costly to begin."""
    return Store(url, cache=cache)


def _build_and_commit(task: Task) -> None:
    store = _open(task.store_url, task.cache)
    fingerprint = task.record.fingerprint
    while (claim := store.claim(fingerprint)) is None:
        time.sleep(POLL_SECONDS)
    with claim:
        if store.find(fingerprint):
            return
        store.find_all(task.reads)
        empty_folder(claim.path / "files")
        started = time.monotonic()
        metrics = task.build(claim.path / "files", *task.arguments)
        give_back()
        seconds = round(time.monotonic() - started, 3)
        store.commit(claim, task.record.model_copy(update={"metrics": metrics, "seconds": seconds}))


def note_part(job: Job, fingerprint: str) -> None:
    """Keep gc from a part whose whole is not committed yet."""
    job.state.mkdir(parents=True, exist_ok=True)
    with (job.state / PARTS_BUILT).open("a", encoding="utf-8") as stream:
        stream.write(f"{fingerprint}\n")
