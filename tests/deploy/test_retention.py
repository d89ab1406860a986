"""What docs/operations.md tells of MLflow's old runs, typed from the page."""

import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.deploy.compose import ROOT
from tests.deploy.test_backup import PAGE

DAY = 86_400


@pytest.mark.soak
def test_runs_that_ended_long_ago_go_and_the_others_stay(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    artifacts = tmp_path / "mlartifacts"
    experiment = client.create_experiment("bessemer", artifact_location=artifacts.as_uri())
    runs = {name: client.create_run(experiment).info.run_id for name in ("old", "new", "going")}
    for name, days in (("old", 91), ("new", 89)):
        client.log_text(runs[name], "钢", "report.html")
        client.log_metric(runs[name], "loss", 1.0)
        ended = int((time.time() - days * DAY) * 1000)
        client.set_terminated(runs[name], end_time=ended)
    scripts = Path(sys.executable).parent
    variables = {"PATH": f"{scripts}:{os.environ['PATH']}", "BESSEMER_HOME": str(tmp_path)}
    subprocess.run(
        ["sh", "-euc", PAGE["retention"]], cwd=ROOT, env={**os.environ, **variables}, check=True
    )
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        left = {row[0] for row in database.execute("select run_uuid from runs")}
        measured = {row[0] for row in database.execute("select run_uuid from metrics")}
    assert left == {runs["new"], runs["going"]}
    assert measured == {runs["new"]}
    assert [path.parents[1].name for path in artifacts.glob("*/artifacts/*")] == [runs["new"]]
