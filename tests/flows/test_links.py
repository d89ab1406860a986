"""Where the page of a run sends its reader, and what serves it there."""

import json
import os
from pathlib import Path

import psutil
import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from flows.links import links, tags
from flows.prefect_server import Reports
from flows.runs import Home
from flows.services import AUTH, Service
from tests.flows.conftest import Place
from tests.flows.test_execution import go

RUN = "20260131-235959-1233f"


def note(home: Home, name: str, url: str) -> None:
    """A service that runs: this process."""
    (home.path / "services").mkdir(exist_ok=True)
    started = psutil.Process().create_time()
    service = Service(name=name, pid=os.getpid(), started=started, url=url)
    (home.path / "services" / f"{name}.json").write_text(service.model_dump_json())


def test_links_lead_to_what_is_served_and_paths_to_the_rest(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    execution = go(place)
    run_id = execution.record.run_id
    assert tags(execution) == ["tiny", run_id]
    page = execution.home.run_folder(RUN) / "report.html"
    execution.record.report = str(page)
    told = links(execution, "http://127.0.0.1:1/api")
    assert f"report: `{page}`" in told
    assert "MLflow" not in told
    # The embedded server has the report; another one has not.
    note(execution.home, "prefect", "http://127.0.0.1:1")
    assert f"[report](http://127.0.0.1:1/report/{RUN})" in links(
        execution, "http://127.0.0.1:1/api/"
    )
    assert f"report: `{page}`" in links(execution, "http://elsewhere/api")
    (execution.folder / "mlflow.json").write_text(json.dumps({"experiment": "7", "run": "abc"}))
    assert "`bessemer up` serves its page" in links(execution, "http://127.0.0.1:1/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking/")
    told = links(execution, "http://127.0.0.1:1/api")
    assert "[MLflow run](https://tracking/#/experiments/7/runs/abc)" in told


def test_reports_are_served_beside_the_pages_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)
    home.run_folder(RUN).mkdir(parents=True)
    (home.run_folder(RUN) / "report.html").write_text("<h1>钢</h1>", "utf-8")
    (tmp_path / "report.html").write_text("not of a run")
    client = TestClient(Reports(PlainTextResponse("another page"), home))
    assert client.get(f"/report/{RUN}").content.decode() == "<h1>钢</h1>"
    assert client.get("/api/health").text == "another page"
    for wrong in ("", "..", "%2e%2e", f"{RUN}/run.json", "20270131", "../runs/" + RUN):
        assert client.get(f"/report/{wrong}").text in ("no report", "another page")
    monkeypatch.setenv(AUTH, "somebody:secret")
    assert client.get(f"/report/{RUN}").status_code == 404
