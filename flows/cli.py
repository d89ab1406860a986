"""The command `bessemer`."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from gc import freeze
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from conf.mistakes import RecipeError
from flows.cli_models import chat, serve
from flows.cli_services import deploy, down, up, watch
from flows.execution import Execution
from flows.garbage import put_off
from flows.preparation import Request, prepare
from flows.runs import Home, RunRecord, find_artifact, open_home
from flows.show import Shown, console, effects, error_console, human_bytes, stage_table
from storage.errors import BessemerError

OK, FAILED, REFUSED, CANCELLED = 0, 1, 2, 130
KEPT_RUNS = 10

app = typer.Typer(
    help="From raw crawl to an aligned, evaluated small language model, as one declared graph.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Recipe = Annotated[str, typer.Argument(help="Name under conf/recipe/, or path of a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value: data=DIR, shape=20m, dedup.threshold=0.7")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]
From = Annotated[
    str | None,
    typer.Option("--from", help="Build this node and all below anew; all above must be there."),
]
Until = Annotated[str | None, typer.Option(help="Stop after this node.")]
Only = Annotated[str | None, typer.Option(help="This node alone; all above must be there.")]
Force = Annotated[list[str] | None, typer.Option(help="Build this node anew.")]
Extend = Annotated[
    bool,
    typer.Option(
        "--extend",
        help="Go on from the newest complete run: its vocabulary, statistics and pretrained model.",
    ),
]
ArtifactName = Annotated[
    str, typer.Argument(help="Node of the newest run, RUN:NODE, a fingerprint or a path.")
]


def _request(
    recipe: Recipe,
    overrides: Overrides = None,
    start: From = None,
    until: Until = None,
    only: Only = None,
    force: Force = None,
    is_extension: Extend = False,
) -> Request:
    return Request(recipe, overrides or [], start, until, only, tuple(force or ()), is_extension)


def _with_request(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes a Request the arguments and options of one, before its own."""
    shared, own = signature(_request).parameters, dict(signature(command).parameters)
    del own["request"]

    def asked(**arguments: Any) -> None:
        request = _request(**{name: arguments.pop(name) for name in shared})
        command(request=request, **arguments)

    parameters = {**shared, **own}
    asked.__name__, asked.__doc__ = command.__name__, command.__doc__
    vars(asked)["__signature__"] = Signature(list(parameters.values()))
    return asked


@app.command()
@_with_request
def plan(
    request: Request,
    is_budget: Annotated[
        bool,
        typer.Option(
            "--budget",
            help="No recipe: answer what follows from parameters=160M, tokens=3B, flops=1e19, "
            "accelerators=8 days=7 peak=989T, or loss=... at_parameters=...",
        ),
    ] = False,
    peak: Annotated[
        float, typer.Option(help="FLOP/s of one device, for the time that training takes.")
    ] = 0.0,
    graph: Annotated[
        Path | None, typer.Option(help="Draw the graph as a page: name of an HTML file to write.")
    ] = None,
    is_json: Json = False,
) -> None:
    """Show for every stage whether it is in the store, why not, and what it is expected to cost."""
    if is_budget:
        _print_budget([request.recipe, *request.overrides], is_json=is_json)
        return
    from flows.plan import contract
    from flows.plan import plan as make_plan

    execution = prepare(request, open_home(), base=Path.cwd(), appends=False)
    planned = make_plan(execution, Path.cwd(), peak_flops=peak)
    if graph:
        from flows.plan_page import write_plan

        write_plan(execution.graph, planned, graph)
    if is_json:
        print(json.dumps(contract(execution, planned), ensure_ascii=False))
        return
    from flows.forecast import costs_table
    from flows.show import plan_table

    console().print(plan_table(execution.graph.recipe, planned))
    if table := costs_table(planned):
        console().print(table)
    for item in planned:
        for warning in item.warnings:
            console().print(f"[yellow]{item.node}[/yellow]: {warning}", highlight=False)


