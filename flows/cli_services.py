"""The commands that start and end services: `bessemer up`, `down`, `deploy`, `watch`."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.arrivals import Wholeness
from flows.graph import load_graph
from flows.runs import open_home
from flows.show import console, error_console
from storage.fetched import SCHEME

Extend = Annotated[
    bool,
    typer.Option("--extend", help="Go on from the newest complete run; else rebuild what changes."),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, as for `bessemer run`.")]


def up() -> None:
    """Start the local services and keep them: Prefect's server and page, MLflow's page."""
    from flows import services

    with error_console().status("starting"):
        started = services.up(open_home())
    for service in started:
        console().print(f"{service.name:8} {service.url}", highlight=False)


def down(
    waits: Annotated[
        bool, typer.Option("--wait", help="Until no run needs them any more.")
    ] = False,
) -> None:
    """End the local services; refused while a run needs them."""
    from flows import services

    ended = services.down(open_home(), waits=waits)
    console().print(f"ended: {', '.join(service.name for service in ended) or 'nothing was up'}")


def watch(
    place: Annotated[
        str | None,
        typer.Argument(help="Folder, or s3://bucket/prefix. None: list what is watched."),
    ] = None,
    recipe: Annotated[str | None, typer.Argument(help="Recipe that new files there run.")] = None,
    overrides: Overrides = None,
    is_extension: Extend = False,
    wholeness: Annotated[
        Wholeness,
        typer.Option(
            help="A file is whole when it is stable for --settle-seconds, when a file _SUCCESS lies "
            "beside or above it, or when a manifest.json beside it lists it with its bytes."
        ),
    ] = "stable",
    settle_seconds: Annotated[float, typer.Option(min=0)] = 10.0,
    is_end: Annotated[bool, typer.Option("--end", help="Watch this place no longer.")] = False,
) -> None:
    """Start a run of a recipe when new files have arrived in a folder or bucket."""
    from flows import services
    from flows.watches import Watch, add_watch, remove_watches, watches

    if place is None and is_end:
        raise ValueError("name the place that is watched no longer: bessemer watch PLACE --end")
    home = open_home()
    if place is not None and not place.startswith(SCHEME):
        place = str(Path(place).expanduser().absolute())
    if is_end and place is not None:
        if not remove_watches(home, place):
            raise ValueError(f"{place} is not watched; `bessemer watch` lists what is")
    elif place is not None:
        if recipe is None:
            raise ValueError(f"name the recipe that new files run: bessemer watch {place} RECIPE")
        wanted = Watch(
            place=place,
            recipe=recipe,
            overrides=overrides or [],
            is_extension=is_extension,
            wholeness=wholeness,
            settle_seconds=settle_seconds,
        )
        add_watch(home, wanted, Path.cwd())
        with error_console().status("starting"):
            services.up(home)
    for known in watches(home):
        how = "extends" if known.is_extension else "rebuilds"
        words = " ".join([known.recipe, *known.overrides])
        console().print(f"{known.place} {how} {words}", highlight=False, soft_wrap=True)


def deploy(
    recipe: Annotated[str | None, typer.Argument(help="Recipe that a schedule runs.")] = None,
    overrides: Overrides = None,
    part: Annotated[
        Literal["full", "corpus", "pretraining", "alignment", "evaluation"],
        typer.Option(help="Everything, or what one flow makes and what it needs."),
    ] = "full",
    is_extension: Extend = False,
    cron: Annotated[str | None, typer.Option(help='When: "0 3 * * *" is 3 o\'clock.')] = None,
    every_minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Or: time between two starts.")
    ] = None,
    timezone: Annotated[str, typer.Option(help="Of --cron: Asia/Shanghai, ...")] = "UTC",
    is_end: Annotated[bool, typer.Option("--end", help="Remove the recipe's schedule.")] = False,
) -> None:
    """Register the deployments, which the Prefect page starts; with a recipe, its schedule too."""
    from flows import services

    if recipe is None and (cron or every_minutes or is_end):
        raise ValueError("name the recipe that the schedule is of: bessemer deploy RECIPE ...")
    if recipe is not None and not is_end:
        load_graph(recipe, overrides or [], base=Path.cwd())
    home = open_home()
    with error_console().status("starting"):
        services.up(home)
    os.environ.update(services.prefect_environment(home, services.ensure_prefect(home)))
    from flows.schedules import Schedule, end_schedule, put_schedule, schedules

    if recipe is not None and is_end:
        end_schedule(recipe, part)
    elif recipe is not None:
        wanted = Schedule(
            recipe, overrides or [], part, is_extension, cron, every_minutes, timezone
        )
        put_schedule(wanted)
    for line in schedules():
        console().print(line, highlight=False, soft_wrap=True)
