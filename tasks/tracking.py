"""MLflow tracking without its cost: the flow writes events to a file, a process of its own sends them.

    flow --appends--> RUN/tracking.jsonl --+
    training --appends--> metrics.jsonl ---+--> python -m tasks.tracking RUN --> MLflow

Neither the flow nor a training job ever waits for MLflow, and no trouble of the tracking server can
reach them: what could not be sent stays in the files and is tried again. The process finds the runs
it has made by their tags, and the last step of each metric in MLflow itself, so that it may be
killed and started again without logging anything twice. It ends after the event `end`, or when
the flow's process is gone; then open runs are ended as KILLED.
"""

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from conf.contract import METRICS, SAMPLES
from storage.lease import FileLease, acquire
from tasks.command import ROOT
from tasks.metrics_tail import BATCH, MetricsTail
from tasks.processes import is_alive

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EVENTS = "tracking.jsonl"
OUTPUT = "tracking.log"
LOCK = "tracking.lock"
SENT = "mlflow.json"
"""In a run's folder, once MLflow has the run: `experiment` and `run`, its ids there."""
TABLES = "tables.json"
TABLE_ROWS = 1000
"""Rows of a table that are sent."""
EXPERIMENT = "bessemer"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Opens the experiment's page on its runs and curves, not on traces of language model calls."""

POLL_SECONDS = 1.0
PATIENCE_SECONDS = 120.0
"""How long an unreachable server is tried after the run has ended."""
LONGEST_PAUSE_SECONDS = 30.0
PARAMETERS = 100
"""Most parameters that MLflow takes in one call."""
LONGEST_PARAMETER = 500

StageStatus = Literal["hit", "built", "failed", "skipped", "cancelled"]
RunStatus = Literal["finished", "failed", "cancelled"]

_ENDS = {
    "hit": "FINISHED",
    "built": "FINISHED",
    "finished": "FINISHED",
    "failed": "FAILED",
    "skipped": "KILLED",
    "cancelled": "KILLED",
    "killed": "KILLED",
}


