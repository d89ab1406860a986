"""Runs whose process, or whose worker, was killed: the Prefect page must show how they are.

A run of the command line that died is told of by the next run. One from the page is started again by the
next worker; as long as it lives, nothing but a cancel from the page is lost with its worker, so it looks for
that itself.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterName,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import PrefectException
from prefect.states import AwaitingRetry, Cancelled, Crashed

from flows.runs import Home, RunRecord

GOING = FlowRunFilterState(
    type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
)
MOST_STARTS = 5
"""A run that has died so often is not started again by itself."""
LOOK_SECONDS = 3.0
GONE = "its process is gone; run it again"
_log = logging.getLogger("bessemer.run")


def settle_dead_runs(home: Home) -> list[str]:
    """Tell Prefect of the runs that died without a word, once each; their ids.

    What they had begun stays where it is, to be resumed by the next run.
    """
    dead = home.dead_runs()
    if dead:
        with get_client(sync_client=True) as client:
            for record in dead:
                for flow_run in _of_record(client, record):
                    _end(client, flow_run, Crashed(message=GONE))
                _note_end(home, record)
    return [record.run_id for record in dead]


def take_up(home: Home, deployments: Sequence[UUID]) -> list[str]:
    """Start the runs of these deployments again whose process is gone; the names of their flow runs.

    One that was being cancelled is cancelled; one that has died `MOST_STARTS` times stays so.
    """
    records = {record.flow_run: record for record in reversed(home.newest_records())}
    taken: list[str] = []
    with get_client(sync_client=True) as client:
        of_deployments = DeploymentFilter(id=DeploymentFilterId(any_=[*deployments]))
        for flow_run in client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=GOING), deployment_filter=of_deployments
        ):
            record = records.get(str(flow_run.id))
            if record is not None and record.state == "running":
                continue
            if flow_run.state_type == StateType.CANCELLING:
                state: State = Cancelled(message="its process is gone; what was done is kept")
            elif flow_run.run_count >= MOST_STARTS:
                state = Crashed(message=GONE)
            else:
                state = AwaitingRetry(message="its process was gone; it goes on")
                taken.append(flow_run.name)
            _end(client, flow_run, state)
            if record is not None:
                _note_end(home, record)
    return taken


def heed_cancel(flow_run: UUID) -> None:
    """Have this process notice a cancel from the page when the worker that would pass it on is gone."""
    heed = threading.Thread(target=_heed, args=(flow_run, os.getppid()), daemon=True)
    heed.start()


def _heed(flow_run: UUID, worker: int) -> None:
    while os.getppid() == worker:
        time.sleep(LOOK_SECONDS)
    _log.warning("the worker is gone; the run goes on, and the next worker leaves it alone")
    while True:
        try:
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(flow_run).state
            if state is not None and state.is_cancelling():
                os.kill(os.getpid(), signal.SIGTERM)  # as the worker would
                return
        except (PrefectException, httpx.HTTPError) as error:
            # The server may be away for a while too.
            _log.debug("the server was not asked: %s", error)
        time.sleep(LOOK_SECONDS)


def _end(client: SyncPrefectClient, flow_run: FlowRun, state: State) -> None:
    """Set the state of a flow run whose process is gone; its parts and tasks have crashed."""
    parents = FlowRunFilterParentFlowRunId(any_=[flow_run.id])
    parts = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(parent_flow_run_id=parents, state=GOING)
    )
    of_runs = FlowRunFilter(id=FlowRunFilterId(any_=[run.id for run in (*parts, flow_run)]))
    types = [StateType.RUNNING, StateType.PENDING]
    going = TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=types)))
    for task_run in client.read_task_runs(flow_run_filter=of_runs, task_run_filter=going):
        client.set_task_run_state(task_run.id, Crashed(message=GONE), force=True)
    for part in parts:
        client.set_flow_run_state(part.id, Crashed(message=GONE), force=True)
    client.set_flow_run_state(flow_run.id, state, force=True)


def _note_end(home: Home, record: RunRecord) -> None:
    record.ended = datetime.now(UTC).isoformat(timespec="seconds")
    record.write(home.run_folder(record.run_id))


def _of_record(client: SyncPrefectClient, record: RunRecord) -> list[FlowRun]:
    """The run's own flow run, as far as Prefect takes it for going."""
    if record.flow_run:
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(record.flow_run)]), state=GOING)
    else:
        wanted = FlowRunFilter(name=FlowRunFilterName(any_=[record.title]), state=GOING)
    return client.read_flow_runs(flow_run_filter=wanted)
