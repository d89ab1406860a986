"""The services as a team uses them: pages, deployments, watched folders, schedules, retries."""

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from playwright.sync_api import Page, expect

from flows.runs import RunRecord
from flows.services import Service, read_service
from tasks.processes import is_alive
from tests.browser import chromium, shoot
from tests.e2e.commands import Command, of_home, wait_for
from tests.flows.conftest import RECIPE
from tests.tasks.launching import processes_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
REAL = ("-c", "from flows.cli import main; main()")
"""The command with the real stages, which the worker has too."""
NOTES = """
stages:
  extract: {sources: [{path: "notes/*.txt"}]}
"""
EXAMINED = NOTES + '  decontaminate: {from: {corpus: extract}, exams: [{path: "exams/*.jsonl"}]}\n'
TRAINING = """
seed: 0
launch: {threads: 1, checkpoint_seconds: 3}
shape: {dim: 32, layers: 1, heads: 2, kv_heads: 1, context: 64}
stages:
  extract:
    sources:
      - {path: "texts/*.jsonl", domain: old}
      - {path: "fresh/*.jsonl", domain: new, is_optional: true}
  tokenizer: {from: {corpus: extract}, vocabulary: 300}
  tokenize: {from: {corpus: extract, tokenizer: tokenizer}}
  pretrain:
    from: {tokens: tokenize}
    tokens: 50000000
    batch_tokens: 512
    held_tokens: 0
    evaluate_every_steps: 0
"""
RETRY = {"type": "SCHEDULED", "name": "AwaitingRetry"}
PATIENT = 600.0
"""Seconds for what takes a few when the machine is idle."""


@pytest.fixture(scope="module")
def bessemer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """A folder whose services are up."""
    command = Command(tmp_path_factory.mktemp("work"), REAL)
    for name in ("raw", "notes", "texts", "fresh"):
        (command.folder / name).mkdir()
    (command.folder / "raw" / "one.txt").write_text("one 钢\n" * 4, "utf-8")
    recipes = {"tiny": RECIPE, "notes": NOTES, "examined": EXAMINED, "training": TRAINING}
    for name, recipe in recipes.items():
        (command.folder / f"{name}.yaml").write_text(recipe, "utf-8")
    drop(command, "第一", "first")
    write_story(command.folder / "texts" / "old.jsonl", seed=1)
    told = dict(line.split() for line in command("up", timeout=PATIENT).splitlines())
    assert told.keys() == {"prefect", "worker", "mlflow"}
    yield command
    command("down", "--wait")


def write_story(file: Path, *, seed: int) -> None:
    """150 documents, some 100 kB, of sentences that are easily learnt."""
    chosen = random.Random(seed)
    animals = ["fox", "bear", "heron", "mouse", "otter", "wolf"]
    foods = ["honey", "fish", "apples", "roots"]
    sentences = [
        f"The {chosen.choice(animals)} eats {chosen.choice(foods)} at {chosen.randrange(24)} o'clock, "
        f"狐狸在第{chosen.randrange(1000)}天吃蜂蜜。"
        for _ in range(1500)
    ]
    texts = ("\n".join(sentences[first : first + 10]) for first in range(0, 1500, 10))
    rows = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    file.write_text("\n".join(rows), "utf-8")


def drop(bessemer: Command, name: str, text: str) -> Path:
    """A text with something of its own in it, in the folder that the recipes read."""
    file = bessemer.folder / "notes" / f"{name}.txt"
    file.write_text(f"The {text} story: 狐狸住在山洞里，每天早上吃蜂蜜。\n" * 5, "utf-8")
    return file


def write_exam(bessemer: Command, *, is_broken: bool = False) -> None:
    """What `examined.yaml` lacks; a broken line fails the stage that reads it, not those before."""
    question = {"text": "What does the fox eat every morning before the sun is up in the hills?"}
    (bessemer.folder / "exams").mkdir(exist_ok=True)
    (bessemer.folder / "exams" / "one.jsonl").write_text(json.dumps(question)[is_broken:], "utf-8")


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


@contextmanager
def page_of(bessemer: Command, path: str) -> Generator[Page]:
    """A page of the home's Prefect server."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 1700})
        page.set_default_timeout(PATIENT * 1000)
        page.goto(f"{page_url(bessemer)}/{path}")
        yield page


def page_url(bessemer: Command) -> str:
    service = read_service(bessemer.home, "prefect")
    assert service
    return service.url


def choose(page: Page, shown: str, wanted: str) -> None:
    """Choose an entry of the form's select that shows another."""
    page.get_by_role("button", name=shown, exact=True).first.focus()
    page.keyboard.press("ArrowDown")
    page.get_by_role("option", name=wanted, exact=True).click()


