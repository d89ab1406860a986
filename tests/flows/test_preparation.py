"""Keys of endpoints are asked for before anything runs, and only where something will be asked."""

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
