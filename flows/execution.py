"""One run of a recipe: what may start, what each node ended as, and the record of it all.

Knows nothing of Prefect: `flows/pipeline.py` asks it for nodes that are ready and runs them.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.garbage import take_up
from flows.graph import Graph
from flows.lookup import Address, Lookup
from flows.runs import Home, RunRecord, StageRecord, StageStatus
from storage.artifact import Artifact
from storage.errors import DamagedArtifact
from storage.lease_s3 import home_id
from tasks.processes import interrupt, start_of
from tasks.stage import Job, Outcome, execute

DONE: tuple[StageStatus, ...] = ("hit", "built")
WAKE_SECONDS = 1.0
CANCELLED = "cancelled; run again to go on from here"
ABANDONED = "Prefect did not run it, its server may not answer; run again, what was built is kept"

Report = Callable[[float, float, str], None]
_log = logging.getLogger("bessemer.run")


@dataclass
class Listener:
    """What is told about a run while it goes on; every method may be called from any thread."""

    on_node: Callable[[str, StageRecord], None] = lambda name, node: None
    """A node started or ended."""
    on_progress: Callable[[str, float, float, str], None] = lambda name, done, total, unit: None
    on_job: Callable[[str, Job], None] = lambda name, job: None
    """A node is about to be built."""


@dataclass
class Execution:
    """A run in progress."""

    graph: Graph
    home: Home
    record: RunRecord
    lookup: Lookup
    forced: frozenset[str]
    must_hit: frozenset[str]
    """Nodes whose artifact has to be in the store already."""
    selected: tuple[str, ...]
    """Nodes that take part, in order."""
    workers: int
    listeners: list[Listener] = field(default_factory=list[Listener])
    is_cancelled: bool = False
    page_lost_until: float = 0.0
    """Time on the monotonic clock before which the Prefect page is not told of figures and progress."""
    _addresses: dict[str, Address] = field(default_factory=dict[str, Address])
    _taken: set[str] = field(default_factory=set[str])
    _threads: dict[str, int] = field(default_factory=dict[str, int])
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _mending: threading.Lock = field(default_factory=threading.Lock)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.home.run_folder(self.record.run_id)

    @property
    def is_busy(self) -> bool:
        """Whether a node is still being worked on."""
        return bool(self._threads)

    def start(self) -> None:
        """Note that the run goes on, in this process."""
        # By it jobs know whose processor they wait for, whether the page or a terminal has started the run.
        os.environ["BESSEMER_HOME"] = str(self.home.path)
        self.record.pid = os.getpid()
        self.record.pid_started = start_of(self.record.pid)
        self.record.started = datetime.now(UTC).isoformat(timespec="seconds")
        for name, node in self.graph.nodes.items():
            self.record.stages[name] = StageRecord(
                node=name,
                stage=node.spec.name,
                kind=node.spec.output.kind,
                flow=node.flow,
                status="waiting" if name in self.selected else "skipped",
                reads=node.upstream,
                inputs=dict(node.inputs),
            )
        self._write()

    def finish(self, seconds: float) -> None:
        """Note how the run ended."""
        self.abandon(self.selected)
        with self._changed:
            for node in self.record.stages.values():
                if node.status in ("waiting", "running"):
                    node.status, node.error = "skipped", CANCELLED
        failed = any(node.status == "failed" for node in self.record.stages.values())
        self.record.status = "cancelled" if self.is_cancelled else "failed" if failed else "done"
        self.record.seconds = round(seconds, 3)
        self.record.ended = datetime.now(UTC).isoformat(timespec="seconds")
        self._write()
        self._note()

    def _note(self) -> None:
        """Tell the store what this run has, for gc by other homes that share it."""
        found = {stage.fingerprint for stage in self.record.stages.values() if stage.fingerprint}
        try:
            self.lookup.store.note_run(
                home_id(self.home.path),
                self.record.run_id,
                found | set(self.record.frozen.values()),
                going=self.home.going_runs(),
            )
        except Exception as error:  # noqa: BLE001 - a read-only store, an outage: no reason for a run to fail
            _log.warning("the store could not be told of this run: %s", error)

    def take_all(self) -> bool:
        """Take every node from the store, provided that all are there; else none is taken."""
        known = self.lookup
        if self.forced & set(self.selected):
            return False
        lookup = Lookup(self.graph, known.store, known.base, known.hashes, known.appends)
        started = time.monotonic()
        try:
            if not all(lookup.find(name) for name in self.selected):
                return False
            addresses = {name: lookup.address(name) for name in self.selected if self._reads(name)}
        except (ValueError, OSError) as error:
            # Told again, with its node, by the run that follows.
            _log.debug("not everything can be taken from the store: %s", error)
            return False
        seconds = (time.monotonic() - started) / max(1, len(self.selected))
        for name in self.selected:
            if name in addresses:
                self.record.stages[name].sources = _identities(addresses[name])
            self._arrived(name, lookup.artifacts[name], "hit", seconds)
        return True

    def _reads(self, name: str) -> bool:
        """Whether a node reads files from outside, or of other nodes."""
        return self.graph.nodes[name].pin is None and any(self.graph.nodes[name].sources)

    def next_ready(self, names: Iterable[str]) -> str | None:
        """The next of these nodes that can be run or must be skipped; None when none is left.

        Waits for other nodes, also for those of other flows. Each name is given out once.
        """
        wanted = list(names)
        with self._changed:
            while left := [name for name in wanted if name not in self._taken]:
                for name in left:
                    if self.is_cancelled or self._blocker(name) or self._is_ready(name):
                        self._taken.add(name)
                        return name
                self._changed.wait(WAKE_SECONDS)
        return None

    def fingerprint(self, name: str) -> str | None:
        """Address of a ready node, or of its pin; None for one that cannot run."""
        if self.is_cancelled or self._blocker(name):
            return None
        if pin := self.graph.nodes[name].pin:
            return pin
        try:
            address = self.lookup.address(name)
        except (ValueError, OSError) as error:
            # Told again, and recorded, when the node runs.
            _log.debug("no address for %s: %s", name, error)
            return None
        self._addresses[name] = address
        return address.fingerprint

    def run(
        self, name: str, report_progress: Report = lambda done, total, unit: None
    ) -> StageRecord:
        """Find or build the artifact of a node. Raises what the stage raises, after recording it."""
        blocker = self._blocker(name)
        if self.is_cancelled or blocker:
            reason = CANCELLED if self.is_cancelled else f"{blocker} has no artifact"
            return self._set(name, status="skipped", error=reason)
        self._set(name, status="running")
        self._threads[name] = threading.get_ident()
        started = time.monotonic()
        try:
            artifact, status = self._find_or_build(name, self._reporter(name, report_progress))
        except BaseException as error:
            reason = CANCELLED if self.is_cancelled else _reason(error)
            seconds = round(time.monotonic() - started, 3)
            self._set(name, status="failed", error=reason, seconds=seconds)
            raise
        finally:
            self._threads.pop(name, None)
        return self._arrived(name, artifact, status, time.monotonic() - started)

    def cancel(self, grace_seconds: float) -> bool:
        """Stop what is running and start nothing more; whether everything stopped in time.

        Nodes run in threads: a torch job is asked for a checkpoint by the thread that follows it.
        """
        with self._changed:
            self.is_cancelled = True
            self._changed.notify_all()
        for thread in list(self._threads.values()):
            interrupt(thread)
        deadline = time.monotonic() + grace_seconds
        while self._threads and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self._threads

    def abandon(self, names: Iterable[str]) -> None:
        """Note as failed what nobody will run any more, though its turn had come: others wait for it."""
        for name in names:
            is_left = name not in self._threads and not self.is_cancelled
            if is_left and self.record.stages[name].status in ("waiting", "running"):
                self._set(name, status="failed", error=ABANDONED)

    def _is_ready(self, name: str) -> bool:
        return all(
            self.record.stages[other].status in DONE for other in self.graph.nodes[name].upstream
        )

    def _blocker(self, name: str) -> str | None:
        """An upstream node that ended without an artifact."""
        for other in self.graph.nodes[name].upstream:
            if self.record.stages[other].status in ("failed", "skipped"):
                return other
        return None

    def _find_or_build(self, name: str, report: Report) -> tuple[Artifact, StageStatus]:
        if pinned := self.lookup.pinned(name):
            return pinned, "hit"
        try:
            outcome = self._execute(name, report)
        except DamagedArtifact as damage:
            _log.warning("%s: %s; its input is rebuilt now", name, damage)
            self._mend(name)
            self._addresses.pop(name, None)
            outcome = self._execute(name, report)
        return outcome.artifact, outcome.status

    def _execute(self, name: str, report: Report, *, is_forced: bool | None = None) -> Outcome:
        node = self.graph.nodes[name]
        address = self._addresses.get(name) or self.lookup.address(name)
        self._addresses[name] = address
        if name in self.must_hit and self.lookup.store.find(address.fingerprint) is None:
            raise ValueError(
                f"{name} was to be taken from the store and is not there; run it first, or leave "
                "out --from and --only"
            )
        with self._changed:
            self.record.stages[name].sources = _identities(address)
        return execute(
            node.spec,
            node=name,
            settings=node.settings,
            inputs=address.inputs,
            sources=address.sources,
            store=self.lookup.store,
            workers=self.workers,
            fanout=self.graph.fanout,
            is_forced=name in self.forced if is_forced is None else is_forced,
            report_progress=report,
            on_start=lambda job: self._begin(name, job),
        )

    def _begin(self, name: str, job: Job) -> None:
        """Just before a stage runs: artifacts whose files it reads as a source are checked too, and the disk."""
        nodes = {spec.node for _, specs in self.graph.nodes[name].sources for spec in specs}
        for other in nodes - {None}:
            self.lookup.store.verify_input(self.lookup.artifacts[str(other)].record.fingerprint)
        # It loads the settings of all trainings, which a run of hits alone does without.
        from flows.room import check_room

        check_room(self.lookup, self.graph.nodes[name], self._addresses[name], job.path)
        take_up()
        self._tell(lambda listener: listener.on_job(name, job))

    def _mend(self, name: str) -> None:
        """Rebuild what a node reads and is no longer in the store; the rest are hits."""
        with self._mending:
            for other in self.graph.nodes:
                if other == name or other not in self.graph.ancestors([name]):
                    continue
                if self.graph.nodes[other].pin is None:
                    started = time.monotonic()
                    outcome = self._execute(other, lambda done, total, unit: None, is_forced=False)
                    if outcome.status == "built":
                        seconds = time.monotonic() - started
                        self._arrived(other, outcome.artifact, "built", seconds)

    def _arrived(
        self, name: str, artifact: Artifact, status: StageStatus, seconds: float
    ) -> StageRecord:
        with self._changed:
            self.lookup.artifacts[name] = artifact
        record = artifact.record
        waited = min(seconds, record.waited_seconds) if status == "built" else 0.0
        arrived = self._set(
            name,
            status=status,
            fingerprint=record.fingerprint,
            digest=record.digest,
            path=str(artifact.path),
            seconds=round(seconds - waited, 3),
            waited_seconds=waited,
            metrics=record.metrics,
            error=None,
        )
        if status == "built":
            self._note()
        return arrived

    def _set(self, name: str, **changes: Any) -> StageRecord:
        with self._changed:
            node = self.record.stages[name]
            for key, value in changes.items():
                setattr(node, key, value)
            self._write()
            self._changed.notify_all()
        self._tell(lambda listener: listener.on_node(name, node))
        return node

    def _reporter(self, name: str, report: Report) -> Report:
        def both(done: float, total: float, unit: str) -> None:
            report(done, total, unit)
            self._tell(lambda listener: listener.on_progress(name, done, total, unit))

        return both

    def _tell(self, tell: Callable[[Listener], None]) -> None:
        for listener in self.listeners:
            tell(listener)

    def _write(self) -> None:
        with self._changed:
            self.record.write(self.folder)


def _identities(address: Address) -> dict[str, Any]:
    return {setting: source.identity() for setting, source in address.sources.items()}


def _reason(error: BaseException) -> str:
    """As a record can hold it: names of files, and JSON, have what UTF-8 cannot."""
    return f"{type(error).__name__}: {error}".encode("utf-8", "replace").decode("utf-8")


def workers_of(environment: Mapping[str, str] = os.environ) -> int:
    """Processes that a fan-out may use: `$BESSEMER_WORKERS`, else the cores of this process."""
    return int(environment.get("BESSEMER_WORKERS") or len(os.sched_getaffinity(0)))