def cancel(bessemer: Command, flow_run: str) -> None:
    """Press the button on the page of a run, until it is shown as cancelled."""
    with page_of(bessemer, f"runs/flow-run/{flow_run}") as page:
        page.get_by_role("button", name="Cancel").first.click()
        page.get_by_role("dialog").get_by_role("button", name="Confirm").click()
        page.get_by_role("dialog").wait_for(state="hidden")
        wait_for(lambda: state_of(bessemer, flow_run) == "CANCELLED", seconds=PATIENT)
        shoot(page, "cancelled")


def end_worker(bessemer: Command, *others: int) -> None:
    """kill -9."""
    worker = read_service(bessemer.home, "worker")
    assert worker
    for pid in (worker.pid, *others):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(is_alive(pid) for pid in (worker.pid, *others)))


def end_server(bessemer: Command) -> Service:
    """kill -9."""
    server = read_service(bessemer.home, "prefect")
    assert server
    os.kill(server.pid, signal.SIGKILL)
    wait_for(lambda: not server.is_running)
    return server


def steps(bessemer: Command) -> int:
    """Of the training that goes on or was stopped."""
    found = (bessemer.home.path / "store" / "attempts").glob("*/*/logs/metrics.jsonl")
    return max((file.read_bytes().count(b"\n") for file in found), default=0)


def job_of(bessemer: Command) -> list[int]:
    """Processes of the training job."""
    attempts = bessemer.home.path / "store" / "attempts"
    return [pid for attempt in attempts.glob("*/*") for pid in processes_of(attempt)]


def runs_since(bessemer: Command, first: RunRecord) -> list[RunRecord]:
    """Ended runs after one, newest first."""
    newer = itertools.takewhile(lambda r: r.run_id != first.run_id, bessemer.home.records())
    return [record for record in newer if record.status != "running"]


def built_since(bessemer: Command, first: RunRecord, stage: str) -> list[RunRecord]:
    """Those that have built a stage."""
    newer = runs_since(bessemer, first)
    return [r for r in newer if stage in r.stages and r.stages[stage].status == "built"]


def losses(record: RunRecord) -> list[float]:
    """Of each step of the run's pretraining."""
    logs = Path(str(record.stages["pretrain"].path), "logs", "metrics.jsonl")
    return [json.loads(line)["loss"] for line in logs.read_text().splitlines()]


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
    assert " ".join(told.split()) == "full: notes.yaml seed=3 --extend, 0 3 * * * UTC"
    worker = read_service(bessemer.home, "worker")
    assert worker
    os.kill(worker.pid, signal.SIGTERM)
    wait_for(lambda: not worker.is_running)
    bessemer("up", timeout=PATIENT)
    known = bessemer.ask("deployments/filter", {"deployments": {"name": {"any_": ["full"]}}})
    assert not known[0]["paused"]
    (schedule,) = known[0]["schedules"]
    assert schedule["active"]
    assert schedule["schedule"]["cron"] == "0 3 * * *"
    wait_for(lambda: planned(bessemer))
    assert all(run["parameters"]["overrides"] == ["seed=3"] for run in planned(bessemer))
    assert bessemer("deploy", "notes.yaml", "--end") == ""