def _print_budget(words: list[str], *, is_json: bool) -> None:
    from flows.budget import answer, read_question
    from flows.forecast import budget_table

    lines = answer(read_question(words))
    if is_json:
        print(json.dumps([vars(line) for line in lines], ensure_ascii=False))
    else:
        console().print(budget_table(lines))


@app.command()
@_with_request
def run(request: Request, is_json: Json = False) -> None:
    """Run a recipe; what is in the store already is not built again."""
    execution = prepare(request, open_home(), base=Path.cwd())

    from flows import services

    with error_console().status("starting the local Prefect server"):
        api = services.ensure_prefect(execution.home)
    is_named = "PREFECT_API_URL" in os.environ
    os.environ.update(services.prefect_environment(execution.home, api))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    shown = Shown(execution)
    with shown, services.kept_prefect(execution.home, api):
        # A server of somebody else's may want what only Prefect's own client can give.
        has_stopped = not is_named and _run_cached(execution, api, shown)
        has_stopped = has_stopped or _run_pipeline(execution, shown)
    record = execution.record
    if is_json:
        print(json.dumps(record.contract(), ensure_ascii=False), flush=True)
    else:
        _print_result(record, execution.home, api)
    code = {"done": OK, "failed": FAILED}.get(record.status, CANCELLED)
    if not has_stopped or (not is_named and services.has_lost_prefect(execution.home, api)):
        # Python would wait for the thread of a stage that did not stop, and for minutes until all that
        # is still to be told to a server that is gone has failed.
        sys.stdout.flush()
        os._exit(code)
    raise typer.Exit(code)


def _run_cached(execution: Execution, api: str, shown: Shown) -> bool:
    from flows.cached import run_cached

    return run_cached(execution, api, say=shown.say)


def _run_pipeline(execution: Execution, shown: Shown) -> bool:
    from flows.pipeline import run_pipeline

    return run_pipeline(execution, say=shown.say)


def _print_result(record: RunRecord, home: Home, api: str) -> None:
    screen = console()
    screen.print(stage_table(record))
    if table := effects(record):
        screen.print(table)
    for name, stage in record.stages.items():
        if stage.status == "failed":
            screen.print(f"[red]{name}[/red]: ", end="")
            screen.print(stage.error or "", markup=False, highlight=False)
    if record.status != "done":
        again = shlex.join(["bessemer", "run", record.recipe_path, *record.overrides])
        screen.print(f"to go on: {again}", markup=False, highlight=False, soft_wrap=True)
    screen.print(
        f"report   {record.report or 'none'}", markup=False, highlight=False, soft_wrap=True
    )
    screen.print(f"Prefect  {api.removesuffix('/api')}", markup=False, highlight=False)
    from flows.services import read_service

    mlflow = read_service(home, "mlflow")
    is_up = mlflow is not None and mlflow.is_running
    screen.print(
        f"MLflow   {mlflow.url}" if mlflow and is_up else "MLflow   `bessemer up` opens its page",
        markup=False,
        highlight=False,
    )


@app.command()
def runs(
    limit: Annotated[int, typer.Option(help="Newest runs that are shown.")] = 20,
    is_json: Json = False,
) -> None:
    """List the runs, newest first."""
    found = [record for record, _ in zip(open_home().records(), range(limit), strict=False)]
    if is_json:
        print(json.dumps([_run_line(record) for record in found], ensure_ascii=False))
        return
    from flows.show import table_of

    rows = [list(_run_line(record).values()) for record in found]
    console().print(
        table_of("runs", ["run", "recipe", "state", "started", "seconds", "hit", "built"], rows)
    )


def _run_line(record: RunRecord) -> dict[str, Any]:
    states = [stage.status for stage in record.stages.values()]
    return {
        "run_id": record.run_id,
        "recipe": record.recipe,
        "state": record.state,
        "started": record.started,
        "seconds": round(record.seconds, 1),
        "hit": states.count("hit"),
        "built": states.count("built"),
    }


