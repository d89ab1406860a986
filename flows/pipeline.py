"""A recipe as a Prefect flow: the four flows under one, each node a task, all of them at once.

The four run side by side, since a node may wait for one of another flow (a tokenizer that reads
conversations, an evaluation of what alignment made); order comes from the graph alone.
"""

import contextvars
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from flows.alignment import alignment
from flows.closing import Say, attach_report
from flows.corpus import corpus
from flows.evaluation import evaluation
from flows.execution import DONE, Execution, Listener
from flows.part import current, verdict
from flows.pretraining import pretraining
from flows.runs import StageRecord
from flows.settle import settle_dead_runs
from storage.scores import Scores
from tasks.stage import Job
from tasks.tracking import Tracking

PARTS: Sequence[Any] = (corpus, pretraining, alignment, evaluation)
CANCEL_SECONDS = 45.0
"""How long running stages get to stop: a training job checkpoints for up to its grace time (30 s)."""
JOIN_SECONDS = 0.5

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
    execution.start()
    token = current.set(execution)
    started = time.monotonic()
    try:
        # A flow waits up to a second for its heart-beat thread when it ends; the run's record has
        # the process's id and start time instead.
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            if is_inside:
                pipeline.fn()
            else:
                pipeline.with_options(flow_run_name=execution.record.title)(return_state=True)
    finally:
        execution.finish(time.monotonic() - started)
        current.reset(token)
        report = attach_report(execution, say)
        if tracking:
            tracking.end(_TRACKED[execution.record.status], report)
    return not execution.is_busy


@flow(persist_result=False)
def pipeline() -> State[Any]:
    """A recipe from raw files to an aligned, evaluated model."""
    execution = current.get()
    used = {execution.graph.nodes[name].flow for name in execution.selected}
    threads = [_start(part) for part in PARTS if part.name in used]
    try:
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(JOIN_SECONDS)
    except (KeyboardInterrupt, TerminationSignal):
        if execution.cancel(CANCEL_SECONDS):
            for thread in threads:
                thread.join(CANCEL_SECONDS)
    return verdict(execution)


def _start(part: Any) -> threading.Thread:
    """Run a flow in a thread that knows which flow run it belongs to."""
    context, execution = contextvars.copy_context(), current.get()
    nodes = [name for name in execution.selected if execution.graph.nodes[name].flow == part.name]

    def run() -> None:
        try:
            context.run(part, return_state=True)
        finally:
            execution.abandon(nodes)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


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