def test_a_failed_run_retried_from_the_page_takes_what_was_built(bessemer: Command) -> None:
    write_exam(bessemer, is_broken=True)
    failing = begin(bessemer, deployments(bessemer)["full"], recipe="examined.yaml")
    wait_for(lambda: state_of(bessemer, failing) == "FAILED", seconds=120)
    write_exam(bessemer)
    bessemer.ask(f"flow_runs/{failing}/set_state", {"state": RETRY})
    wait_for(lambda: state_of(bessemer, failing) == "COMPLETED", seconds=120)
    newest = next(bessemer.home.records())
    statuses = {name: stage.status for name, stage in newest.stages.items()}
    assert statuses == {"extract": "hit", "decontaminate": "built"}
    told = bessemer.ask("logs/filter", {"logs": {"flow_run_id": {"any_": [failing]}}})
    assert "failed: decontaminate" in str(told)
    assert "Traceback" not in str(told)  # of Prefect's own calls, after what has failed


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
def test_a_run_from_the_form_is_watched_to_its_end_and_repeated(bessemer: Command) -> None:
    with page_of(
        bessemer, f"deployments/deployment/{deployments(bessemer)['corpus']['id']}/run"
    ) as page:
        page.get_by_role("button", name="Add item").click()
        override = page.locator("fieldset textarea").first
        override.fill("seed 3")
        choose(page, "demo", "notes.yaml")
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_text("'seed 3' does not match")).to_be_visible()
        shoot(page, "form-refused")
        override.fill("seed=3")
        page.get_by_role("button", name="Submit").click()
        page.wait_for_url(lambda url: not url.endswith("/run"))
        run = bessemer.ask("flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC"})[0]
        assert run["parameters"]["recipe"] == "notes.yaml"
        assert run["parameters"]["overrides"] == ["seed=3"]
        page.goto(f"{page_url(bessemer)}/runs/flow-run/{run['id']}")
        page.get_by_text("Completed", exact=True).first.wait_for(timeout=PATIENT * 1000)
        shoot(page, "run-completed")
        page.get_by_text("Artifacts", exact=True).first.click()
        page.get_by_text("links", exact=True).first.click()
        with page.expect_popup() as opened:
            page.get_by_role("link", name="report", exact=True).click()
        expect(opened.value.get_by_text("extract").first).to_be_visible()
        shoot(opened.value, "report")
    newest = next(bessemer.home.records())
    assert newest.flow_run == run["id"]
    tags = bessemer.ask("flow_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})[0]["tags"]
    assert tags == [newest.run_id, "bessemer", "notes"]


@pytest.mark.soak
def test_a_dry_run_from_the_form_of_full_shows_the_plan(bessemer: Command) -> None:
    with page_of(
        bessemer, f"deployments/deployment/{deployments(bessemer)['full']['id']}/run"
    ) as page:
        page.locator("fieldset label[role=switch]").last.click()
        page.get_by_role("button", name="Submit").click()
        page.wait_for_url(lambda url: not url.endswith("/run"))
        run = bessemer.ask("flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC"})[0]
        page.goto(f"{page_url(bessemer)}/runs/flow-run/{run['id']}")
        page.get_by_text("Completed", exact=True).first.wait_for(timeout=PATIENT * 1000)
        page.get_by_text("Artifacts", exact=True).first.click()
        page.get_by_text("what a run of demo would do").first.click()
        expect(page.get_by_text("never built").first).to_be_visible()
        shoot(page, "dry-run")


