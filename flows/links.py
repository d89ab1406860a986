"""Where more is told of a run than on its Prefect page: its report and its run in MLflow."""

import json
import os
from pathlib import Path
from urllib.parse import urlsplit

from flows.execution import Execution
from flows.services import AUTH, REPORTS, read_service
from tasks.tracking import SENT

LINKS = "links"
"""Of the artifact on the run's page."""


def tags(execution: Execution) -> list[str]:
    """Of a run on the Prefect page: its recipe and its id."""
    return [execution.record.recipe, execution.record.run_id]


def links(execution: Execution, api: str) -> str:
    """Report and MLflow run as markdown; paths where nothing serves them.

    `api` is the Prefect interface that is told of the run: the embedded one also serves the reports.
    """
    lines = [f"run `{execution.record.run_id}`, recorded in `{execution.folder}`"]
    if report := execution.record.report:
        own = read_service(execution.home, "prefect")
        serves = own is not None and api.rstrip("/") == f"{own.url}/api" and AUTH not in os.environ
        # A run without work is given the report of the run that it repeats.
        page = f"{own.url}{REPORTS}{Path(report).parent.name}" if own and serves else ""
        lines.append(f"[report]({page})" if page else f"report: `{report}`")
    if tracked := _tracked(execution):
        lines.append(tracked)
    return "\n\n".join(lines)


def _tracked(execution: Execution) -> str:
    """The run in MLflow; empty where nothing was sent there, or not yet."""
    try:
        sent = json.loads((execution.folder / SENT).read_text("utf-8"))
    except FileNotFoundError:
        return ""
    named = _without_password(os.environ.get("MLFLOW_TRACKING_URI", ""))
    own = read_service(execution.home, "mlflow")
    server = named if named.startswith("http") else own.url if own and own.is_running else ""
    if not server:
        return f"MLflow run `{sent['run']}`; `bessemer up` serves its page"
    place = f"{server.rstrip('/')}/#/experiments/{sent['experiment']}/runs/{sent['run']}"
    return f"[MLflow run]({place})"


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
