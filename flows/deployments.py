"""Recipes that can be started from the Prefect page: each a deployment with a form, served by one process.

`python -m flows.deployments` is that process; `bessemer up` starts it in the working directory, from
which relative paths of the recipes count, and `bessemer down` ends it. Each run it starts is a
process of its own.
"""

from pathlib import Path
from typing import Annotated, Any

from prefect import flow, serve
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed
from pydantic import Field

from conf.compose import recipes
from conf.mistakes import RecipeError
from flows.pipeline import run_pipeline
from flows.preparation import Request, prepare
from flows.runs import open_home

HIDDEN = ("standard",)
"""Recipes that others start from; alone they name no data."""


@flow(persist_result=False)
def bessemer(
    recipe: Annotated[str, Field(description="Name under conf/recipe/, or path of a YAML file")],
    overrides: Annotated[
        list[str], Field(description="key=value: data=DIR, shape=20m, dedup.threshold=0.7")
    ] = [],  # noqa: B006 - Prefect shows the default in its form; it is never changed
    force: Annotated[list[str], Field(description="Nodes to build anew")] = [],  # noqa: B006
    until: Annotated[str | None, Field(description="Last node to run; all when empty")] = None,
    is_extension: Annotated[
        bool, Field(description="Go on from the newest complete run (--extend)")
    ] = False,
) -> State[Any]:
    """Run a recipe; what is in the store already is not built again, also when a run is retried."""
    request = Request(recipe, overrides, None, until, None, tuple(force), is_extension)
    try:
        execution = prepare(request, open_home(), base=Path.cwd())
    except RecipeError as error:
        return Failed(message=str(error))
    run_pipeline(execution)
    failed = [name for name, stage in execution.record.stages.items() if stage.status == "failed"]
    if execution.is_cancelled:
        return Cancelled(message="cancelled; run again to go on")
    if failed:
        return Failed(message=f"failed: {', '.join(failed)}")
    return Completed(message=f"run {execution.record.run_id}, report {execution.record.report}")


def serve_recipes() -> None:
    """Register a deployment for every recipe and run what is started from the page, until ended."""
    deployments: list[Any] = [
        bessemer.to_deployment(name=name, parameters={"recipe": name}, description=f"Recipe {name}")
        for name in recipes()
        if name not in HIDDEN
    ]
    serve(*deployments, print_starting_message=False)


if __name__ == "__main__":
    serve_recipes()
