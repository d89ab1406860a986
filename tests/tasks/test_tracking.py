"""The forwarder: what MLflow shows in the end, whatever happened on the way."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.metrics_tail import MetricsTail
from tasks.tracking import EVENTS, OUTPUT, Tracking, flatten

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose MLflow database all tests of this file share: making one takes seconds."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="module")
def uri(home: Path) -> str:
    return f"sqlite:///{home / 'mlflow.db'}"


def runs(uri: str, run_id: str) -> dict[str, Any]:
    """Every run that MLflow has of one of ours, by its name."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("bessemer")
    assert experiment is not None
    wanted = f"tags.`bessemer.run_id` = '{run_id}'"
    return {
        run.data.tags["mlflow.runName"]: {
            "id": run.info.run_id,
            "status": run.info.status,
            "tags": run.data.tags,
            "params": run.data.params,
            "steps": {
                name: [
                    [point.step, point.value]
                    for point in client.get_metric_history(run.info.run_id, name)
                ]
                for name in run.data.metrics
            },
            "artifacts": [item.path for item in client.list_artifacts(run.info.run_id)],
        }
        for run in client.search_runs([experiment.experiment_id], wanted)
    }


def add(logs: Path, steps: range) -> None:
    """Append lines as a training job does."""
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / "metrics.jsonl").open("a") as stream:
        for step in steps:
            stream.write(json.dumps({"step": step, "time": 1e9 + step, "loss": 10.0 - step}) + "\n")


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def points(home: Path) -> int:
    """How many values the database has; 0 while it is being made."""
    try:
        with contextlib.closing(sqlite3.connect(home / "mlflow.db")) as database:
            return database.execute("select count(*) from metrics where key = 'loss'").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


@pytest.mark.slow
def test_a_run_with_a_cut_back_curve_and_a_killed_forwarder(home: Path, uri: str) -> None:
    run_dir = home / "runs" / "first"
    attempt, final = home / "attempt", home / "final"
    tracking = Tracking(run_dir, uri)
    tracking.start("demo", {"seed": 7, "data": "../数据"})
    tracking.stage_ended("extract", "hit", {"rows": 12}, stage="extract", fingerprint="e" * 64)
    tracking.stage_started(
        "train",
        attempt,
        stage="pretrain",
        fingerprint="f" * 64,
        settings={"launch": {"threads": 1}},
    )
    add(attempt, range(1, 6))
    first = tracking._forwarder  # pyright: ignore[reportPrivateUsage]
    assert first is not None
    wait_for(lambda: points(home) == 5)
    # The job is killed and resumes from step 3; the forwarder is killed too.
    first.kill()
    first.wait()
    (attempt / "metrics.jsonl").unlink()
    add(attempt, range(1, 9))
    (attempt / "samples.jsonl").write_text('{"step": 8, "prompt": "冬天", "text": "很冷。"}\n')
    table = {"样本 (zh)": [{"name": "冬天", "n": 3}, {"name": "雪", "low": 0.5}], "none": []}
    (attempt / "tables.json").write_text(json.dumps(table))
    attempt.rename(final)
    result = {"loss": 2.0, "shards": {"built": 4}, "note": "words", "is_good": True}
    tracking.stage_ended("train", "built", result, logs=final, fingerprint="f" * 64)
    tracking.stage_ended("ppo", "failed", stage="ppo", error="rank 1 was killed")
    (run_dir / "report.html").write_text("<h1>报告</h1>")
    tracking.end("failed", report=run_dir / "report.html")
    assert tracking.wait(60)

    found = runs(uri, "first")
    assert {name: run["status"] for name, run in found.items()} == {
        "first": "FAILED",
        "extract": "FINISHED",
        "train": "FINISHED",
        "ppo": "FAILED",
    }
    parent, train = found["first"], found["train"]
    assert train["tags"]["mlflow.parentRunId"] == parent["id"]
    assert train["tags"]["bessemer.stage"] == "pretrain"
    assert train["tags"]["bessemer.status"] == "built"
    assert train["params"] == {"launch.threads": "1"}
    # Each step once, although 1..5 were read by both forwarders.
    assert train["steps"]["loss"] == [[step, 10.0 - step] for step in range(1, 9)]
    assert train["steps"]["shards/built"] == [[0, 4.0]]
    assert found["extract"]["steps"]["rows"] == [[0, 12.0]]
    assert found["ppo"]["tags"]["bessemer.error"] == "rank 1 was killed"
    assert parent["params"] == {"seed": "7", "data": "../数据"}
    assert parent["tags"]["bessemer.recipe"] == "demo"
    assert parent["artifacts"] == ["report.html"]
    assert train["artifacts"] == ["samples.jsonl", "tables"]
    shown = json.loads(train["tags"]["mlflow.loggedArtifacts"])
    assert shown[0] == {"path": "tables/样本-zh.json", "type": "table"}
    (table_file,) = home.rglob("样本-zh.json")
    assert json.loads(table_file.read_text("utf-8")) == {
        "columns": ["name", "n", "low"],
        "data": [["冬天", 3, None], ["雪", None, 0.5]],
    }


