"""A run whose every stage is in the store already, without the machinery of a run.

Nothing is scheduled and no engine is needed: what was found is noted, and the embedded Prefect server is
told of a finished flow with its parts and their cached tasks by its REST interface. To import Prefect
and let it run five flows costs two seconds of processor time, this a few tenths.
"""

import base64
import http.client
import json
import os
import socket
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from flows.closing import Say, attach_report
from flows.execution import Execution
from flows.links import LINKS, links, tags
from flows.runs import StageRecord, node_title

CACHED = "Cached"
"""Name of the state of a task whose artifact was in the store."""
PATIENCE_SECONDS = 30.0

State = dict[str, str]


def cached_message(stage: StageRecord) -> str:
    """What a cached task says of itself."""
    return f"{stage.stage} {stage.fingerprint}"


def run_cached(execution: Execution, api: str, *, say: Say = lambda text: None) -> bool:
    """Take everything from the store; False, with nothing done, where something has to be built.

    `api` is the address of the Prefect interface; trouble with it is told, and harms nothing.
    """
    if execution.home.dead_runs() or not execution.selected:
        return False
    started = time.monotonic()
    execution.start()
    if not execution.take_all():
        return False
    execution.finish(time.monotonic() - started)
    attach_report(execution, say)
    try:
        _tell(execution, api)
    except (OSError, http.client.HTTPException) as error:
        say(f"the Prefect page could not be told of this run: {type(error).__name__}: {error}")
    return True


class _Server:
    """One connection to a Prefect server."""

    def __init__(self, api: str) -> None:
        parts = urlsplit(api)
        self._prefix = parts.path
        password = os.environ.get("PREFECT_API_AUTH_STRING", "")
        proof = f"Basic {base64.b64encode(password.encode()).decode()}"
        self._proof = {"Authorization": proof} if password else {}
        self._connection = http.client.HTTPConnection(parts.netloc, timeout=PATIENCE_SECONDS)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Raises OSError where the server refuses."""
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **self._proof}
        self._connection.request("POST", f"{self._prefix}/{path}", content, headers)
        if self._connection.sock is not None:
            # The server sends head and body apart, the second when the first is acknowledged, for which
            # the kernel would take 40 ms; this holds for the next packets only.
            self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        answer = self._connection.getresponse()
        text = answer.read().decode("utf-8", "replace")
        if answer.status >= HTTPStatus.BAD_REQUEST:
            raise OSError(f"POST {path} was answered with {answer.status}: {text[:500]}")
        return json.loads(text)


def _tell(execution: Execution, api: str) -> None:
    """A flow run with a flow run for each part, in it a task run for each node; all completed."""
    server = _Server(api)
    nodes = execution.graph.nodes
    parts: dict[str, list[StageRecord]] = {}
    for name in execution.selected:
        parts.setdefault(nodes[name].flow, []).append(execution.record.stages[name])
    flows = _flows(server, ["pipeline", *parts])
    title = execution.record.title
    whole = _begin(server, flows["pipeline"], title, tags=tags(execution))
    for part, stages in parts.items():
        # The place of a subflow in its parent is a task run that stands for it.
        stands = _task(server, whole, part, part, {"type": "RUNNING"})
        run = _begin(server, flows[part], part, parent=stands)
        for stage in stages:
            state = {"type": "COMPLETED", "name": CACHED, "message": cached_message(stage)}
            _task(server, run, stage.stage, node_title(stage.node, stage.fingerprint), state)
        _complete(server, run, len(stages))
    text = {"type": "markdown", "data": links(execution, api)}
    server.post("artifacts/", {"key": LINKS, "flow_run_id": whole, **text})
    _complete(server, whole, len(execution.selected))


def _flows(server: _Server, names: list[str]) -> dict[str, str]:
    """Id of each flow; those that the server has not seen yet are made."""
    found = server.post("flows/filter", {"flows": {"name": {"any_": names}}})
    ids = {flow["name"]: flow["id"] for flow in found}
    for name in names:
        if name not in ids:
            ids[name] = server.post("flows/", {"name": name})["id"]
    return ids


def _begin(
    server: _Server, flow: str, name: str, *, parent: str | None = None, tags: Sequence[str] = ()
) -> str:
    body = {"flow_id": flow, "name": name, "state": {"type": "RUNNING"}, "tags": [*tags]}
    return server.post("flow_runs/", {**body, "parent_task_run_id": parent})["id"]


def _task(server: _Server, flow_run: str, task: str, name: str, state: State) -> str:
    body = {"flow_run_id": flow_run, "task_key": task, "dynamic_key": name, "name": name}
    return server.post("task_runs/", {**body, "state": state})["id"]


def _complete(server: _Server, flow_run: str, stages: int) -> None:
    state = {"type": "COMPLETED", "message": f"{stages} stages, {stages} from the store"}
    server.post(f"flow_runs/{flow_run}/set_state", {"state": state})
