"""The services as a team uses them: pages, deployments, watched folders, schedules, retries."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from playwright.sync_api import expect

from flows.runs import RunRecord
from flows.services import read_service
from tests.browser import chromium
from tests.e2e.commands import Command, of_home, wait_for
from tests.flows.conftest import RECIPE

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
REAL = ("-c", "from flows.cli import main; main()")
"""The command with the real stages, which the worker has too."""
NOTES = """
seed: 0
stages:
  extract: {sources: [{path: "notes/*.txt"}]}
"""
EXAMINED = """
seed: 0
stages:
  extract: {sources: [{path: "notes/*.txt"}]}
  decontaminate: {from: {corpus: extract}, exams: [{path: "exams/*.jsonl"}]}
"""


@pytest.fixture(scope="module")
def bessemer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """A folder whose services are up."""
    command = Command(tmp_path_factory.mktemp("work"), REAL)
    for name in ("raw", "notes"):
        (command.folder / name).mkdir()
    (command.folder / "raw" / "one.txt").write_text("one 钢\n" * 4, "utf-8")
    for name, recipe in (("tiny", RECIPE), ("notes", NOTES), ("examined", EXAMINED)):
        (command.folder / f"{name}.yaml").write_text(recipe, "utf-8")
    drop(command, "第一", "first")
    told = dict(line.split() for line in command("up").splitlines())
    assert told.keys() == {"prefect", "worker", "mlflow"}
    yield command
    command("down", "--wait")


def drop(bessemer: Command, name: str, text: str) -> Path:
    """A text with something of its own in it, in the folder that the recipes read."""
    file = bessemer.folder / "notes" / f"{name}.txt"
    file.write_text(f"The {text} story: 狐狸住在山洞里，每天早上吃蜂蜜。\n" * 5, "utf-8")
    return file


def write_exam(bessemer: Command) -> None:
    """What `examined.yaml` lacks."""
    question = {"text": "What does the fox eat every morning before the sun is up in the hills?"}
    (bessemer.folder / "exams").mkdir(exist_ok=True)
    (bessemer.folder / "exams" / "one.jsonl").write_text(json.dumps(question), "utf-8")


def deployments(bessemer: Command) -> dict[str, Any]:
    wait_for(lambda: len(bessemer.ask("deployments/filter", {})) == 5, seconds=120)
    return {item["name"]: item for item in bessemer.ask("deployments/filter", {})}


def begin(bessemer: Command, deployment: Any, **parameters: Any) -> str:
    """Start a run as the page does; its id."""
    body = {"parameters": parameters}
    return bessemer.ask(f"deployments/{deployment['id']}/create_flow_run", body)["id"]


def state_of(bessemer: Command, flow_run: str) -> str:
    body = {"flow_runs": {"id": {"any_": [flow_run]}}}
    return bessemer.ask("flow_runs/filter", body)[0]["state_type"]


def of_tag(bessemer: Command, tag: str) -> list[str]:
    """States of the flow runs with a tag."""
    found = bessemer.ask("flow_runs/filter", {"flow_runs": {"tags": {"all_": [tag]}}})
    return [run["state_type"] for run in found]


def planned(bessemer: Command) -> list[Any]:
    """Runs that the server has put down for schedules."""
    body = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    return [run for run in bessemer.ask("flow_runs/filter", body) if run["auto_scheduled"]]


def shards(bessemer: Command) -> dict[str, int]:
    """Shards of the newest run, built and reused."""
    newest = next(bessemer.home.records())
    return newest.stages["extract"].metrics["shards"]


def test_the_pages_open_and_the_form_is_typed_and_refuses(bessemer: Command) -> None:
    for name in ("prefect", "mlflow"):
        service = read_service(bessemer.home, name)
        assert service
        with urlopen(service.url, timeout=20) as page:
            assert b"<html" in page.read().lower()
    found = deployments(bessemer)
    assert found.keys() == {"full", "corpus", "pretraining", "alignment", "evaluation"}
    fields = found["corpus"]["parameter_openapi_schema"]["properties"]
    assert {"demo", "tiny.yaml"} <= set(fields["recipe"]["enum"])  # of the folder of `up` too
    assert {"pretrain", "blend"} <= set(fields["force"]["items"]["enum"])
    assert all(field["description"] for field in fields.values())
    assert found["corpus"]["parameters"]["part"] == "corpus"
    for wrong in (
        {"recipe": "dmeo"}, {"until": "pretrian"}, {"overrides": ["seed 3"]}, {"part": "all"},
        {"is_trial": "perhaps"},
    ):  # fmt: skip
        with pytest.raises(HTTPError) as refused:
            begin(bessemer, found["corpus"], **wrong)
        assert refused.value.code == 409
        assert next(iter(wrong)) in refused.value.read().decode()


def test_a_dry_run_shows_the_plan_of_its_part(bessemer: Command) -> None:
    trial = begin(bessemer, deployments(bessemer)["corpus"], is_trial=True)
    wait_for(lambda: state_of(bessemer, trial) == "COMPLETED", seconds=120)
    plan = bessemer.ask("artifacts/filter", {"artifacts": {"key": {"any_": ["plan"]}}})
    assert '"node": "tokenize"' in str(plan[0]["data"])
    assert '"node": "pretrain"' not in str(plan[0]["data"])  # belongs to another part


def test_a_new_file_starts_one_run_that_works_on_it_alone(bessemer: Command) -> None:
    notes = bessemer.folder / "notes"
    wait = ("--settle-seconds", "1")
    assert "rebuilds notes.yaml" in bessemer("watch", "notes", "notes.yaml", *wait)
    wait_for(lambda: of_tag(bessemer, "watch") == ["COMPLETED"], seconds=120)
    assert shards(bessemer) == {"built": 1, "reused": 0}
    # Something half-written, something dropped twice, and one new file.
    (notes / "copy.txt").write_bytes((notes / "第一.txt").read_bytes())
    (notes / "upload.txt.part").write_text("The beginning of")
    drop(bessemer, "second", "second")
    wait_for(lambda: of_tag(bessemer, "watch") == ["COMPLETED"] * 2, seconds=120)
    told = json.loads(bessemer("status", "--json"))
    assert told["services"].keys() == {"watcher", "worker", "prefect", "mlflow"}
    time.sleep(6)  # it looks every five seconds
    assert of_tag(bessemer, "watch") == ["COMPLETED"] * 2
    assert bessemer("watch", "notes", "--end") == ""


def test_a_schedule_is_put_replaced_and_outlives_the_worker(bessemer: Command) -> None:
    bessemer("deploy", "notes.yaml", "--every-minutes", "90")
    told = bessemer("deploy", "notes.yaml", "seed=3", "--extend", "--cron", "0 3 * * *")
    assert told.split() == [
        "full:",
        "notes.yaml",
        "seed=3",
        "--extend,",
        "0",
        "3",
        "*",
        "*",
        "*",
        "UTC",
    ]
    worker = read_service(bessemer.home, "worker")
    assert worker
    os.kill(worker.pid, signal.SIGTERM)
    wait_for(lambda: not worker.is_running)
    bessemer("up")
    known = bessemer.ask("deployments/filter", {"deployments": {"name": {"any_": ["full"]}}})
    assert not known[0]["paused"]
    (schedule,) = known[0]["schedules"]
    assert schedule["active"]
    assert schedule["schedule"]["cron"] == "0 3 * * *"
    wait_for(lambda: planned(bessemer))
    assert all(run["parameters"]["overrides"] == ["seed=3"] for run in planned(bessemer))
    assert bessemer("deploy", "notes.yaml", "--end") == ""


def test_a_failed_run_retried_from_the_page_takes_what_was_built(bessemer: Command) -> None:
    failing = begin(bessemer, deployments(bessemer)["full"], recipe="examined.yaml")
    wait_for(lambda: state_of(bessemer, failing) == "FAILED", seconds=120)
    write_exam(bessemer)
    state = {"type": "SCHEDULED", "name": "AwaitingRetry"}
    bessemer.ask(f"flow_runs/{failing}/set_state", {"state": state})
    wait_for(lambda: state_of(bessemer, failing) == "COMPLETED", seconds=120)
    newest = next(bessemer.home.records())
    statuses = {name: stage.status for name, stage in newest.stages.items()}
    assert statuses == {"extract": "hit", "decontaminate": "built"}


@pytest.mark.soak
def test_a_cron_run_fires_unattended_and_builds_nothing(bessemer: Command) -> None:
    bessemer("run", "notes.yaml")
    before = len(list(bessemer.home.records()))
    bessemer("deploy", "notes.yaml", "--cron", "* * * * *")
    wait_for(lambda: len(list(bessemer.home.records())) > before, seconds=240)
    wait_for(lambda: next(bessemer.home.records()).status == "done", seconds=60)
    newest: RunRecord = next(bessemer.home.records())
    assert {stage.status for stage in newest.stages.values()} == {"hit"}
    bessemer("deploy", "notes.yaml", "--end")


@pytest.mark.soak
def test_the_form_is_filled_in_a_browser_and_shows_the_plan(bessemer: Command) -> None:
    deployment = deployments(bessemer)["corpus"]
    service = read_service(bessemer.home, "prefect")
    assert service
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 1700})
        page.set_default_timeout(60_000)
        page.goto(f"{service.url}/deployments/deployment/{deployment['id']}/run")
        page.get_by_role("button", name="Add item").click()
        override = page.locator("fieldset textarea").first
        override.fill("seed 3")
        page.locator("fieldset label[role=switch]").last.click()  # a dry run
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_text("'seed 3' does not match")).to_be_visible()
        override.fill("seed=3")
        page.get_by_role("button", name="Submit").click()
        page.wait_for_url(lambda url: not url.endswith("/run"))
        runs = bessemer.ask("flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC"})
        assert runs[0]["parameters"]["overrides"] == ["seed=3"]
        page.goto(f"{service.url}/runs/flow-run/{runs[0]['id']}")
        page.get_by_text("Completed", exact=True).first.wait_for()
        page.get_by_text("Artifacts", exact=True).first.click()
        page.get_by_text("what a run of demo would do").first.click()
        expect(page.get_by_text("never built").first).to_be_visible()


@pytest.mark.soak
def test_a_failed_run_is_retried_by_the_button_of_its_page(bessemer: Command) -> None:
    for file in (bessemer.folder / "exams").glob("*"):
        file.unlink()
    drop(bessemer, "third", "third")
    failing = begin(bessemer, deployments(bessemer)["full"], recipe="examined.yaml")
    wait_for(lambda: state_of(bessemer, failing) == "FAILED", seconds=120)
    write_exam(bessemer)
    service = read_service(bessemer.home, "prefect")
    assert service
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(f"{service.url}/runs/flow-run/{failing}")
        page.get_by_role("button", name="Retry").first.click()
        page.get_by_role("dialog").get_by_role("button", name="Retry").click()
        wait_for(lambda: state_of(bessemer, failing) == "COMPLETED", seconds=120)
    newest = next(bessemer.home.records())
    assert newest.stages["extract"].status == "hit"


def test_down_waits_for_a_run_and_leaves_no_process(bessemer: Command) -> None:
    tiny = Command(bessemer.folder)
    cancelled = tiny.start("run", "tiny.yaml", "coarse.seconds=300")
    wait_for(lambda: "coarse" in tiny.ran())
    waiting = bessemer.start("down", "--wait")
    time.sleep(1)
    cancelled.send_signal(signal.SIGINT)
    _, err = cancelled.communicate(timeout=180)
    assert cancelled.returncode == 130, err
    assert "Traceback" not in err
    out, _ = waiting.communicate(timeout=180)
    assert "worker, mlflow, prefect" in out
    wait_for(lambda: not of_home(bessemer.home), seconds=120)
