"""What can be started from the Prefect page: five deployments with a form.

`full` makes everything that a recipe names; `corpus`, `pretraining`, `alignment` and `evaluation` make
what the flow of that name makes, and what it needs. `flows/worker.py` registers and serves them.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun, FailedRun
from prefect.runtime import flow_run as this_run
from prefect.states import Cancelled, Completed, Failed
from pydantic import Field

from conf.compose import compose_leniently, recipes
from conf.mistakes import RecipeError
from flows.execution import Execution
from flows.pipeline import run_pipeline
from flows.plan import plan
from flows.preparation import PARTS, Request, prepare
from flows.runs import Home, open_home
from flows.services import kept_prefect
from flows.settle import heed_cancel

HIDDEN = ("standard",)
"""Recipes that others start from; alone they name no data."""
EVERYTHING = "full"


def choices() -> tuple[str, ...]:
    """Recipes that the form offers: Bessemer's own, and the YAML files of the working directory."""
    own = [str(path) for path in sorted(Path().glob("*.yaml")) if _is_recipe(path)]
    return (*(name for name in recipes() if name not in HIDDEN), *own)


def nodes() -> tuple[str, ...]:
    """Nodes of all these recipes, in their order."""
    found: dict[str, None] = {}
    for recipe in choices():
        # One that is just being written keeps nobody from the others; its own run tells what is wrong.
        with suppress(RecipeError):
            composed, _ = compose_leniently(recipe, [])
            found |= dict.fromkeys(composed.get("stages") or {})
    return tuple(found)


def _is_recipe(path: Path) -> bool:
    if not path.is_file():
        return False
    lines = path.read_text("utf-8", errors="replace").splitlines()
    return any(line.startswith("stages:") for line in lines)


Override = Annotated[str, Field(pattern=r"^[+~]{0,2}[\w./@-]+(=.*)?$")]

if TYPE_CHECKING:
    Recipe = str
    Node = str
else:
    Recipe = Literal[choices()]
    Node = Literal[nodes()]


@flow(persist_result=False, flow_run_name="{part} of {recipe}")
def bessemer(
    recipe: Recipe,
    part: Literal["full", "corpus", "pretraining", "alignment", "evaluation"] = EVERYTHING,
    overrides: list[Override] = [],  # noqa: B006 - the form shows the default; it is never changed
    start: Node | None = None,
    until: Node | None = None,
    only: Node | None = None,
    force: list[Node] = [],  # noqa: B006
    is_extension: bool = False,
    is_trial: bool = False,
) -> State[Any]:
    """Run a recipe; what is in the store already is not built again, also when a run is retried.

    Args:
        recipe: Which stages, on which data; a recipe of Bessemer's or of the working directory.
        part: Everything, or what one of the four flows makes and what it needs.
        overrides: Each KEY=VALUE as on the command line (data=DIR, shape=20m, dedup.threshold=0.7).
        start: From; build this node and all below anew, all above must be there.
        until: Stop after this node.
        only: This node alone; all above must be there.
        force: Nodes to build anew.
        is_extension: Go on from the newest complete run (--extend).
        is_trial: Dry run; only show what would be built, and why.
    """
    request = Request(
        recipe,
        overrides,
        start,
        until,
        only,
        tuple(force),
        is_extension,
        None if part == EVERYTHING else part,
    )
    logging.getLogger("prefect.flow_runs").addFilter(_is_news)
    home = open_home()
    if this_run.id:
        heed_cancel(UUID(this_run.id))
    try:
        if is_trial:
            return _trial(request, home)
        execution = prepare(request, home, base=Path.cwd())
    except RecipeError as error:
        return Failed(message=str(error))
    with kept_prefect(home, os.environ.get("PREFECT_API_URL", "")):
        run_pipeline(execution, is_inside=True)
    return _ended(execution)


def _is_news(line: logging.LogRecord) -> bool:
    """Whether a line of the page tells more than how the run ended, which the line before it does.

    Prefect tells it once more, as an "unexpected exception" with its own calls.
    """
    return not (line.exc_info and isinstance(line.exc_info[1], (CancelledRun, FailedRun)))


def _trial(request: Request, home: Home) -> State[Any]:
    planned = plan(prepare(request, home, base=Path.cwd(), appends=False), Path.cwd())
    rows = [
        {"node": item.node, "stage": item.stage, "store": item.status, "why": item.why}
        for item in planned
    ]
    create_table_artifact(rows, key="plan", description=f"what a run of {request.recipe} would do")
    misses = sum(item.status == "miss" for item in planned)
    return Completed(message=f"dry run: {misses} of {len(planned)} stages would be built")


def _ended(execution: Execution) -> State[Any]:
    failed = [name for name, stage in execution.record.stages.items() if stage.status == "failed"]
    if execution.is_cancelled:
        return Cancelled(message="cancelled; run again to go on")
    if failed:
        return Failed(message=f"failed: {', '.join(failed)}")
    return Completed(message=f"run {execution.record.run_id}, report {execution.record.report}")


def deployments() -> list[Any]:
    """The five, each with its part filled in, and `demo` as the recipe until another is chosen."""
    return [
        bessemer.to_deployment(
            name=part,
            parameters={"part": part, "recipe": "demo"},
            description=_DESCRIPTIONS[part],
            tags=["bessemer"],
        )
        for part in (EVERYTHING, *PARTS)
    ]


_DESCRIPTIONS = {
    EVERYTHING: "A recipe from raw files to an evaluated model.",
    "corpus": "From raw files to token files.",
    "pretraining": "A model that continues text, and what it learns from.",
    "alignment": "From the pretrained model to one that answers: SFT, reward, DPO, PPO.",
    "evaluation": "Scores, exports, and all that they are about.",
}
