"""The command line against a real embedded Prefect server, in processes of its own."""

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from flows.runs import Home, RunRecord
from flows.services import read_service
from tests.e2e.commands import ROOT, Command, of_home, wait_for
from tests.flows.conftest import RECIPE

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def bessemer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    folder = tmp_path_factory.mktemp("work")
    (folder / "raw").mkdir()
    for name in ("one", "two"):
        text = "".join(f"{name} {line} 钢\n" for line in range(4))
        (folder / "raw" / f"{name}.txt").write_text(text, "utf-8")
    (folder / "tiny.yaml").write_text(RECIPE, "utf-8")
    command = Command(folder)
    yield command
    command("down", "--wait")


def logged_stages(home: Home) -> set[str]:
    """Names of the finished runs in the home's MLflow."""
    with closing(sqlite3.connect(home.path / "mlflow.db")) as connection:
        if not connection.execute("select 1 from sqlite_master where name = 'runs'").fetchall():
            return set()
        rows = connection.execute("select name from runs where status = 'FINISHED'").fetchall()
    return {name for (name,) in rows}


def test_a_wrong_recipe_is_refused_quickly_and_starts_nothing(bessemer: Command) -> None:
    started = time.monotonic()
    process = bessemer.start("run", "tiny.yaml", "coarse.haet=0.1")
    _, err = process.communicate(timeout=180)
    usage = time.monotonic() - started
    assert process.returncode == 2
    assert "stages.coarse.haet: unknown key; did you mean 'heat'?" in err
    assert "nothing was started" in err
    assert not bessemer.home.path.exists()
    assert usage < 20  # of a busy machine; its own time is measured below


def test_a_wrong_recipe_costs_less_than_two_seconds_of_its_own(bessemer: Command) -> None:
    code = (
        "import resource, subprocess, sys;"
        "subprocess.run([sys.executable, '-m', 'flows.cli_main', 'run', 'dmeo'], stderr=-3);"
        "u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime)"
    ).replace("'-m', 'flows.cli_main'", "'-c', 'from flows.cli import main; main()'")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=bessemer.environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert float(done.stdout) < 2.0


def test_a_wrong_recipe_never_imports_prefect(bessemer: Command) -> None:
    code = (
        "import sys; from flows.cli import main; sys.argv[1:] = ['run', 'dmeo']\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 2\n"
        "heavy = {'prefect', 'torch', 'mlflow', 'polars', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], env=bessemer.environment(), cwd=ROOT, check=True)


def test_a_run_builds_then_everything_is_cached(bessemer: Command) -> None:
    first = json.loads(bessemer("run", "tiny.yaml", "--json", BESSEMER_TRACKING="on"))
    wait_for(lambda: logged_stages(bessemer.home) == {first["run_id"], *first["stages"]})
    assert {stage["status"] for stage in first["stages"].values()} == {"built"}
    assert bessemer.ran() == ["blend", "coarse", "fine", "mine", "other"]
    service = read_service(bessemer.home, "prefect")
    second = bessemer.json("run", "tiny.yaml")
    assert {stage["status"] for stage in second["stages"].values()} == {"hit"}
    assert bessemer.ran() == []
    assert second["report"] == first["report"]  # of the same artifacts, so it is not drawn again
    assert read_service(bessemer.home, "prefect") == service  # no second server

    runs = bessemer.ask("flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC"})
    ours = next(run for run in runs if run["name"] == f"tiny {second['run_id']}")
    assert ours["state_type"] == "COMPLETED"
    parents = {"parent_flow_run_id": {"any_": [ours["id"]]}}
    parts = bessemer.ask("flow_runs/filter", {"flow_runs": parents})
    assert {part["state_type"] for part in parts} == {"COMPLETED"}
    below = {"flow_runs": {"id": {"any_": [part["id"] for part in parts]}}, "limit": 200}
    tasks = bessemer.ask("task_runs/filter", below)
    prints = {name: stage["fingerprint"][:8] for name, stage in second["stages"].items()}
    cached = {task["name"] for task in tasks if task["state_name"] == "Cached"}
    assert {f"{name} {digits}" for name, digits in prints.items()} == cached
    artifacts = bessemer.ask("artifacts/filter", {"limit": 200})
    assert {"mine", "mine-files", "blend"} <= {artifact["key"] for artifact in artifacts}


def test_a_run_without_work_costs_less_than_two_seconds_of_its_own(bessemer: Command) -> None:
    bessemer("run", "tiny.yaml")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    bessemer("run", "tiny.yaml", BESSEMER_TRACKING="on")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: what the clock says depends on who else uses the machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
    newest = next(bessemer.home.records())
    assert {stage.status for stage in newest.stages.values()} == {"hit"}
    assert not (bessemer.home.run_folder(newest.run_id) / "tracking.log").exists()


def test_a_run_without_work_imports_neither_prefect_nor_numpy(bessemer: Command) -> None:
    bessemer("run", "tiny.yaml")
    code = (
        "import sys; from tasks import stage as registry\n"
        "from tests.flows.tiny_stages import tiny_stages\n"
        "registry.stages = tiny_stages\n"
        "from flows.cli import main; sys.argv[1:] = ['run', 'tiny.yaml', '--json']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'prefect', 'torch', 'mlflow', 'polars', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        env=bessemer.environment(),
        cwd=bessemer.folder,
        stdout=subprocess.DEVNULL,
        check=True,
    )


