"""What a run needs of its surroundings is looked for before anything runs, and only where it is needed."""

from pathlib import Path

import pytest

from conf.mistakes import RecipeError
from flows.preparation import Request, prepare
from flows.runs import Home
from tests.flows.conftest import Place
from tests.flows.test_execution import go, start, statuses


def test_a_key_that_is_not_there_is_told_at_once_unless_nothing_is_to_be_asked(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyed = "fine.key_variable=NO_SUCH_KEY"
    with pytest.raises(RecipeError) as caught:
        start(place, keyed)
    assert str(caught.value) == (
        "stages.fine.key_variable: the environment variable NO_SUCH_KEY is not set; export the endpoint's key "
        "in it, or set key_variable to null for one without"
    )
    assert "fine" not in start(place, keyed, until="other").selected
    monkeypatch.setenv("NO_SUCH_KEY", "k")
    go(place, keyed)
    monkeypatch.delenv("NO_SUCH_KEY")
    assert set(statuses(go(place, keyed)).values()) == {"hit"}
    with pytest.raises(RecipeError, match="NO_SUCH_KEY"):
        start(place, keyed, force=("fine",))


def test_the_key_of_a_judge_in_the_reward_is_asked_for_before_anything_runs(tmp_path: Path) -> None:
    judged = ["ppo.judge.model=m", "ppo.judge.key_variable=NO_SUCH_KEY"]
    with pytest.raises(RecipeError, match=r"^stages\.ppo\.judge\.key_variable: the environment"):
        prepare(Request("demo", judged), Home(tmp_path), base=tmp_path, appends=False)


def test_a_host_without_the_devices_is_told_before_anything_runs_and_may_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.launch.cuda_devices", lambda: ["0"])
    request = Request(
        "demo", ["ppo.launch.device=cuda", "ppo.launch.processes=2", "ppo.launch.engine=ddp"]
    )
    with pytest.raises(RecipeError) as caught:
        prepare(request, Home(tmp_path), base=tmp_path)
    assert str(caught.value) == (
        "stages.ppo.launch: launch.device=cuda with launch.processes=2, but this host offers 1 CUDA devices; "
        "set launch.device=cpu or fewer processes"
    )
    assert "ppo" in prepare(request, Home(tmp_path), base=tmp_path, appends=False).selected
