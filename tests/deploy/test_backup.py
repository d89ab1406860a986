"""Backup and restore as docs/operations.md tells them, typed from the page, on a local home."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from flows.plan import plan
from flows.runs import open_home
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


def use(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESSEMER_HOME", str(home))


@pytest.mark.parametrize("order", [1, -1])
def test_a_home_that_is_copied_in_the_order_of_the_page_is_whole_elsewhere(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    go(place)
    home, restored, backup = open_home(), tmp_path / "elsewhere", tmp_path / "backup"
    backup.mkdir()
    first, second = PAGE["backup"].splitlines()[::order]
    type_in([first], home.path, backup)
    go(place, "coarse.heat=0.25")  # a run that goes on meanwhile
    type_in([second], home.path, backup)
    type_in(PAGE["restore"].splitlines(), restored, backup)
    use(restored, monkeypatch)
    place.ran()
    count, damaged = check(open_home().store(), None, is_full=True)
    assert (count > 0, damaged) == (True, [])
    known = {record.run_id for record in open_home().records()}
    for stage in (s for run in open_home().records() for s in run.stages.values()):
        found = stage.fingerprint and open_home().store().find(stage.fingerprint)
        # Copied the other way round, the runs name what came after the artifacts.
        assert bool(found) or order == -1
    assert len(known) == (1 if order == 1 else 2)
    assert {item.status for item in plan(start(place), place.folder)} == {"hit"}
    assert set(statuses(go(place)).values()) == {"hit"}
    assert place.ran() == []
