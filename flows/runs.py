"""What is known of the runs of a home: where things lie, what each run did, what a name means."""

import fcntl
import logging
import os
import re
import secrets
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage.errors import BessemerError
from storage.record import Record
from storage.store import Store, open_store
from tasks import processes

RUN_FILE = "run.json"
GOING = "going"
"""Beside it until the run has ended, so that a long one is found among many without reading them all."""
_log = logging.getLogger("bessemer.run")
_RUN_TIME = re.compile(r"\d{8}-\d{6}-\d{3}")
SHORTEST_FINGERPRINT = 6
SHORT = 8
"""Digits of a fingerprint that are shown."""
FAREWELL_SECONDS = 60.0
"""How long after its end a run's process is taken to be still busy with telling Prefect."""
NEWEST_RUNS = 20
"""Older ones that have ended are not looked at: each look reads a file."""

StageStatus = Literal["waiting", "running", "hit", "built", "failed", "skipped"]
RunStatus = Literal["running", "done", "failed", "cancelled"]


class ServiceError(BessemerError):
    """A service that a run needs does not answer or could not be started."""


class StageRecord(BaseModel):
    """What became of one node in one run."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    node: str
    stage: str
    kind: str
    flow: str
    """Which of the four flows it belongs to."""
    status: StageStatus = "waiting"
    reads: list[str] = Field(default_factory=list[str])
    """Nodes whose artifacts it reads, as inputs or as source files."""
    inputs: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Input name -> node name, or a map of such; for drawing the graph."""
    fingerprint: str | None = None
    digest: str | None = None
    path: str | None = None
    """Folder of the artifact."""
    seconds: float = 0.0
    waited_seconds: float = 0.0
    """Time that it waited for others (the host's training slot); not part of `seconds`."""
    metrics: dict[str, Any] = Field(default_factory=dict[str, Any])
    error: str | None = None
    sources: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Identity of the outside files that it read, for each setting that names some."""


class RunRecord(BaseModel):
    """One run of a recipe; `run.json`, replaced whenever something changes."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    run_id: str
    recipe: str
    recipe_path: str
    """The recipe as it was named on the command line."""
    overrides: list[str] = Field(default_factory=list[str])
    options: dict[str, Any] = Field(default_factory=dict[str, Any])
    """from, until, only, force, extend, as they were given."""
    composed: dict[str, Any] = Field(default_factory=dict[str, Any])
    """The recipe with nothing left to choose; pins and whatever said `newest` are fingerprints."""
    frozen: dict[str, str] = Field(default_factory=dict[str, str])
    """Place in the recipe -> fingerprint that a name of an artifact stood for."""
    status: RunStatus = "running"
    pid: int = 0
    pid_started: float = 0.0
    started: str = ""
    ended: str | None = None
    seconds: float = 0.0
    report: str | None = None
    flow_run: str | None = None
    """Id of its flow run in Prefect."""
    stages: dict[str, StageRecord] = Field(default_factory=dict[str, StageRecord])

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """The record in a run's folder. Raises FileNotFoundError where there is none."""
        return cls.model_validate_json((folder / RUN_FILE).read_bytes())

    def write(self, folder: Path) -> None:
        """Replace the record in a run's folder; a reader sees the old or the new one, whole."""
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{RUN_FILE}.{os.getpid()}"
        draft.write_text(self.model_dump_json(indent=1), "utf-8")
        draft.replace(folder / RUN_FILE)
        if self.status == "running" and self.ended is None:
            (folder / GOING).touch()
        else:
            (folder / GOING).unlink(missing_ok=True)

    @property
    def state(self) -> str:
        """`status`, or `died` for a run whose process is gone without having said how it ended."""
        is_dead = self.status == "running" and not is_alive(self.pid, self.pid_started)
        return "died" if is_dead else self.status

    @property
    def is_complete(self) -> bool:
        """Whether every node of the recipe has its artifact."""
        return self.status == "done" and all(
            node.status in ("hit", "built") for node in self.stages.values()
        )

    @property
    def title(self) -> str:
        """What the run is called on the Prefect page."""
        return f"{self.recipe} {self.run_id}"

    def contract(self) -> dict[str, Any]:
        """What `run --json` prints."""
        keys = (
            "stage", "status", "kind", "fingerprint", "digest", "path", "seconds", "metrics", "error",
        )  # fmt: skip
        stages = {
            name: {key: getattr(node, key) for key in keys} for name, node in self.stages.items()
        }
        return {
            "recipe": self.recipe,
            "run_id": self.run_id,
            "report": self.report,
            "stages": stages,
        }