def test_what_looks_at_results(bessemer: Command) -> None:
    run = bessemer.json("run", "tiny.yaml")
    plan = bessemer.json("plan", "tiny.yaml", "coarse.heat=0.25")
    assert plan["stages"]["mine"]["status"] == "hit"
    assert plan["stages"]["coarse"]["why"] == "settings.heat: 0.5 -> 0.25"
    assert bessemer.json("status")["run"] == run
    assert bessemer.json("status")["services"].keys() == {"prefect"}
    assert bessemer.json("runs")[0]["run_id"] == run["run_id"]
    assert json.loads(bessemer("show", "blend"))["kind"] == "steel"
    lineage = bessemer.json("lineage", "blend")
    assert lineage["inputs"]["ores.a"]["inputs"]["ore"]["node"] == "coarse"
    assert "ores.b" in bessemer("lineage", "blend")
    assert '"file": "a.txt"' in bessemer("cat", "blend")
    assert "name a node such as" in bessemer("cat", "blend", "--dropped", expect=2)
    assert "see `bessemer runs`" in bessemer("show", "blnd", expect=2)
    assert bessemer.json("verify", "--full") == {"checked": 7, "damaged": []}


def test_a_failed_stage_is_status_1_and_can_be_run_again(bessemer: Command) -> None:
    fault = bessemer.folder / "fault"
    fault.touch()
    told = bessemer.json("run", "tiny.yaml", "other.heat=0.9", f"other.fails={fault}", expect=1)
    statuses = {name: stage["status"] for name, stage in told["stages"].items()}
    assert statuses["other"] == "failed"
    assert statuses["blend"] == "skipped"
    assert statuses["fine"] == "hit"
    assert "the furnace is cold" in told["stages"]["other"]["error"]
    fault.unlink()
    bessemer("run", "tiny.yaml", "other.heat=0.9", f"other.fails={fault}")


def test_flipped_and_missing_files_are_named_and_only_they_are_rebuilt(bessemer: Command) -> None:
    run = bessemer.json("run", "tiny.yaml")
    bessemer.ran()
    flipped = Path(run["stages"]["coarse"]["path"]) / "files" / "ore.txt"
    flipped.write_bytes(b"X" + flipped.read_bytes()[1:])
    (Path(run["stages"]["blend"]["path"]) / "files" / "a.txt").unlink()
    told = bessemer.json("verify", "--full", expect=1)
    assert {item["node"] for item in told["damaged"]} == {"coarse", "blend"}
    again = bessemer.json("run", "tiny.yaml")
    assert bessemer.ran() == ["blend", "coarse"]
    digests = [{n: s["digest"] for n, s in told["stages"].items()} for told in (run, again)]
    assert digests[0] == digests[1]


def test_ctrl_c_is_130_and_the_next_run_goes_on(bessemer: Command) -> None:
    arguments = ("run", "tiny.yaml", "coarse.heat=0.75", "coarse.seconds=300")
    process = bessemer.start(*arguments)
    wait_for(lambda: "coarse" in bessemer.ran())
    refused = bessemer.start("down")
    told = refused.communicate(timeout=180)[1]
    run_id = next(bessemer.home.records()).run_id
    assert refused.returncode == 1
    assert f"in use by the run {run_id} (tiny, process {process.pid})" in " ".join(told.split())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 130, out + err
    assert "Traceback" not in out + err
    newest = next(bessemer.home.records())
    assert newest.status == "cancelled"
    assert newest.stages["coarse"].status == "failed"
    assert newest.stages["fine"].status == "skipped"
    done = bessemer.json("run", "tiny.yaml", "coarse.heat=0.75", "coarse.seconds=0")
    assert done["stages"]["coarse"]["status"] == "built"


def test_a_killed_run_is_told_as_died_and_can_be_run_again(bessemer: Command) -> None:
    arguments = ("run", "tiny.yaml", "fine.heat=0.75", "fine.seconds=300")
    process = bessemer.start(*arguments)
    bessemer.ran()
    wait_for(lambda: "fine" in bessemer.ran())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert bessemer.json("status")["state"] == "died"
    bessemer.ran()
    bessemer("run", "tiny.yaml", "fine.heat=0.75", "fine.seconds=0")
    assert bessemer.ran() == ["blend", "fine"]


def test_gc_keeps_what_the_newest_runs_made(bessemer: Command) -> None:
    bessemer("run", "tiny.yaml", "coarse.heat=0.3")
    bessemer("run", "tiny.yaml")
    bessemer.ran()
    trial = bessemer.json("gc", "--keep-runs", "1", "--dry-run")
    removed = bessemer.json("gc", "--keep-runs", "1")
    assert len(removed["removed"]) == len(trial["removed"]) > 0
    bessemer("run", "tiny.yaml")
    assert bessemer.ran() == []


def test_init_makes_a_project_whose_recipe_is_sound_but_for_its_data(bessemer: Command) -> None:
    bessemer("init", "project")
    folder = bessemer.folder / "project"
    assert (folder / "data" / "raw").is_dir()
    err = bessemer("init", "project", expect=2)
    assert "exists" in err


def test_the_record_of_every_run_can_be_read(bessemer: Command) -> None:
    records = list(bessemer.home.records())
    assert len(records) > 5
    assert all(isinstance(record, RunRecord) for record in records)
    assert [r.run_id for r in records] == sorted((r.run_id for r in records), reverse=True)


def test_an_idle_server_ends_by_itself(bessemer: Command) -> None:
    bessemer("down", "--wait")
    bessemer("run", "tiny.yaml", BESSEMER_IDLE_SECONDS="2")
    service = read_service(bessemer.home, "prefect")
    assert service
    wait_for(lambda: not service.is_running, seconds=120)
    wait_for(lambda: not of_home(bessemer.home), seconds=120)
