"""Where a password or a token is set, nothing answers without it."""

import base64
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from flows.cached import run_cached
from flows.preparation import Request as Asked
from flows.preparation import prepare
from flows.runs import Home, open_home
from flows.services import prefect_environment, read_service
from tests.e2e.commands import Command
from tests.flows.conftest import RECIPE, Place
from tests.flows.conftest import place as place

PASSWORD = "anna:hunter2"
PROOF = f"Basic {base64.b64encode(PASSWORD.encode()).decode()}"


class Guarded(BaseHTTPRequestHandler):
    """Answers as Prefect does, those alone who show the password."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        is_known = self.headers.get("Authorization") == PROOF
        content = json.dumps([] if self.path.endswith("/filter") else {"id": "1"}).encode()
        self.send_response(200 if is_known else 401)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:  # type: ignore[override]
        """Quiet."""


def test_the_password_of_the_embedded_server_is_shown_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)
    monkeypatch.delenv("PREFECT_API_AUTH_STRING", raising=False)
    assert "PREFECT_API_AUTH_STRING" not in prefect_environment(home, "http://127.0.0.1:1/api")
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", PASSWORD)
    told = prefect_environment(home, "http://127.0.0.1:1/api")
    assert told["PREFECT_API_AUTH_STRING"] == PASSWORD
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and "hunter2" in path.read_text()
    ]


def test_a_run_of_hits_shows_the_password(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def go(api: str) -> list[str]:
        execution = prepare(Asked(str(place.recipe)), open_home(), base=place.folder)
        if not execution.lookup.find("mine"):
            execution.start()
            while name := execution.next_ready(execution.selected):
                execution.run(name)
            execution.finish(0.0)
            return []
        said: list[str] = []
        assert run_cached(execution, api, say=said.append)
        return said

    with HTTPServer(("127.0.0.1", 0), Guarded) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        api = f"http://127.0.0.1:{server.server_port}/api"
        go(api)
        monkeypatch.delenv("PREFECT_API_AUTH_STRING", raising=False)
        assert "answered with 401" in "".join(go(api))
        monkeypatch.setenv("PREFECT_API_AUTH_STRING", PASSWORD)
        assert go(api) == []
        server.shutdown()


@pytest.mark.soak
@pytest.mark.e2e
def test_with_a_password_nothing_of_prefect_answers_without_it(tmp_path: Path) -> None:
    bessemer = Command(tmp_path)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "one.txt").write_text("one 钢\n" * 4, "utf-8")
    (tmp_path / "tiny.yaml").write_text(RECIPE, "utf-8")
    password: dict[str, Any] = {"PREFECT_SERVER_API_AUTH_STRING": PASSWORD}
    try:
        bessemer("up", **password)
        service = read_service(bessemer.home, "prefect")
        assert service
        for path in ("flows/filter", "flow_runs/filter", "deployments/filter", "admin/version"):
            for shown in ({}, {"Authorization": f"Basic {base64.b64encode(b'anna:x').decode()}"}):
                headers = {"Content-Type": "application/json", **shown}
                request = Request(f"{service.url}/api/{path}", b"{}", headers, method="POST")
                with pytest.raises(HTTPError, match="401"):
                    urlopen(request, timeout=60)
        for _ in range(2):
            told = bessemer("run", "tiny.yaml", **password)
            assert "could not be told" not in told
        request = Request(
            f"{service.url}/api/flow_runs/filter",
            json.dumps({"flow_runs": {"name": {"like_": "tiny"}}}).encode(),
            {"Content-Type": "application/json", "Authorization": PROOF},
        )
        with urlopen(request, timeout=60) as answer:
            states = [run["state_type"] for run in json.load(answer)]
        assert states == ["COMPLETED"] * 2
    finally:
        bessemer("down", "--wait", **password)
