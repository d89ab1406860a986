"""What a stage is: a typed function from artifacts and settings to one artifact, addressed by content."""

import functools
import importlib
import inspect
import json
import logging
import pkgutil
import time
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from conf.fanout import LOCAL, FanoutConfig
from conf.settings import Settings
from storage.artifact import Artifact
from storage.identity import fingerprint
from storage.record import InputEntry, Record
from storage.source import Source
from storage.store import Claim, Store
from storage.store_local import empty_folder
from tasks.launch import follow_elsewhere
from tasks.memory import give_back

Inputs = Mapping[str, Artifact | Mapping[str, Artifact]]


@dataclass(frozen=True)
class InputSpec:
    """What one input takes, read off the function's annotation."""

    kinds: tuple[type[Artifact], ...]
    is_optional: bool
    is_map: bool
    """Whether it takes a named map of artifacts."""


@dataclass(frozen=True)
class StageSpec:
    """A stage as the graph sees it."""

    name: str
    version: int
    function: Callable[..., Artifact]
    settings: type[Settings]
    inputs: Mapping[str, InputSpec]
    output: type[Artifact]
    uses_torch: bool
    """Whether it dispatches a torch job; such stages have a `launch` setting."""
    headlines: Mapping[str, str] = field(default_factory=dict[str, str])
    """Figures that say at a glance how it went, most telling first: name, or pattern with `*`, of a
    score or of a metric (nested ones as `accuracy/held`) -> what people call it."""


@dataclass
class Job:
    """What a running stage is given: where to write, what outside files it reads, how to report."""

    node: str
    stage: str
    path: Path
    """The attempt's folder, with `files/` (becomes the artifact), `logs/`, `state/` (for resume)."""
    store: Store
    sources: Mapping[str, Source] = field(default_factory=dict[str, Source])
    """Name of a source setting -> its landings."""
    workers: int = 1
    """Processes of this machine that a fan-out may use."""
    fanout: FanoutConfig = LOCAL
    """Whose processes a fan-out uses."""
    lease_fd: int | None = None
    """The lease's file descriptor, handed to the supervisor of a torch job."""
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    """Figures of the result; plain JSON values. They enter the record."""
    parts: list[str] = field(default_factory=list[str])
    """Fingerprints of the shards that the files refer to."""
    waited_seconds: float = 0.0
    """Time that the stage could not begin its work because others had the host."""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict[str, list[dict[str, Any]]])
    """Small tables for people, shown on the stage's page; written to `logs/tables.json`."""
    report_progress: Callable[[float, float, str], None] = lambda done, total, unit: None
    """Called with done, total, unit."""

    @property
    def files(self) -> Path:
        """Folder whose content becomes the artifact."""
        return self.path / "files"

    @property
    def logs(self) -> Path:
        """Folder of logs and metrics."""
        return self.path / "logs"

    @property
    def state(self) -> Path:
        """Folder that survives a failure and is removed on commit."""
        return self.path / "state"

    @property
    def log(self) -> logging.Logger:
        """The stage's logger."""
        return logging.getLogger(f"bessemer.{self.node}")


@dataclass(frozen=True)
class Outcome:
    """How a node ended."""

    status: Literal["hit", "built"]
    artifact: Artifact
    record: Record
    seconds: float


def stage(
    *, version: int, uses_torch: bool = False, headlines: Mapping[str, str] | None = None
) -> Callable[[Callable[..., Artifact]], Any]:
    """Make a function a stage; its name is the stage's, its annotations are the contract.

    The function takes `job`, inputs (artifact kinds, `| None` when optional, `dict[str, Kind]` for a
    named map) and `settings`, and returns its artifact. It stays callable as it is, for tests.
    """

    def mark(function: Callable[..., Artifact]) -> Callable[..., Artifact]:
        hints = typing.get_type_hints(function)
        inputs = {
            name: _input_spec(hint)
            for name, hint in hints.items()
            if name not in ("job", "settings", "return")
        }
        spec = StageSpec(
            name=function.__name__,
            version=version,
            function=function,
            settings=hints["settings"],
            inputs=inputs,
            output=hints["return"],
            uses_torch=uses_torch,
            headlines=headlines or {},
        )
        function.spec = spec  # type: ignore[attr-defined]
        return function

    return mark


def _input_spec(hint: Any) -> InputSpec:
    is_map = typing.get_origin(hint) is dict
    if is_map:
        hint = typing.get_args(hint)[1]
    options = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (types.UnionType, typing.Union)
        else (hint,)
    )
    kinds = tuple(option for option in options if option is not type(None))
    if not all(inspect.isclass(kind) and issubclass(kind, Artifact) for kind in kinds):
        raise TypeError(f"a stage's input must be an artifact kind, not {hint}")
    return InputSpec(kinds=kinds, is_optional=len(kinds) < len(options), is_map=is_map)