class Tracking:
    """The flow's end: appends events, starts the forwarder when there is something to forward.

    Usable from several threads. None of its methods waits for MLflow.
    """

    def __init__(self, run_dir: Path, tracking_uri: str) -> None:
        self._run_dir = run_dir
        self._uri = tracking_uri
        self._lock = threading.Lock()
        self._forwarder: subprocess.Popen[bytes] | None = None
        self._has_news = False

    def start(self, recipe: str = "", settings: Mapping[str, Any] | None = None) -> None:
        """The run begins; its id is the name of its folder. `settings` become its parameters."""
        self._append({"event": "run", "recipe": recipe, "settings": settings or {}})

    def stage_started(
        self,
        node: str,
        logs: Path | None = None,
        *,
        stage: str = "",
        fingerprint: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """A stage really runs; `logs` is where its metrics.jsonl grows, when that is known."""
        self._has_news = True
        self._append(
            {
                "event": "stage",
                "node": node,
                "status": "running",
                "logs": str(logs.absolute()) if logs else None,
                "tags": {"stage": stage, "fingerprint": fingerprint},
                "settings": settings or {},
            }
        )
        self._ensure_forwarder()

    def stage_ended(
        self,
        node: str,
        status: StageStatus,
        metrics: Mapping[str, Any] | None = None,
        *,
        logs: Path | None = None,
        stage: str = "",
        fingerprint: str = "",
        error: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """A stage is over; `metrics` are the figures of its record, `logs` where they lie now.

        For a hit this is the only call, without `logs`: its curves belong to the run that built it.
        """
        self._has_news = self._has_news or status != "hit"
        self._append(
            {
                "event": "stage",
                "node": node,
                "status": status,
                "logs": str(logs.absolute()) if logs else None,
                "metrics": metrics or {},
                "tags": {
                    "stage": stage,
                    "fingerprint": fingerprint,
                    "error": error[:LONGEST_PARAMETER],
                },
                "settings": settings or {},
            }
        )

    def end(self, status: RunStatus, report: Path | None = None) -> None:
        """The run is over; the forwarder sends what is left and ends by itself.

        A run of hits alone is no run in MLflow: it has no figure that is not there already.
        """
        path = str(report.absolute()) if report else None
        self._append({"event": "end", "status": status, "report": path})
        if self._has_news:
            self._ensure_forwarder()

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until everything was sent, or given up. Whether the forwarder has ended."""
        if self._forwarder is None:
            return True
        try:
            self._forwarder.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _append(self, event: Mapping[str, Any]) -> None:
        line = json.dumps({**event, "time": time.time()}, ensure_ascii=False, default=str) + "\n"
        with self._lock:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            with (self._run_dir / EVENTS).open("ab") as stream:
                stream.write(line.encode("utf-8"))

    def _ensure_forwarder(self) -> None:
        with self._lock:
            if self._forwarder is not None and self._forwarder.poll() is None:
                return
            self._forwarder = _start_forwarder(self._run_dir, self._uri)


def _start_forwarder(run_dir: Path, uri: str) -> "subprocess.Popen[bytes]":
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    folder = str(run_dir.absolute())
    arguments = [folder, "--pid", str(os.getpid())]
    with (run_dir / OUTPUT).open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tasks.tracking", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={
                **os.environ,
                # Not an argument, which all users of the host can read: it may hold a password.
                "MLFLOW_TRACKING_URI": uri,
                "PYTHONPATH": path,
                "PYTHONSAFEPATH": "1",
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "DO_NOT_TRACK": "true",
                "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
                "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
            },
        )


@dataclass
class Sent:
    """One run in MLflow and how far it has been filled."""

    run_id: str
    steps: dict[str, int]
    """Metric -> the last step that MLflow has."""
    tail: MetricsTail = field(default_factory=MetricsTail)
    is_open: bool = True


class Forwarder:
    """The sending end: one parent run, one nested run per stage."""

    def __init__(self, client: "MlflowClient", run_dir: Path) -> None:
        self._client = client
        self._run_dir = run_dir
        self._experiment = _experiment(client, run_dir)
        self._runs: dict[str, Sent] = {}
        """Node -> its run; the parent under the empty name."""
        self._offset = 0
        self.is_ended = False

    def forward(self) -> None:
        """Send all that is new. Raises what MLflow raises; then call again, nothing is lost."""
        with contextlib.suppress(FileNotFoundError), (self._run_dir / EVENTS).open("rb") as stream:
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                self._apply(json.loads(line))
                self._offset += len(line)
        for sent in self._runs.values():
            if sent.is_open:
                self._send_curves(sent)

    def end_open(self, status: str) -> None:
        """End every run that is still open, the parent last."""
        for sent in reversed(list(self._runs.values())):
            if sent.is_open:
                self._client.set_terminated(sent.run_id, _ENDS[status])
                sent.is_open = False

    def _apply(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "run":
                tags = {"recipe": event["recipe"]}
                self._run("", event, tags)
            case "stage":
                self._apply_stage(event)
            case "end":
                if event["report"] and Path(event["report"]).is_file():
                    self._client.log_artifact(self._run("", event).run_id, event["report"])
                self._tag(self._run("", event), {"status": event["status"]})
                self.end_open(event["status"])
                self.is_ended = True
            case other:
                sys.stderr.write(f"unknown event {other}, left out\n")

    def _apply_stage(self, event: dict[str, Any]) -> None:
        self._run("", event)
        sent = self._run(event["node"], event, event["tags"])
        self._tag(sent, {"status": event["status"], **event["tags"]})
        if event["logs"]:
            # The same file before and after the commit: what was read stays read.
            sent.tail.path = Path(event["logs"]) / METRICS
        if event["status"] == "running":
            sent.is_open = True
            return
        self._send_curves(sent)
        if event["logs"] and (samples := Path(event["logs"]) / SAMPLES).is_file():
            self._client.log_artifact(sent.run_id, str(samples))
        if event["logs"]:
            self._send_tables(sent, Path(event["logs"]) / TABLES)
        self._send(sent, [{"time": event["time"], "step": 0, **flatten(event["metrics"])}])
        self._client.set_terminated(sent.run_id, _ENDS[event["status"]])
        sent.is_open = False

    def _run(self, node: str, event: dict[str, Any], tags: Mapping[str, str] | None = None) -> Sent:
        """The run of a node, found in MLflow or made; the parent for the empty name."""
        if node in self._runs:
            return self._runs[node]
        run_id = self._find(node) or self._make(node, event, tags or {})
        run = self._client.get_run(run_id)
        histories = (
            (name, self._client.get_metric_history(run_id, name)) for name in run.data.metrics
        )
        steps = {name: max(point.step for point in points) for name, points in histories}
        if run.info.status != "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        self._runs[node] = Sent(run_id, steps)
        if not node:
            ids = {"experiment": self._experiment, "run": run_id}
            (self._run_dir / SENT).write_text(json.dumps(ids), "utf-8")
        return self._runs[node]

    def _find(self, node: str) -> str | None:
        wanted = (
            f"tags.`bessemer.run_id` = '{self._run_dir.name}' and tags.`bessemer.node` = '{node}'"
        )
        found = self._client.search_runs([self._experiment], wanted, max_results=1)
        return found[0].info.run_id if found else None

    def _make(self, node: str, event: dict[str, Any], tags: Mapping[str, str]) -> str:
        own = {
            "bessemer.run_id": self._run_dir.name,
            "bessemer.node": node,
            "mlflow.source.name": "bessemer",
            "mlflow.runName": node or self._run_dir.name,
            **{f"bessemer.{name}": value for name, value in tags.items()},
        }
        if node:
            own["mlflow.parentRunId"] = self._runs[""].run_id
        begun = round(event["time"] * 1000)
        run_id: str = self._client.create_run(self._experiment, begun, own).info.run_id
        self._send_parameters(run_id, event.get("settings", {}))
        return run_id

    def _send_parameters(self, run_id: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        parameters = [
            Param(_name(name), str(value)[:LONGEST_PARAMETER]) for name, value in _leaves(settings)
        ]
        for first in range(0, len(parameters), PARAMETERS):
            self._client.log_batch(run_id, params=parameters[first : first + PARAMETERS])

    def _tag(self, sent: Sent, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            if value:
                self._client.set_tag(sent.run_id, f"bessemer.{name}", value)

    def _send_curves(self, sent: Sent) -> None:
        for rows in sent.tail.batches():
            self._send(sent, rows)

    def _send_tables(self, sent: Sent, path: Path) -> None:
        """The tables that a stage wrote for people, in the form that MLflow's page shows as tables."""
        if not path.is_file():
            return
        shown: list[dict[str, str]] = []
        for title, rows in json.loads(path.read_text("utf-8")).items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            values = [[row.get(column) for column in columns] for row in rows[:TABLE_ROWS]]
            name = re.sub(r"\W+", "-", title.lower()).strip("-")
            place = f"tables/{name}.json"
            self._client.log_dict(sent.run_id, {"columns": columns, "data": values}, place)
            shown.append({"path": place, "type": "table"})
        self._client.set_tag(sent.run_id, "mlflow.loggedArtifacts", json.dumps(shown))

    def _send(self, sent: Sent, rows: list[dict[str, Any]]) -> None:
        """Log the numbers of rows; a step that MLflow already has is left out."""
        from mlflow.entities import Metric

        points: list[Metric] = []
        steps = dict(sent.steps)
        for row in rows:
            step, when = int(row.get("step", 0)), round(float(row.get("time", 0.0)) * 1000)
            for name, value in flatten(row).items():
                if name in ("step", "time") or steps.get(name, -1) >= step:
                    continue
                steps[name] = step
                points.append(Metric(name, value, when, step))
        for first in range(0, len(points), BATCH):
            self._client.log_batch(sent.run_id, metrics=points[first : first + BATCH])
        sent.steps = steps


def flatten(figures: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of nested figures by a path name that MLflow takes: `shards/built`."""
    return {
        _name(name, "/"): float(value)
        for name, value in _leaves(figures)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _leaves(
    tree: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        path = (*above, str(key))
        if isinstance(value, Mapping):
            yield from _leaves(value, path)
        else:
            yield path, value


def _name(path: tuple[str, ...], joint: str = ".") -> str:
    return re.sub(r"[^\w/.\- :]", "_", joint.join(path))[:250]


def _experiment(client: "MlflowClient", run_dir: Path) -> str:
    """The experiment's id; made with a place for artifacts beside the runs when the store is local."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(EXPERIMENT):
        return found.experiment_id
    is_remote = client.tracking_uri.startswith(("http", "postgres", "mysql", "databricks"))
    place = None if is_remote else (run_dir.parent.parent / "mlartifacts").as_uri()
    try:
        return client.create_experiment(EXPERIMENT, artifact_location=place, tags=EXPERIMENT_TAGS)
    except MlflowException:
        # Another run's forwarder was faster.
        if found := client.get_experiment_by_name(EXPERIMENT):
            return found.experiment_id
        raise


def main() -> None:
    """Forward the events of one run until it has ended or its flow is gone."""
    parser = argparse.ArgumentParser(prog="python -m tasks.tracking")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--pid", type=int, required=True, help="process of the flow")
    arguments = parser.parse_args()
    lock = _only_one(arguments.run_dir)
    try:
        _forward(arguments.run_dir, os.environ["MLFLOW_TRACKING_URI"], arguments.pid)
    finally:
        lock.release()


def _only_one(run_dir: Path) -> FileLease:
    # The forwarder of the run's earlier, killed flow may still be closing its runs.
    while (lock := acquire(run_dir / LOCK)) is None:
        time.sleep(POLL_SECONDS / 4)
    return lock


def _forward(run_dir: Path, uri: str, flow: int) -> None:
    from mlflow.tracking import MlflowClient

    forwarder: Forwarder | None = None
    pause, gone_since = POLL_SECONDS, None
    while True:
        is_gone = not is_alive(flow)
        gone_since = (gone_since or time.monotonic()) if is_gone else None
        try:
            forwarder = forwarder or Forwarder(MlflowClient(uri), run_dir)
            forwarder.forward()
            if is_gone and not forwarder.is_ended:
                forwarder.end_open("killed")
            if is_gone or forwarder.is_ended:
                return
            pause = POLL_SECONDS
        # MLflow, its database and its HTTP client raise dozens of unrelated kinds; whatever it is,
        # what was not sent is still in the files, and trying again is all that can be done.
        except Exception as error:  # noqa: BLE001
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {type(error).__name__}: {error}\n")
            if gone_since and time.monotonic() - gone_since > PATIENCE_SECONDS:
                sys.stderr.write(f"given up; the events stay in {run_dir / EVENTS}\n")
                sys.exit(1)
            pause = min(LONGEST_PAUSE_SECONDS, pause * 2)
        time.sleep(pause)


if __name__ == "__main__":
    main()
