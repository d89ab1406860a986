"""The flow `evaluation`. What the models can do, what the data stages did, and the export."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.part import run_part, threads


@flow(flow_run_name="evaluation", task_runner=threads(), persist_result=False)
def evaluation() -> State[Any]:
    """What the models can do, what the data stages did, and the export."""
    return run_part("evaluation")
