"""The flow `alignment`. From conversations and preferences to an aligned model: chats, sft, pairs, reward, dpo, ppo."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.part import run_part, threads


@flow(flow_run_name="alignment", task_runner=threads(), persist_result=False)
def alignment() -> State[Any]:
    """From conversations and preferences to an aligned model: chats, sft, pairs, reward, dpo, ppo."""
    return run_part("alignment")
