"""Runs whose process was killed: the Prefect page must not show them as running for ever."""

from datetime import UTC, datetime

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterName,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Crashed

from flows.runs import Home, RunRecord

GOING = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING]))


def settle_dead_runs(home: Home) -> list[str]:
    """Tell Prefect of the runs that died without a word, once each; their ids.

    What they had begun stays where it is, to be resumed by the next run.
    """
    dead = home.dead_runs()
    if dead:
        with get_client(sync_client=True) as client:
            for record in dead:
                for flow_run in _flow_runs(client, record):
                    client.set_flow_run_state(
                        flow_run.id,
                        Crashed(message="its process is gone; run it again"),
                        force=True,
                    )
                record.ended = datetime.now(UTC).isoformat(timespec="seconds")
                record.write(home.run_folder(record.run_id))
    return [record.run_id for record in dead]


def _flow_runs(client: SyncPrefectClient, record: RunRecord) -> list[FlowRun]:
    """The run's flow and its four parts, as far as Prefect takes them for running."""
    name = FlowRunFilterName(any_=[record.title])
    whole = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=name, state=GOING))
    parents = FlowRunFilterParentFlowRunId(any_=[flow_run.id for flow_run in whole])
    parts = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(parent_flow_run_id=parents, state=GOING)
    )
    return [*parts, *whole] if whole else []
