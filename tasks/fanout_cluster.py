"""Parts on the machines of a Dask or Ray cluster that is up; both are used through one small interface.

Each slot of the cluster builds a part in a process of its own (`build_apart`), so that a build finds
there what it finds on this machine. All that travels are names of functions and their arguments; the
parts themselves go through the store.
"""

import dataclasses
import os
import shutil
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast

from conf.fanout import FanoutConfig
from storage.identity import fingerprint as fingerprint_of
from storage.record import Record
from storage.store import Store
from tasks.fanout_local import Ended
from tasks.fanout_part import POLL_SECONDS, Task, note_part
from tasks.stage import Job

CONNECT_SECONDS = 60
"""How long a cluster may take to answer, and to have a worker."""
ADDRESS_VARIABLES = {"dask": "DASK_SCHEDULER_ADDRESS", "ray": "RAY_ADDRESS"}


@dataclasses.dataclass(frozen=True)
class Sight:
    """What a machine of the cluster has to see, and be."""

    store_url: str
    cache: Path | None
    marker: Path | None
    """A file that this run has just put into the store; none for one on S3."""
    version: str
    """Of Bessemer."""


class Cluster(Protocol):
    """A connection to a cluster."""

    def look(self, sight: Sight) -> Mapping[str, str | None]:
        """`wrong_with(sight)` of every machine, by its name; empty where the cluster has none."""
        ...

    def submit(self, task: Task) -> None:
        """Have a part built; those given first are begun first."""
        ...

    def next_ended(self, seconds: float) -> Ended | None:
        """A submitted part that has ended, or None when none does in this time."""
        ...

    def cancel(self) -> None:
        """Stop all that is still being built."""
        ...


def build_there(job: Job, tasks: Sequence[Task]) -> Iterator[Ended]:
    """Build parts on the job's cluster. Raises ValueError for a cluster that cannot do it."""
    with _connected(job.fanout) as cluster:
        _check_sight(job, cluster)
        for task in tasks:
            cluster.submit(_to_send(job, task))
        left = len(tasks)
        while left:
            # Without a time-out no interrupt would reach this thread until a part has ended.
            if ended := cluster.next_ended(POLL_SECONDS):
                left -= 1
                yield ended
    if not job.store.is_remote:
        # A shared folder may still answer that the parts are not there, as it did before they were
        # built; listing it asks the server anew.
        any(job.store.root.glob("artifacts/*"))


@contextmanager
def _connected(fanout: FanoutConfig) -> Generator[Cluster]:
    kind = fanout.kind
    variable = ADDRESS_VARIABLES[kind]
    address = fanout.address or os.environ.get(variable)
    if not address:
        raise ValueError(
            f"fanout={kind} needs the address of a cluster that is up; say fanout.address=... "
            f"or set {variable}"
        )
    try:
        if kind == "dask":
            from tasks.fanout_dask import connect
        else:
            from tasks.fanout_ray import connect
        cluster = connect(address)
    except ImportError as error:
        raise ValueError(
            f"fanout={kind} needs a package that is not installed ({error}); "
            f"pip install 'bessemer[{kind}]'"
        ) from error
    except OSError as error:
        raise ValueError(
            f"no {kind} cluster answers at {address} ({error}); start it, or correct fanout.address"
        ) from error
    try:
        yield cluster
    finally:
        cluster.cancel()


def _check_sight(job: Job, cluster: Cluster) -> None:
    marker = None if job.store.is_remote else job.store.root / f".seen-{uuid.uuid4().hex}"
    if marker:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    try:
        found = cluster.look(Sight(job.store.url, job.store.cache, marker, version("bessemer")))
    finally:
        if marker:
            marker.unlink()
    if not found:
        raise ValueError(
            f"the {job.fanout.kind} cluster has no worker; start one and run again, or say fanout=local"
        )
    if wrong := [f"{name}: {reason}" for name, reason in found.items() if reason]:
        raise ValueError(
            f"{len(wrong)} of {len(found)} workers of the {job.fanout.kind} cluster cannot build for "
            f"this run:\n" + "\n".join(wrong[:5])
        )


def wrong_with(sight: Sight) -> str | None:
    """Why this machine cannot build parts; None when it can. Runs on the cluster."""
    if (own := version("bessemer")) != sight.version:
        return f"it has Bessemer {own}, this run is of {sight.version}; install the same"
    if sight.marker is None:
        try:
            Store(sight.store_url, cache=sight.cache).record("0" * 64)
        except Exception as error:  # noqa: BLE001 - whatever the S3 client raises is told
            return (
                f"it does not reach {sight.store_url} ({type(error).__name__}: {error}); "
                "set the S3 client's variables where the worker is started"
            )
    elif not sight.marker.exists():
        return (
            f"it does not see the store {sight.store_url}; put the store on a folder that all "
            "machines share under one path (store=PATH), or on S3 (store=s3://bucket/prefix)"
        )
    elif not os.access(sight.marker.parent, os.W_OK):
        return f"it may not write to the store {sight.store_url}; run it as a user who may"
    return None


def _to_send(job: Job, task: Task) -> Task:
    """The task as another machine can do it: where the store is on S3, files are in the store."""
    if not job.store.is_remote:
        return task
    arguments = tuple(_in_store(job, argument) for argument in task.arguments)
    reads = tuple(sorted(set(_artifacts_in(arguments, job.store.root / "artifacts"))))
    return dataclasses.replace(task, arguments=arguments, reads=reads)


def _in_store(job: Job, argument: Any) -> Any:
    """A file of the attempt, which only this machine has, as one of a part; else the argument."""
    if not isinstance(argument, Path) or not argument.is_relative_to(job.path):
        return argument
    import xxhash

    digest = xxhash.xxh3_128_hexdigest(argument.read_bytes())
    identity = {"file": argument.name, "xxh3": digest}
    fingerprint = fingerprint_of(identity)
    while not (path := job.store.find(fingerprint)):
        if claim := job.store.claim(fingerprint):
            with claim:
                shutil.copyfile(argument, claim.path / "files" / argument.name)
                record = Record(
                    fingerprint=fingerprint,
                    kind="part",
                    stage=f"{job.stage}/part",
                    digest="",
                    identity=identity,
                    node=job.node,
                )
                job.store.commit(claim, record)
    note_part(job, fingerprint)
    return path / "files" / argument.name


def _artifacts_in(value: Any, folder: Path) -> Iterator[str]:
    """Fingerprints of the artifacts that paths in a value lead into."""
    match value:
        case Path():
            if value.is_relative_to(folder):
                yield value.relative_to(folder).parts[0]
        case list() | tuple():
            for item in cast("Sequence[Any]", value):
                yield from _artifacts_in(item, folder)
        case dict():
            yield from _artifacts_in(list(cast("dict[Any, Any]", value).values()), folder)
        case _ if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                yield from _artifacts_in(getattr(value, field.name), folder)
        case _:
            pass
