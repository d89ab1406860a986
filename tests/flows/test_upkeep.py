"""Which runs keep their artifacts, their records and their reports."""

from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.runs import RunRecord, open_home
from flows.upkeep import forget_runs, kept_runs, roots
from storage.store import Store
from tests.flows.conftest import Place
from tests.flows.test_execution import go, statuses


def aged(record: RunRecord, days: float) -> RunRecord:
    """The same run, some days earlier."""
    then = datetime.now(UTC) - timedelta(days=days)
    record.started = then.isoformat(timespec="seconds")
    record.write(open_home().run_folder(record.run_id))
    return record


def test_the_newest_runs_and_those_of_some_days_are_kept(place: Place) -> None:
    old, week, new = (
        aged(go(place, f"coarse.heat={heat}").record, days)
        for heat, days in ((0.3, 30), (0.5, 6.9), (0.9, 1))
    )
    home = open_home()
    assert [r.run_id for r in kept_runs(home, 1)] == [new.run_id]
    assert [r.run_id for r in kept_runs(home, 1, 7)] == [new.run_id, week.run_id]
    kept = roots(kept_runs(home, 1, 7))
    assert {stage.fingerprint for stage in week.stages.values()} <= kept
    assert old.stages["coarse"].fingerprint not in kept


def test_the_newest_complete_run_is_kept_behind_those_that_failed(place: Place) -> None:
    home = open_home()
    old, whole, *failed = (go(place, f"coarse.heat={0.1 * n}").record for n in range(1, 6))
    for record in failed:
        record.status = "failed"
        record.write(home.run_folder(record.run_id))
    kept = [record.run_id for record in kept_runs(home, 2)]
    assert kept == [failed[2].run_id, failed[1].run_id, whole.run_id]
    assert kept_runs(home, 0) == []
    assert old.run_id not in kept


def test_forgotten_runs_leave_no_folder_unless_their_report_is_shown(place: Place) -> None:
    home = open_home()
    gone, shown, newest = (go(place).record for _ in range(3))
    page = home.run_folder(shown.run_id) / "report.html"
    page.write_text("<html>")
    newest.report = str(page)
    newest.write(home.run_folder(newest.run_id))
    kept = kept_runs(home, 1)
    for dry_run in (True, False):
        assert [item.fingerprint for item in forget_runs(home, kept, dry_run=dry_run)] == [
            gone.run_id
        ]
    assert [record.run_id for record in home.records()] == [newest.run_id, shown.run_id]
    assert page.is_file()


@pytest.mark.parametrize("line", ["gc --keep-runs -1", "cat mine --limit -1"])
@pytest.mark.usefixtures("place")
def test_fewer_than_none_is_refused(line: str) -> None:
    assert CliRunner().invoke(app, line.split()).exit_code == 2


def test_a_run_that_ends_while_gc_asks_other_homes_keeps_what_it_made(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(place)
    noted = Store.noted_by_others

    def meanwhile(store: Store, home: str) -> set[str]:
        go(place, "coarse.heat=0.25")
        return noted(store, home)

    monkeypatch.setattr(Store, "noted_by_others", meanwhile)
    assert CliRunner().invoke(app, ["gc"]).exit_code == 0
    assert set(statuses(go(place, "coarse.heat=0.25")).values()) == {"hit"}
