"""The flow `pretraining`. From token files to a pretrained model."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.part import run_part, threads


@flow(flow_run_name="pretraining", task_runner=threads(), persist_result=False)
def pretraining() -> State[Any]:
    """From token files to a pretrained model."""
    return run_part("pretraining")