@dataclass(frozen=True)
class Home:
    """The folder that holds everything local: services, store, runs."""

    path: Path

    @property
    def runs(self) -> Path:
        """One folder for each run, named by its id."""
        return self.path / "runs"

    @property
    def tracking_uri(self) -> str:
        """Where MLflow keeps its runs, unless the environment names a server."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.path / 'mlflow.db'}"

    def run_folder(self, run_id: str) -> Path:
        """Folder of one run."""
        return self.runs / run_id

    def store(self, composed: Mapping[str, Any] | None = None) -> Store:
        """The store that a recipe names, else `$BESSEMER_STORE`, else the one in this home."""
        named = (composed or {}).get("store")
        url = named.get("url") if isinstance(named, dict) else named
        url = url or os.environ.get("BESSEMER_STORE")
        if not url:
            return open_store(str(self.path / "store"))
        return open_store(str(url), cache=self.path / "cache")

    def used_store(self) -> Store:
        """The store of the newest run, for whoever looks at results."""
        newest = self.newest()
        return self.store(newest.composed if newest else None)

    def records(self, *, without: Container[str] = ()) -> Iterator[RunRecord]:
        """Every run, newest first, but for those with these ids."""
        yield from self._read(name for name in self._run_ids() if name not in without)

    def newest_records(self) -> list[RunRecord]:
        """The newest runs, the newest first, and the older ones that have not ended."""
        ids, going = self._run_ids(), self.going_runs()
        older = [name for name in ids[NEWEST_RUNS:] if name in going]
        return [*self._read([*ids[:NEWEST_RUNS], *older])]

    def going_runs(self) -> set[str]:
        """Ids of the runs that have not told their end; some of them may have died."""
        return {path.parent.name for path in self.runs.glob(f"*/{GOING}")}

    def _run_ids(self) -> list[str]:
        found = [path.parent.name for path in self.runs.glob(f"*/{RUN_FILE}")]
        return sorted(found, reverse=True)

    def _read(self, run_ids: Iterable[str]) -> Iterator[RunRecord]:
        for run_id in run_ids:
            file = self.run_folder(run_id) / RUN_FILE
            try:
                yield RunRecord.read(file.parent)
            except ValidationError as error:
                _log.warning("%s cannot be read and is passed over: %s", file, error)

    def dead_runs(self) -> list[RunRecord]:
        """Newer runs that died without a word, and of which Prefect has not been told yet."""
        return [r for r in self.newest_records() if r.state == "died" and r.ended is None]

    def live_runs(self) -> list[RunRecord]:
        """Newer runs of other processes that go on, or ended a moment ago and still tell Prefect so."""
        lately = (datetime.now(UTC) - timedelta(seconds=FAREWELL_SECONDS)).isoformat()
        return [
            record
            for record in self.newest_records()
            if (record.ended is None or record.ended > lately)
            and record.pid != os.getpid()
            and is_alive(record.pid, record.pid_started)
        ]

    def new_run_id(self) -> str:
        """An id that sorts by time, to the millisecond, and behind all runs so far, should somebody have
        set the clock back: `20260131-235959-1233f`."""
        now = datetime.now(UTC)
        folders = self.runs.iterdir() if self.runs.is_dir() else ()
        if found := max(filter(_RUN_TIME.match, (path.name for path in folders)), default=""):
            newest = datetime.strptime(found[:19], "%Y%m%d-%H%M%S-%f").replace(tzinfo=UTC)
            now = max(now, newest + timedelta(milliseconds=1))
        return f"{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03d}{secrets.token_hex(1)}"

    def newest(self, recipe: str | None = None, *, is_complete: bool = False) -> RunRecord | None:
        """The newest run, of a recipe where one is named, and complete where that is asked for."""
        for record in self.records():
            if recipe in (None, record.recipe) and (record.is_complete or not is_complete):
                return record
        return None


def open_home() -> Home:
    """`$BESSEMER_HOME`, else `.bessemer` in the working directory."""
    return Home(Path(os.environ.get("BESSEMER_HOME") or ".bessemer").expanduser().absolute())


def node_title(node: str, fingerprint: str | None) -> str:
    """What a node is called on the Prefect page."""
    return f"{node} {fingerprint[:SHORT]}" if fingerprint else node


def is_alive(pid: int, started: float) -> bool:
    """Whether the process with that id is the one that was started then, and not a zombie.

    `started` is what `tasks.processes.start_of` told of it.
    """
    return processes.start_of(pid) == started and processes.is_alive(pid)


def find_artifact(name: str, home: Home, store: Store) -> Record:
    """What ARTIFACT stands for: a node of the newest run, RUN:NODE, a fingerprint (or its start), a path.

    Raises ValueError where nothing, or more than one thing, fits.
    """
    if (Path(name) / "record.json").is_file():
        return Record.model_validate_json((Path(name) / "record.json").read_bytes())
    if (fingerprint := _of_run(name, home)) or (fingerprint := _of_start(name, store)):
        if record := store.record(fingerprint):
            return record
        raise ValueError(f"{name}: its artifact {fingerprint} is no longer stored; run it again")
    raise ValueError(
        f"{name}: no run has such a node and no artifact such a fingerprint; see `bessemer runs` "
        "and `bessemer status`"
    )


def _of_run(name: str, home: Home) -> str | None:
    """The fingerprint that a node of a run ended with, newest run first."""
    run_id, _, node = name.rpartition(":")
    for record in home.records():
        if run_id and not record.run_id.startswith(run_id):
            continue
        found = record.stages.get(node)
        if found and found.fingerprint and found.status in ("hit", "built"):
            return found.fingerprint
    return None


def _of_start(name: str, store: Store) -> str | None:
    if len(name) < SHORTEST_FINGERPRINT or not all(c in "0123456789abcdef" for c in name):
        return None
    found = {r.fingerprint for r in store.records() if r.fingerprint.startswith(name)}
    if len(found) > 1:
        raise ValueError(f"{name}: {len(found)} artifacts start so; give more digits")
    return next(iter(found), None)


class FileLock:
    """A lock that the kernel frees when its holder dies; held from entering to leaving."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def __enter__(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
