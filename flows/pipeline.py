"""A recipe as a Prefect flow: the four flows under one, each node a task, all of them at once.

The four run side by side, since a node may wait for one of another flow (a tokenizer that reads
conversations, an evaluation of what alignment made); order comes from the graph alone.
"""

import contextvars
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import httpx
from prefect import Flow, flow
from prefect import tags as tagged
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.objects import State
from prefect.exceptions import PrefectException, TerminationSignal
from prefect.runtime import flow_run as this_run
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from flows.alignment import alignment
from flows.closing import Say, attach_report
from flows.corpus import corpus
from flows.evaluation import evaluation
from flows.execution import DONE, Execution, Listener
from flows.links import LINKS, links, tags
from flows.part import current, show, verdict
from flows.pretraining import pretraining
from flows.room import foretell
from flows.runs import StageRecord
from flows.settle import settle_dead_runs
from storage.scores import Scores
from tasks.stage import Job
from tasks.tracking import Tracking

_log = logging.getLogger("bessemer.run")
PARTS: Sequence[Any] = (corpus, pretraining, alignment, evaluation)
CANCEL_SECONDS = 45.0
"""How long running stages get to stop: a training job checkpoints for up to its grace time (30 s)."""

_TRACKED: dict[str, Literal["finished", "failed", "cancelled"]] = {
    "done": "finished",
    "failed": "failed",
    "running": "failed",
    "cancelled": "cancelled",
}


def run_pipeline(
    execution: Execution, *, say: Say = lambda text: None, is_inside: bool = False
) -> bool:
    """Run what was prepared, to its end; whether everything that was started has stopped.

    `is_inside`: a flow run of its own is there already (a deployment's), the four become its subflows.

    The run's record says what became of each node. False only after a cancel that a stage did not
    follow in time: the process has to be ended then.
    """
    for run_id in settle_dead_runs(execution.home):
        say(f"run {run_id} had died; what it began is resumed where this run needs it")
    tracking = _tracking(execution)
    token = current.set(execution)
    if is_inside:
        execution.record.flow_run = this_run.id
        show(lambda: _tag(execution))
    execution.start()
    for shortage in foretell(execution):
        say(shortage)
        _log.warning("%s", shortage)
    started = time.monotonic()
    try:
        # A flow waits up to a second for its heart-beat thread when it ends; the run's record has
        # the process's id and start time instead.
        calm = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
        with calm, tagged(*tags(execution)):
            if is_inside:
                pipeline.fn()
            else:
                _tell(say, pipeline.with_options(flow_run_name=execution.record.title))
    finally:
        execution.finish(time.monotonic() - started)
        report = attach_report(execution, say)
        show(lambda: _link(execution))
        current.reset(token)
        if tracking:
            tracking.end(_TRACKED[execution.record.status], report)
    return not execution.is_busy


def _tell(say: Say, named: Flow[Any, Any]) -> None:
    """Run the flow; that Prefect could not be told how it went is no failure of what was built."""
    try:
        named(return_state=True)
    except (httpx.HTTPError, PrefectException) as error:
        say(f"Prefect was not told all of this run: {type(error).__name__}: {error}")


def _tag(execution: Execution) -> None:
    """Add the run's tags to those that its deployment has given it."""
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(UUID(execution.record.flow_run))
        client.update_flow_run(flow_run.id, tags=sorted({*flow_run.tags, *tags(execution)}))


def _link(execution: Execution) -> None:
    """Put links on the page of the run."""
    if execution.record.flow_run is None:
        return
    with get_client(sync_client=True) as client:
        artifact = ArtifactCreate(
            key=LINKS,
            type="markdown",
            description="where more is told of the run",
            data=links(execution, str(client.api_url)),
            flow_run_id=UUID(execution.record.flow_run),
        )
        client.create_artifact(artifact)


@flow(persist_result=False)
def pipeline() -> State[Any]:
    """A recipe from raw files to an aligned, evaluated model."""
    execution = current.get()
    execution.record.flow_run = this_run.id
    used = {execution.graph.nodes[name].flow for name in execution.selected}
    parts = [_start(part) for part in PARTS if part.name in used]
    try:
        for ended in parts:
            ended.wait()
    except (KeyboardInterrupt, TerminationSignal):
        if execution.cancel(CANCEL_SECONDS):
            for ended in parts:
                ended.wait(CANCEL_SECONDS)
    return verdict(execution)


def _start(part: Any) -> threading.Event:
    """Run a flow in a thread that knows which flow run it belongs to; set once it has ended.

    The thread itself would not do: when a signal interrupts `join`, Python before 3.13 takes it for ended,
    and the flow above would close the connection over which it still tells its end.
    """
    context, ended = contextvars.copy_context(), threading.Event()
    execution = current.get()
    nodes = [name for name in execution.selected if execution.graph.nodes[name].flow == part.name]

    def run() -> None:
        try:
            context.run(part, return_state=True)
        finally:
            execution.abandon(nodes)
            ended.set()

    threading.Thread(target=run, daemon=True).start()
    return ended


def _tracking(execution: Execution) -> Tracking | None:
    """Begin the run in MLflow; None where `$BESSEMER_TRACKING` is `off`."""
    if os.environ.get("BESSEMER_TRACKING") == "off":
        return None
    tracking = Tracking(execution.folder, execution.home.tracking_uri)
    execution.listeners.append(_tracker(execution, tracking))
    tracking.start(execution.graph.recipe, execution.record.composed)
    return tracking


def _tracker(execution: Execution, tracking: Tracking) -> Listener:
    """Tells MLflow's forwarder what happens."""

    def on_job(name: str, job: Job) -> None:
        node = execution.graph.nodes[name]
        tracking.stage_started(
            name,
            job.logs,
            stage=node.spec.name,
            fingerprint=job.path.parent.name,
            settings=node.settings.model_dump(mode="json"),
        )

    def on_node(name: str, stage: StageRecord) -> None:
        if stage.status in ("waiting", "running"):
            return
        logs = Path(stage.path) / "logs" if stage.path and stage.status == "built" else None
        tracking.stage_ended(
            name,
            stage.status,
            stage.metrics | _scores(stage),
            logs=logs,
            stage=stage.stage,
            fingerprint=stage.fingerprint or "",
            error=stage.error or "",
            settings=execution.graph.nodes[name].settings.model_dump(mode="json"),
        )

    return Listener(on_node=on_node, on_job=on_job)


def _scores(stage: StageRecord) -> dict[str, Any]:
    """The figures of an artifact of scores, for a stage that has made one."""
    if stage.kind != Scores.kind or stage.status not in DONE or not stage.path:
        return {}
    figures = Scores(Path(stage.path)).figures()
    return {"scores": {name: figure.value for name, figure in figures.items() if figure.n}}