@app.command()
def compare(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Ids of two runs or more, or how they begin; else the newest two."),
    ] = None,
    to: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("comparison.html"),
) -> None:
    """Compare runs: what changed in the recipe, and what in every figure, as a page."""
    from flows.comparison import compared, differences, write_comparison
    from flows.show import table_of

    sides = compared(names or [], open_home())
    apart = [item for item in differences(sides) if item.is_apart]
    if apart:
        columns = ["node", "figure", *(side.label for side in sides)]
        rows = [
            [item.node, item.name, *(figure.text() if figure else "" for figure in item.figures)]
            for item in apart
        ]
        console().print(table_of("figures whose intervals do not meet", columns, rows))
    else:
        console().print("no figure differs by more than its interval")
    console().print(f"wrote {write_comparison(sides, to)}", soft_wrap=True)


@app.command()
def status(
    run_id: Annotated[str | None, typer.Argument(help="A run; else the newest one.")] = None,
    is_json: Json = False,
) -> None:
    """Show the newest run stage by stage, and which services are up."""
    from flows.services import running

    home = open_home()
    record = next(
        (r for r in home.records() if run_id is None or r.run_id.startswith(run_id)), None
    )
    if run_id is not None and record is None:
        raise ValueError(f"{run_id}: there is no such run; see `bessemer runs`")
    services = running(home)
    if is_json:
        found = {
            "state": record.state if record else None,
            "run": record.contract() if record else None,
            "services": {service.name: service.url for service in services},
        }
        print(json.dumps(found, ensure_ascii=False))
        return
    if record:
        console().print(stage_table(record))
    else:
        console().print("no run yet; `bessemer run demo` makes the first")
    for service in services:
        console().print(f"{service.name:8} {service.url}", highlight=False)


@app.command()
def show(artifact: ArtifactName) -> None:
    """Print the record of an artifact: what it is, what it was made from, and its figures."""
    home = open_home()
    record = find_artifact(artifact, home, home.used_store())
    print(record.model_dump_json(indent=1))


@app.command()
def lineage(artifact: ArtifactName, is_json: Json = False) -> None:
    """Show what an artifact was made from, back to the raw files."""
    from flows.lineage import ancestry, nodes_read, tree

    home = open_home()
    store = home.used_store()
    record = find_artifact(artifact, home, store)
    if is_json:
        print(json.dumps(ancestry(record, store, nodes_read(home)), ensure_ascii=False))
        return
    console().print(tree(record, store, nodes_read(home)))


@app.command()
def cat(
    artifact: ArtifactName,
    is_dropped: Annotated[
        bool, typer.Option("--dropped", help="What the stage dropped, with the reason.")
    ] = False,
    limit: Annotated[int, typer.Option(min=0, help="Most lines; 0 for all.")] = 0,
) -> None:
    """Print an artifact as JSON lines: documents, tokens decoded, conversations, pairs, scores."""
    from itertools import islice

    from flows.contents import lines

    home = open_home()
    store = home.used_store()
    record = find_artifact(artifact, home, store)
    path = store.find(record.fingerprint)
    if path is None:
        raise ValueError(f"{artifact}: the artifact is damaged; `bessemer run` rebuilds it")
    try:
        for line in islice(lines(record, path, is_dropped=is_dropped), limit or None):
            print(json.dumps(line, ensure_ascii=False))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough; nothing more can be written, also not when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.command()
def verify(
    artifact: Annotated[
        str | None, typer.Argument(help="One artifact; else the whole store.")
    ] = None,
    is_full: Annotated[bool, typer.Option("--full", help="Read and check every byte.")] = False,
    is_json: Json = False,
) -> None:
    """Check artifacts; what is damaged is named and set aside, and the next run rebuilds it."""
    from flows.upkeep import check

    home = open_home()
    store = home.used_store()
    names = [find_artifact(artifact, home, store).fingerprint] if artifact else None
    checked, damaged = check(store, names, is_full=is_full)
    if is_json:
        print(json.dumps({"checked": checked, "damaged": damaged}, ensure_ascii=False))
    else:
        for item in damaged:
            text = f"{item['stage']} {item['fingerprint'][:12]} ({item['node']}): {item['wrong']}"
            console().print(text, markup=False, highlight=False, soft_wrap=True)
        console().print(f"{checked} artifacts checked, {len(damaged)} damaged")
    raise typer.Exit(FAILED if damaged else OK)