def test_a_run_of_hits_alone_starts_no_forwarder(tmp_path: Path) -> None:
    tracking = Tracking(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    tracking.start("demo")
    tracking.stage_ended("extract", "hit", {"rows": 12})
    tracking.end("finished")
    assert [path.name for path in tmp_path.iterdir()] == [EVENTS]
    assert tracking.wait(0)


FLOW = """
import sys, time
from pathlib import Path
from tasks.tracking import Tracking
tracking = Tracking(Path(sys.argv[1]), sys.argv[2])
tracking.start("demo")
tracking.stage_started("train", Path(sys.argv[1]) / "logs")
print(tracking._forwarder.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_flow_leaves_no_open_run_and_a_retry_opens_it_again(home: Path, uri: str) -> None:
    run_dir = home / "runs" / "second"
    add(run_dir / "logs", range(1, 4))
    flow = subprocess.Popen(
        [sys.executable, "-c", FLOW, str(run_dir), uri], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert flow.stdout is not None
    forwarder = int(flow.stdout.readline())
    flow.kill()
    flow.wait()
    wait_for(lambda: not Path(f"/proc/{forwarder}").exists())
    assert {run["status"] for run in runs(uri, "second").values()} == {"KILLED"}

    add(run_dir / "logs", range(4, 6))
    tracking = Tracking(run_dir, uri)
    tracking.start("demo")
    tracking.stage_started("train", run_dir / "logs")
    tracking.stage_ended("train", "built", logs=run_dir / "logs")
    tracking.end("finished")
    assert tracking.wait(60)
    found = runs(uri, "second")
    assert {name: run["status"] for name, run in found.items()} == {
        "second": "FINISHED",
        "train": "FINISHED",
    }
    assert [step for step, _ in found["train"]["steps"]["loss"]] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_an_unreachable_server_costs_the_flow_nothing_and_loses_nothing(
    home: Path, uri: str
) -> None:
    run_dir = home / "runs" / "third"
    add(run_dir / "logs", range(1, 4))
    begin = time.monotonic()
    # Port 9 (discard) of this machine: nobody listens there.
    tracking = Tracking(run_dir, "http://127.0.0.1:9")
    tracking.start("demo")
    tracking.stage_started("train", run_dir / "logs")
    tracking.stage_ended("train", "built", logs=run_dir / "logs")
    tracking.end("finished")
    # One request alone is given 20 s.
    assert time.monotonic() - begin < 10
    wait_for(lambda: "Connection" in (run_dir / OUTPUT).read_text())
    assert not tracking.wait(0)
    lost = tracking._forwarder  # pyright: ignore[reportPrivateUsage]
    assert lost is not None
    lost.kill()
    assert len((run_dir / EVENTS).read_text().splitlines()) == 4

    arguments = [str(run_dir), "--pid", str(os.getpid())]
    subprocess.run(
        [sys.executable, "-m", "tasks.tracking", *arguments],
        check=True,
        cwd=ROOT,
        env={**os.environ, "MLFLOW_TRACKING_URI": uri},
    )
    found = runs(uri, "third")
    assert [step for step, _ in found["train"]["steps"]["loss"]] == [1, 2, 3]
    assert found["third"]["status"] == "FINISHED"


def read(tail: MetricsTail) -> list[int]:
    return [row["step"] for batch in tail.batches() for row in batch]


def test_the_tail_waits_for_whole_lines_and_leaves_out_broken_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert read(tail) == []
    path.write_text('{"step": 1}\n{"step": 2')
    assert read(tail) == [1]
    with path.open("a") as stream:
        stream.write('}\nnot json\n7\n{"step": 3}\n')
    assert read(tail) == [2, 3]
    assert read(tail) == []


def test_the_tail_starts_over_when_the_file_was_cut_and_has_grown_past_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    add(tmp_path, range(1, 5))
    tail = MetricsTail(path)
    assert read(tail) == [1, 2, 3, 4]
    lines = path.read_text().splitlines(keepends=True)
    # Cut back to step 2, then other lines of the same length, past the old end.
    path.write_text("".join(lines[:2]))
    with path.open("a") as stream:
        stream.writelines(line.replace('"loss"', '"lost"') for line in [*lines[2:], *lines[2:]])
    assert read(tail) == [1, 2, 3, 4, 3, 4]


def test_a_long_file_comes_in_batches_and_an_unsent_batch_comes_again(tmp_path: Path) -> None:
    add(tmp_path, range(2500))
    tail = MetricsTail(tmp_path / "metrics.jsonl")
    assert len(next(tail.batches())) == 1000
    # The sender failed before it asked for the next batch: the first one comes again.
    assert [len(batch) for batch in tail.batches()] == [1000, 1000, 500]


def test_figures_are_flattened_to_finite_numbers() -> None:
    figures = {"a": {"b": 1, "c": {"网页": 2.5}}, "x<y": 3, "t": "text", "nan": float("nan")}
    assert flatten({**figures, "is_x": True}) == {"a/b": 1.0, "a/c/网页": 2.5, "x_y": 3.0}
