"""What the four flows share: the Prefect task of one node, and running a flow's nodes as they get ready."""

import json
import logging
import re
import time
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import httpx
from prefect import task
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.cached import CACHED, cached_message
from flows.execution import CANCELLED, Execution, Listener
from flows.pictures import pictures
from flows.progress import Progress
from flows.runs import StageRecord, node_title
from tasks.stage import Job

PAGE_LOST_SECONDS = 300.0
"""How long nothing is shown after the server could not be reached."""
PROGRESS_SECONDS = 2.0
"""Least time between two progress reports to the server."""
MOST_THREADS = 64
MOST_ROWS = 1000
"""Rows of a table that are shown; events above 1.5 MB are refused."""

current: ContextVar[Execution] = ContextVar("current")
"""The run that a flow belongs to. Not a parameter: Prefect would import fastapi to write it down,
0.3 s of the 1.5 s that a run without work costs."""
_log = logging.getLogger("bessemer.run")


def run_part(flow: str) -> State[Any]:
    """Run the nodes of one of the four flows, each as soon as what it reads is there."""
    execution = current.get()
    names = [name for name in execution.selected if execution.graph.nodes[name].flow == flow]
    futures: list[PrefectFuture[Any]] = []
    while (name := execution.next_ready(names)) is not None:
        title = node_title(name, execution.fingerprint(name))
        named = run_stage.with_options(
            name=execution.graph.nodes[name].spec.name, task_run_name=title
        )
        futures.append(named.submit(name))
        # A task that Prefect could not begin, its server being gone, has told nobody.
        futures[-1].add_done_callback(lambda _, name=name: execution.abandon([name]))
    for future in futures:
        future.wait()
    return verdict(execution, names)


def threads() -> Any:
    """Task runner of the four flows: a thread for every node that is ready."""
    return ThreadPoolTaskRunner(max_workers=MOST_THREADS)


def verdict(execution: Execution, names: list[str] | None = None) -> State[Any]:
    """How the nodes ended, as the state of a flow."""
    stages = {name: execution.record.stages[name] for name in names or execution.selected}
    failed = [name for name, stage in stages.items() if stage.status == "failed"]
    if execution.is_cancelled:
        return Cancelled(message="cancelled; what was done is kept")
    if failed:
        return Failed(message=f"failed: {', '.join(failed)}")
    hits = sum(stage.status == "hit" for stage in stages.values())
    return Completed(message=f"{len(stages)} stages, {hits} from the store")


@task(cache_policy=NO_CACHE, persist_result=False, retries=0)
def run_stage(node: str) -> State[Any]:
    """One node: its artifact is found in the store, or built and committed to it."""
    execution = current.get()
    try:
        stage = execution.run(node, _progress(node, execution))
    except KeyboardInterrupt:
        if not execution.is_cancelled:
            raise
        return Cancelled(message=CANCELLED)
    match stage.status:
        case "hit":
            return Completed(name=CACHED, message=cached_message(stage))
        case "built":
            publish(node, stage)
            return Completed(message=f"built in {stage.seconds:.1f} s")
        case _:
            return Cancelled(name="Skipped", message=stage.error or "an input is missing")


def publish(node: str, stage: StageRecord) -> None:
    """Show the figures, tables and curves of a built artifact on the page of its task run."""
    key = _key(node)
    rows = "\n".join(f"| {name} | {value} |" for name, value in flat(stage.metrics).items())
    lines = [
        f"## {node}",
        f"{stage.kind} `{stage.fingerprint}`, digest `{stage.digest}`, {stage.seconds:.1f} s",
        f"waited {stage.waited_seconds:.1f} s for others" if stage.waited_seconds >= 1 else "",
        f"`{stage.path}`",
        f"| figure | value |\n|---|---|\n{rows}" if rows else "",
    ]
    show(lambda: create_markdown_artifact("\n\n".join(lines), key=key, description=node))
    for title, address in pictures(node, Path(stage.path or "")):
        show(
            lambda title=title, address=address: create_image_artifact(
                address, key=f"{key}-{_key(title)}", description=f"{node}: {title}"
            )
        )
    tables = Path(stage.path or "") / "logs" / "tables.json"
    if not tables.is_file():
        return
    for title, table in json.loads(tables.read_text("utf-8")).items():
        show(
            lambda title=title, table=table: create_table_artifact(
                table[:MOST_ROWS], key=f"{key}-{_key(title)}", description=f"{node}: {title}"
            )
        )


def flat(figures: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Nested figures with dotted names."""
    found: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            found |= flat(value, f"{place}{name}.")
        else:
            found[f"{place}{name}"] = round(value, 6) if isinstance(value, float) else value
    return found


def _progress(node: str, execution: Execution) -> Callable[[float, float, str], None]:
    """A live progress bar on the task's page, for stages that take longer than a moment."""
    told, shown = time.monotonic(), None
    progress, logs = Progress(node), None

    def on_job(name: str, job: Job) -> None:
        nonlocal logs
        logs = job.logs if name == node else logs

    def report(done: float, total: float, unit: str) -> None:
        nonlocal told, shown
        if time.monotonic() - told < PROGRESS_SECONDS:
            return
        told = time.monotonic()
        share = round(100 * min(done / total, 1.0), 1) if total else 0.0
        text = progress.words(done, total, unit, logs)
        if shown is None:
            shown = show(
                lambda: create_progress_artifact(
                    share, key=f"{_key(node)}-progress", description=text
                )
            )
        else:
            known = shown
            show(lambda: update_progress_artifact(known, progress=share, description=text))

    execution.listeners.append(Listener(on_job=on_job))
    return report


def show(create: Callable[[], Any]) -> Any:
    """What `create` gives; nothing where the server cannot be told, or could not a moment ago: each try
    costs a minute then."""
    execution = current.get()
    if time.monotonic() < execution.page_lost_until:
        return None
    try:
        return create()
    except Exception as error:  # noqa: BLE001 - what cannot be shown must not fail a stage
        if isinstance(error, httpx.TransportError):
            execution.page_lost_until = time.monotonic() + PAGE_LOST_SECONDS
        _log.warning("the Prefect page could not be told: %s", error)
        return None


def _key(text: str) -> str:
    """A Prefect artifact key: lowercase letters, digits, dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "table"