@functools.cache
def stages() -> Mapping[str, StageSpec]:
    """Every stage of `tasks/`, by name: a module whose function of the same name is a stage.

    A stage has its settings in `conf/` under the same name, so that nothing else need be imported.
    """
    found: dict[str, StageSpec] = {}
    package = importlib.import_module("tasks")
    settings = {
        module.name for module in pkgutil.iter_modules(importlib.import_module("conf").__path__)
    }
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in settings:
            continue
        function = getattr(importlib.import_module(f"tasks.{module.name}"), module.name, None)
        if isinstance(spec := getattr(function, "spec", None), StageSpec):
            found[module.name] = spec
    return found


def identity_of(
    spec: StageSpec, settings: Settings, inputs: Inputs, sources: Mapping[str, Source]
) -> dict[str, Any]:
    """What the fingerprint of a node is made of: what is computed, on which content."""
    identity: dict[str, Any] = {
        "stage": spec.name,
        "version": spec.version,
        "settings": settings.identity(),
        "inputs": {
            name: {key: item.record.digest for key, item in value.items()}
            if isinstance(value, Mapping)
            else value.record.digest
            for name, value in inputs.items()
        },
    }
    if sources:
        identity["sources"] = {name: source.identity() for name, source in sources.items()}
    return identity


def execute(
    spec: StageSpec,
    *,
    node: str,
    settings: Settings,
    inputs: Inputs,
    sources: Mapping[str, Source],
    store: Store,
    workers: int,
    fanout: FanoutConfig = LOCAL,
    is_forced: bool = False,
    report_progress: Callable[[float, float, str], None] = lambda done, total, unit: None,
    on_start: Callable[[Job], None] = lambda job: None,
) -> Outcome:
    """Find the node's artifact in the store, or build and commit it; `is_forced` always builds.

    `on_start` is told of the job just before the stage's function runs, and not on a hit.

    Who finds the lease held waits for its holder (a job that outlived its flow, another run) and then
    takes its result. Raises whatever the stage raises; the attempt stays, to be resumed.
    """
    identity = identity_of(spec, settings, inputs, sources)
    address = fingerprint(identity)
    started = time.monotonic()
    if not is_forced and (found := store.find(address)):
        artifact = spec.output(found)
        return Outcome("hit", artifact, artifact.record, time.monotonic() - started)
    claim = _claim(store, address, node, report_progress)
    claimed = time.monotonic()
    with claim:
        if not is_forced and (found := store.find(address)):
            artifact = spec.output(found)
            return Outcome("hit", artifact, artifact.record, time.monotonic() - started)
        for value in inputs.values():
            for item in value.values() if isinstance(value, Mapping) else (value,):
                store.verify_input(item.record.fingerprint)
        job = Job(
            node=node,
            stage=spec.name,
            path=claim.path,
            store=store,
            sources=sources,
            workers=workers,
            fanout=fanout,
            lease_fd=claim.lease_fd,
            report_progress=report_progress,
        )
        if claim.is_resumed and not spec.uses_torch:
            # What a failed try wrote must not slip into the result; a torch job that outlived its
            # flow has its finished files there. Scratch for resume is in state/.
            empty_folder(job.files)
        on_start(job)
        spec.function(job, settings=settings, **inputs)
        give_back()
        if job.tables:
            tables = json.dumps(job.tables, ensure_ascii=False, indent=1)
            (job.logs / "tables.json").write_text(tables, "utf-8")
        elapsed = time.monotonic() - started
        # A job that outlived its flow may have waited before this process began.
        waited = min(elapsed, claimed - started + job.waited_seconds)
        seconds = elapsed - waited
        record = Record(
            fingerprint=address,
            kind=spec.output.kind,
            stage=spec.name,
            digest="",
            identity=identity,
            inputs=_input_entries(inputs),
            parts=job.parts,
            metrics=job.metrics,
            build=_build(settings, workers, fanout),
            seconds=round(seconds, 3),
            waited_seconds=round(waited, 3),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            node=node,
        )
        artifact = spec.output(store.commit(claim, record, replace=is_forced))
    return Outcome("built", artifact, artifact.record, seconds)


def _claim(
    store: Store, address: str, node: str, report_progress: Callable[[float, float, str], None]
) -> Claim:
    def take() -> Claim | None:
        return store.claim(address)

    return take() or follow_elsewhere(
        store, address, node=node, take=take, report_progress=report_progress
    )


def _input_entries(inputs: Inputs) -> dict[str, InputEntry | dict[str, InputEntry]]:
    def entry(item: Artifact) -> InputEntry:
        return InputEntry(fingerprint=item.record.fingerprint, digest=item.record.digest)

    return {
        name: {key: entry(item) for key, item in value.items()}
        if isinstance(value, Mapping)
        else entry(value)
        for name, value in inputs.items()
    }


def _build(settings: Settings, workers: int, fanout: FanoutConfig) -> dict[str, Any]:
    from importlib.metadata import version

    packages = ("bessemer", "torch", "numpy", "tokenizers", "polars", "pyarrow")
    return {
        "settings": settings.model_dump(mode="json"),
        "workers": workers,
        "fanout": fanout.kind,
        "versions": {name: version(name) for name in packages},
    }
