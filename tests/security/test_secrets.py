"""Planted secrets: nothing that is written, printed or shown holds one."""

import os
from pathlib import Path

import psutil
import pytest

from conf.compose import compose
from conf.endpoint import EndpointConfig
from conf.mistakes import RecipeError
from conf.ppo import RewardJudgeConfig
from model.judge import Judge, JudgeFailed
from tasks.completions import Endpoint, EndpointFailed
from tasks.exams import _json_lines
from tasks.synthesize_chats import pairs_of
from tasks.tracking import Tracking
from tests.e2e.commands import Command, of_home
from tests.tasks.endpoint_stand_in import Reply, endpoint
from tests.tasks.test_synthesize import essay, good

SECRET = "hunter2-planted"
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "override",
    [
        f"store=s3://anna:{SECRET}@bucket/store",
        f"data=s3://anna:{SECRET}@bucket/raw",
        f"fanout.address=tcp://anna:{SECRET}@host:1",
        f"world.base_url=http://:{SECRET}@host/v1",
    ],
)
def test_an_address_with_a_password_is_refused_and_not_repeated(override: str) -> None:
    with pytest.raises(RecipeError, match="is an address with a password") as caught:
        compose("demo", [override])
    assert SECRET not in str(caught.value)


def test_addresses_without_a_password_are_taken() -> None:
    taken = compose("demo", ["store=s3://bucket/a@b:c", "data=http://host:80/x@y"])
    assert taken["store"]["url"] == "s3://bucket/a@b:c"


def test_the_address_of_mlflow_stands_in_no_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = Tracking(tmp_path, f"http://anna:{SECRET}@127.0.0.1:9")
    tracking.start("tiny")
    tracking.stage_started("one")
    child = next(
        p for p in psutil.Process(os.getpid()).children() if str(tmp_path) in " ".join(p.cmdline())
    )
    assert SECRET not in " ".join(child.cmdline())
    child.kill()
    assert tracking.wait(30)
    assert not holding(tmp_path)


def holding(folder: Path) -> list[Path]:
    """Files that hold the secret, in whatever form the file has."""
    return [p for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


def refusing(prompt: str, times: int) -> Reply:
    """An endpoint that repeats what it was shown."""
    return 401, {"error": f"{SECRET} is no key"}


def test_a_key_that_an_endpoint_repeats_is_left_out_of_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", SECRET)
    with endpoint(refusing) as (url, _):
        settings = EndpointConfig(model="m", base_url=url, key_variable="THE_KEY", attempts=1)
        with pytest.raises(EndpointFailed, match=r"status 401.*\[key\] is no key") as failed:
            Endpoint(settings, tmp_path).ask(["one"])
        judge = Judge(
            RewardJudgeConfig(model="m", base_url=url, key_variable="THE_KEY"), tmp_path / "said"
        )
        with pytest.raises(JudgeFailed, match=r"status 401.*\[key\] is no key") as judged:
            judge([{"messages": [], "text": "one"}])
    assert SECRET not in f"{failed.value} {judged.value}"


def test_an_answer_that_is_nested_without_end_is_no_answer(tmp_path: Path) -> None:
    assert list(pairs_of(f"{DEEP}{']' * len(DEEP)}")) == []
    with endpoint(lambda *_: (200, DEEP.encode())) as (url, _):
        settings = EndpointConfig(model="m", base_url=url, attempts=1)
        [answer], _ = Endpoint(settings, tmp_path).ask(["one"])
        assert answer
        assert answer.text == ""
    exam = tmp_path / "exam.jsonl"
    exam.write_text(DEEP)
    with pytest.raises(ValueError, match=r"exam.jsonl, line 1: no JSON"):
        list(_json_lines(exam))


RECIPE = """
seed: 0
stages:
  extract: {sources: [{path: "notes/*.txt"}]}
  topics: {from: {corpus: extract}, topics: 2, max_term_share: 1}
  synthesize:
    from: {corpus: extract, topics: topics}
    model: m
    count: 2
    base_url: URL
    key_variable: THE_KEY
    attempts: 1
"""


@pytest.mark.soak
@pytest.mark.e2e
def test_nothing_that_a_run_leaves_holds_a_secret_of_its_environment(tmp_path: Path) -> None:
    bessemer = Command(tmp_path, ("-c", "from flows.cli import main; main()"))
    (tmp_path / "notes").mkdir()
    for number in range(12):
        for language in ("en", "zh"):
            note = tmp_path / "notes" / f"{number}{language}.txt"
            note.write_text(essay(language, note.name) * 3, "utf-8")
    planted = {
        "THE_KEY": SECRET,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "PREFECT_SERVER_API_AUTH_STRING": f"anna:{SECRET}",
        "MLFLOW_TRACKING_PASSWORD": SECRET,
        "BESSEMER_TRACKING": "on",
    }
    said = ""
    try:
        for script, status in ((refusing, 1), (good, 0)):
            with endpoint(script) as (url, asked):
                recipe = RECIPE.replace("URL", url)
                (tmp_path / "asking.yaml").write_text(recipe, "utf-8")
                said += bessemer("run", "asking.yaml", expect=status, **planted)
                assert asked
                for process in of_home(bessemer.home):
                    assert SECRET not in " ".join(process.cmdline())
        for command in (
            ("runs", "--json"),
            ("show", "synthesize"),
            ("cat", "synthesize"),
            ("status",),
        ):
            said += bessemer(*command, **planted)
    finally:
        bessemer("down", "--wait", **planted)
    assert SECRET not in said
    assert (bessemer.home.path / "mlflow.db").stat().st_size > 100_000
    assert (bessemer.home.path / "prefect" / "prefect.db").stat().st_size > 100_000
    assert not holding(tmp_path)