@pytest.mark.soak
def test_a_failed_run_is_retried_by_the_button_of_its_page(bessemer: Command) -> None:
    write_exam(bessemer, is_broken=True)
    drop(bessemer, "third", "third")
    failing = begin(bessemer, deployments(bessemer)["full"], recipe="examined.yaml")
    wait_for(lambda: state_of(bessemer, failing) == "FAILED", seconds=PATIENT)
    write_exam(bessemer)
    with page_of(bessemer, f"runs/flow-run/{failing}") as page:
        page.get_by_role("button", name="Retry").first.click()
        page.get_by_role("dialog").get_by_role("button", name="Retry").click()
        wait_for(lambda: state_of(bessemer, failing) == "COMPLETED", seconds=PATIENT)
        body = {"flow_runs": {"name": {"any_": ["corpus"]}}, "sort": "START_TIME_DESC"}
        newest_part = bessemer.ask("flow_runs/filter", body)[0]
        page.goto(f"{page_url(bessemer)}/runs/flow-run/{newest_part['id']}")
        page.get_by_text("Task Runs", exact=True).first.click()
        page.get_by_text("Cached", exact=True).first.wait_for()
        shoot(page, "retry-cached")
    newest = next(bessemer.home.records())
    assert newest.stages["extract"].status == "hit"


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_training_outlives_its_worker_and_ends_by_the_button_of_its_page(
    bessemer: Command,
) -> None:
    training = begin(bessemer, deployments(bessemer)["pretraining"], recipe="training.yaml")
    wait_for(lambda: steps(bessemer) > 100, seconds=PATIENT)
    job = job_of(bessemer)
    (attempt,) = (bessemer.home.path / "store" / "attempts").glob("*/*")
    assert all(is_alive(pid) for pid in job)

    # kill -9 of the worker and of the run's own process: the next worker goes on with the run.
    lost = next(bessemer.home.records())
    end_worker(bessemer, lost.pid)
    bessemer("up", timeout=PATIENT)
    wait_for(lambda: next(bessemer.home.records()).run_id != lost.run_id, seconds=PATIENT)
    going = next(bessemer.home.records())
    assert going.flow_run == lost.flow_run == training
    wait_for(lambda: len([*(attempt / "state" / "followers").iterdir()]) == 2, seconds=PATIENT)
    assert state_of(bessemer, training) == "RUNNING"

    # kill -9 of the worker alone: the run goes on, and the next worker leaves it alone.
    end_worker(bessemer)
    bessemer("up", timeout=PATIENT)
    reached = steps(bessemer)
    wait_for(lambda: steps(bessemer) > reached + 100, seconds=PATIENT)
    assert job_of(bessemer) == job
    assert is_alive(going.pid)
    assert next(bessemer.home.records()).run_id == going.run_id
    cancel(bessemer, training)
    wait_for(lambda: not any(is_alive(pid) for pid in (*job, going.pid)), seconds=15)

    # Retried, it goes on from the checkpoint; cancelled again, now by the worker that began it.
    reached = steps(bessemer)
    bessemer.ask(f"flow_runs/{training}/set_state", {"state": RETRY})
    wait_for(lambda: steps(bessemer) > reached + 100, seconds=PATIENT)
    assert (attempt / "state").is_dir()
    again = job_of(bessemer)
    assert not set(job) & set(again)
    cancel(bessemer, training)
    wait_for(lambda: not any(is_alive(pid) for pid in again), seconds=15)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_training_has_its_server_back_and_a_worker_alone_waits_for_up(
    bessemer: Command,
) -> None:
    reached = steps(bessemer)
    training = begin(bessemer, deployments(bessemer)["pretraining"], recipe="training.yaml")
    wait_for(lambda: steps(bessemer) > reached + 100, seconds=PATIENT)
    job, going = job_of(bessemer), next(bessemer.home.records())
    server = end_server(bessemer)
    wait_for(lambda: read_service(bessemer.home, "prefect") != server, seconds=PATIENT)
    reached = steps(bessemer)
    wait_for(lambda: steps(bessemer) > reached + 100, seconds=PATIENT)
    assert job_of(bessemer) == job
    assert is_alive(going.pid)
    assert page_url(bessemer) == server.url
    assert state_of(bessemer, training) == "RUNNING"
    bessemer("up", timeout=PATIENT)  # the worker may have waited too long, on a busy machine
    cancel(bessemer, training)
    wait_for(lambda: not any(is_alive(pid) for pid in (*job, going.pid)), seconds=15)

    # With no run that needs it, it stays away, the worker gives up, and both come back where they were.
    worker = read_service(bessemer.home, "worker")
    assert worker
    end_server(bessemer)
    wait_for(lambda: not worker.is_running, seconds=PATIENT)  # Prefect's asks three times
    bessemer("up", timeout=PATIENT)
    assert page_url(bessemer) == server.url
    assert state_of(bessemer, training) == "CANCELLED"


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_watched_data_and_a_cron_make_one_run_that_goes_on_with_a_replay(bessemer: Command) -> None:
    bessemer("run", "training.yaml", "pretrain.tokens=100000", timeout=PATIENT)
    first = next(bessemer.home.records())
    replay = "pretrain.phases=[{tokens: 1, mix: {old: 0.3, new: 0.7}}]"
    bessemer("watch", "fresh", "training.yaml", "pretrain.tokens=100000", replay, "--extend")
    bessemer(
        "deploy",
        "training.yaml",
        "pretrain.tokens=100000",
        replay,
        "--extend",
        "--cron",
        "* * * * *",
    )
    write_story(bessemer.folder / "fresh" / "new.jsonl", seed=2)
    landed = time.monotonic()
    wait_for(lambda: len(built_since(bessemer, first, "pretrain")) == 1, seconds=PATIENT)
    told = f"{time.monotonic() - landed:.0f} s from the landing to the finished run"
    wait_for(lambda: len(runs_since(bessemer, first)) >= 3, seconds=PATIENT)
    bessemer("deploy", "training.yaml", "--end")
    assert bessemer("watch", "fresh", "--end") == ""
    (extended,) = built_since(bessemer, first, "pretrain")
    for name in ("extract", "tokenize"):
        assert extended.stages[name].metrics["shards"] == {"built": 1, "reused": 1}, told
    assert extended.stages["tokenizer"].fingerprint == first.stages["tokenizer"].fingerprint
    assert extended.frozen["pretrain.from.policy"] == first.stages["pretrain"].fingerprint
    before, after = (losses(record) for record in (first, extended))
    assert after[0] < before[0] - 1  # it goes on, where the first began with nothing
    # Whichever of the runs came first to a stage, no other built it again.
    for name in ("extract", "tokenize"):
        assert len(built_since(bessemer, first, name)) == 1


def test_down_waits_for_a_run_and_leaves_no_process(bessemer: Command) -> None:
    tiny = Command(bessemer.folder)
    cancelled = tiny.start("run", "tiny.yaml", "coarse.seconds=300")
    wait_for(lambda: "coarse" in tiny.ran())
    waiting = bessemer.start("down", "--wait")
    time.sleep(1)
    cancelled.send_signal(signal.SIGINT)
    _, err = cancelled.communicate(timeout=180)
    assert cancelled.returncode == 130, err
    assert "Traceback" not in err, err
    out, _ = waiting.communicate(timeout=180)
    assert "worker, mlflow, prefect" in out
    wait_for(lambda: not of_home(bessemer.home), seconds=120)
