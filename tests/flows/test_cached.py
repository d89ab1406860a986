"""A run whose every stage is stored: taken in one go, told to Prefect, which it never imports."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from flows.cached import run_cached
from flows.execution import Listener
from flows.runs import open_home
from tests.flows.conftest import Place
from tests.flows.test_execution import ALL, go, start, statuses

NOWHERE = "http://127.0.0.1:9/api"
"""Nothing listens on the port for discarding."""


@dataclass
class Prefect:
    """Stands for the server: gives out ids and remembers what it was told."""

    api: str = ""
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list[tuple[str, dict[str, Any]]])

    def of(self, path: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.told if asked == path]


@pytest.fixture
def prefect() -> Iterator[Prefect]:
    known = Prefect()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known.told.append((self.path.removeprefix("/api/"), body))
            is_list = self.path.endswith("filter")
            answer = json.dumps([] if is_list else {"id": f"id-{len(known.told)}"}).encode()
            self.send_response(201)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:  # type: ignore[override]
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        known.api = f"http://127.0.0.1:{server.server_port}/api"
        yield known
        server.shutdown()


def test_everything_is_taken_and_the_page_is_told(place: Place, prefect: Prefect) -> None:
    built = go(place)
    place.ran()
    execution = start(place)
    assert run_cached(execution, prefect.api)
    assert place.ran() == []
    assert statuses(execution) == dict.fromkeys(ALL, "hit")
    digests = {name: stage.digest for name, stage in built.record.stages.items()}
    assert {name: stage.digest for name, stage in execution.record.stages.items()} == digests
    assert execution.record.status == "done"

    # A flow run for the whole, one below it for each part, each node a task that is called Cached.
    flows = {execution.graph.nodes[name].flow for name in ALL}
    assert {body["name"] for body in prefect.of("flows/")} == {"pipeline", *flows}
    tasks = {body["name"]: body for body in prefect.of("task_runs/")}
    for name in ALL:
        task = tasks[f"{name} {str(execution.record.stages[name].fingerprint)[:8]}"]
        assert task["state"]["name"] == "Cached"
        assert task["task_key"] == execution.record.stages[name].stage
    assert set(tasks) - flows == {
        f"{name} {str(execution.record.stages[name].fingerprint)[:8]}" for name in ALL
    }
    whole = prefect.of("flow_runs/")[0]
    assert whole["name"] == f"tiny {execution.record.run_id}"
    ended = [path for path, body in prefect.told if body.get("state", {}).get("message")]
    assert len([path for path in ended if path.endswith("set_state")]) == 1 + len(flows)


def test_what_a_full_run_notes_of_its_files_is_noted_too(place: Place, prefect: Prefect) -> None:
    built = go(place)
    execution = start(place)
    assert run_cached(execution, prefect.api)
    assert execution.record.stages["mine"].sources == built.record.stages["mine"].sources
    assert execution.record.stages["mine"].sources != {}
    assert execution.record.stages["blend"].inputs == built.record.stages["blend"].inputs


@pytest.mark.parametrize("options", [{"force": ("fine",)}, {"start": "fine"}])
def test_what_is_forced_is_left_to_a_full_run(
    place: Place, prefect: Prefect, options: dict[str, Any]
) -> None:
    go(place)
    execution = start(place, **options)
    assert not run_cached(execution, prefect.api)
    assert "hit" not in statuses(execution).values()
    assert prefect.told == []


def test_one_miss_leaves_everything_to_a_full_run(place: Place, prefect: Prefect) -> None:
    go(place)
    execution = start(place, "fine.heat=0.75")
    assert not run_cached(execution, prefect.api)
    assert set(statuses(execution).values()) == {"waiting"}
    assert prefect.told == []


def test_a_missing_file_is_a_miss(place: Place, prefect: Prefect) -> None:
    built = go(place)
    (built.lookup.artifacts["blend"].files / "a.txt").unlink()
    assert not run_cached(start(place), prefect.api)


def test_a_pin_counts_as_stored(place: Place, prefect: Prefect) -> None:
    built = go(place)
    pin = built.record.stages["coarse"].fingerprint
    place.recipe.write_text(
        place.recipe.read_text("utf-8").replace(
            "coarse: {uses: smelt,", f"coarse: {{uses: smelt, pin: {pin},"
        ),
        "utf-8",
    )
    execution = start(place)
    assert run_cached(execution, prefect.api)
    assert execution.record.stages["coarse"].fingerprint == pin


def test_until_takes_part_of_it(place: Place, prefect: Prefect) -> None:
    go(place)
    execution = start(place, until="coarse")
    assert run_cached(execution, prefect.api)
    found = statuses(execution)
    assert [name for name in ALL if found[name] == "hit"] == ["coarse", "mine"]
    assert found["blend"] == "skipped"


def test_a_server_that_cannot_be_told_harms_nothing(place: Place) -> None:
    go(place)
    execution = start(place)
    said: list[str] = []
    assert run_cached(execution, NOWHERE, say=said.append)
    assert execution.record.status == "done"
    assert said[-1].startswith("the Prefect page could not be told of this run: ")


def test_listeners_hear_of_every_node(place: Place, prefect: Prefect) -> None:
    go(place)
    execution = start(place)
    heard: list[str] = []
    execution.listeners.append(Listener(on_node=lambda name, node: heard.append(name)))
    assert run_cached(execution, prefect.api)
    assert heard == list(execution.selected)


def test_a_run_that_died_is_settled_by_a_full_run(place: Place, prefect: Prefect) -> None:
    dead = go(place).record
    dead.status, dead.ended, dead.pid = "running", None, 2**22 + 1
    dead.write(open_home().run_folder(dead.run_id))
    assert not run_cached(start(place), prefect.api)