@app.command()
def gc(
    is_trial: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    keep_runs: Annotated[
        int, typer.Option(min=0, help="Newest runs whose artifacts stay.")
    ] = KEPT_RUNS,
    keep_days: Annotated[
        float, typer.Option(min=0, help="Runs of so many days keep theirs too.")
    ] = 0.0,
    forgets: Annotated[
        bool, typer.Option("--runs", help="Remove records and reports of all other runs too.")
    ] = False,
    is_json: Json = False,
) -> None:
    """Remove artifacts that none of the newest runs, also of other homes that share the store, no pin and no
    work in progress needs."""
    from flows.upkeep import forget_runs, kept_runs, roots
    from storage.lease_s3 import home_id

    home = open_home()
    store = home.used_store()
    others = store.noted_by_others(home_id(home.path))
    # Last: what a run commits from here on is known to the store as work in progress.
    kept = kept_runs(home, keep_runs, keep_days)
    removed = store.gc(roots(kept) | others, dry_run=is_trial)
    if forgets:
        removed += forget_runs(home, kept, dry_run=is_trial)
    size = sum(item.size for item in removed)
    if is_json:
        print(json.dumps({"bytes": size, "removed": [vars(item) for item in removed]}))
        return
    for item in removed:
        console().print(
            f"{item.what:10} {item.kind:14} {item.fingerprint[:12]} {human_bytes(item.size)}"
        )
    verb = "would be removed" if is_trial else "removed"
    console().print(f"{len(removed)} things {verb}, {human_bytes(size)}")


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="New folder.")]) -> None:
    """Make a project: a recipe with comments and a data folder."""
    from flows.upkeep import new_project

    recipe = new_project(folder)
    console().print(f"wrote {recipe}; put files into {folder / 'data'}, then", soft_wrap=True)
    console().print(f"  cd {folder} && bessemer plan {recipe.name} data=data", soft_wrap=True)


@app.command()
def export(
    artifact: ArtifactName,
    to: Annotated[Path, typer.Option(help="New folder for the Hugging Face files.")],
) -> None:
    """Copy an exported model (a node of stage `export`) out of the store, with a model card."""
    from flows.model_card import model_card
    from flows.upkeep import copy_out

    home = open_home()
    store = home.used_store()
    record = find_artifact(artifact, home, store)
    copy_out(record, store, to)
    (to / "README.md").write_text(model_card(record, store, home), "utf-8")
    console().print(f"wrote {to}", soft_wrap=True)


for _command in (up, down, deploy, watch, chat, serve):
    app.command()(_command)


@contextmanager
def _explained() -> Generator[None]:
    """Turn what the user can mend into words and an exit status."""
    try:
        yield
    except RecipeError as error:
        screen = error_console()
        for mistake in error.mistakes:
            screen.print(f"[red]{mistake.place}[/red]", highlight=False, soft_wrap=True, end=": ")
            text = f"{mistake.found}; {mistake.mend}"
            screen.print(text, markup=False, highlight=False, soft_wrap=True)
        count = len(error.mistakes)
        screen.print(f"{count} mistake{'s' if count > 1 else ''}; nothing was started")
        sys.exit(REFUSED)
    except ValueError as error:
        error_console().print(str(error), style="red", markup=False, soft_wrap=True)
        sys.exit(REFUSED)
    except BessemerError as error:
        error_console().print(str(error), style="red", markup=False, soft_wrap=True)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        error_console().print("cancelled")
        sys.exit(CANCELLED)


def main() -> None:
    """Entry point; exit status 0, 1 (a stage failed), 2 (refused, nothing started), 130 (cancelled)."""
    put_off()
    try:
        with _explained():
            app()
    finally:
        freeze()  # or Python looks through everything once more before it ends
