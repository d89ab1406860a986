"""The flow `corpus`. From raw files to token files: world, extract, filter, dedup, decontaminate, tokenizer, tokenize."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.part import run_part, threads


@flow(flow_run_name="corpus", task_runner=threads(), persist_result=False)
def corpus() -> State[Any]:
    """From raw files to token files: world, extract, filter, dedup, decontaminate, tokenizer, tokenize."""
    return run_part("corpus")
