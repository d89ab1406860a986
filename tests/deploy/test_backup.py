"""Backup and restore as docs/operations.md tells them, typed from the page, on a local home."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from flows.plan import plan
from flows.runs import Home, open_home
from flows.upkeep import check
from tests.deploy.compose import ROOT
from tests.flows.conftest import Place
from tests.flows.conftest import place as place  # a fixture
from tests.flows.test_execution import go, start, statuses

FENCE = re.compile(r"^```sh (\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGE = dict(FENCE.findall((ROOT / "docs" / "operations.md").read_text("utf-8")))


def type_in(lines: Sequence[str], home: Path, backup: Path) -> None:
    """Run lines of the page."""
    variables = {"PATH": "/usr/bin:/bin", "BESSEMER_HOME": str(home), "BACKUP": str(backup)}
    for line in lines:
        subprocess.run(["sh", "-euc", line], env=variables, check=True)


def restored(place: Place, folder: Path, lines: Sequence[str]) -> Home:
    """A home elsewhere, given back from a copy between whose two steps another run began and ended."""
    home, backup, elsewhere = open_home().path, folder / "backup", folder / "elsewhere"
    backup.mkdir()
    go(place)
    type_in(lines[:1], home, backup)
    go(place, "coarse.heat=0.25")
    type_in(lines[1:], home, backup)
    type_in(PAGE["restore"].splitlines(), elsewhere, backup)
    return Home(elsewhere)


def missing(home: Home) -> list[str]:
    """Artifacts that runs of a home name and that are not there."""
    named = {stage.fingerprint for run in home.records() for stage in run.stages.values()}
    return [name for name in named if name and home.store().find(name) is None]


def test_a_home_that_is_copied_as_the_page_says_is_whole_elsewhere(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = restored(place, tmp_path, PAGE["backup"].splitlines())
    count, damaged = check(home.store(), None, is_full=True)
    assert count > len(list(home.records())) == 1
    assert damaged == missing(home) == []
    place.ran()
    monkeypatch.setenv("BESSEMER_HOME", str(home.path))
    assert {item.status for item in plan(start(place), place.folder)} == {"hit"}
    assert set(statuses(go(place)).values()) == {"hit"}
    assert place.ran() == []


def test_copied_the_other_way_round_runs_name_what_is_not_there(
    place: Place, tmp_path: Path
) -> None:
    home = restored(place, tmp_path, PAGE["backup"].splitlines()[::-1])
    assert len(list(home.records())) == 2
    assert missing(home)
