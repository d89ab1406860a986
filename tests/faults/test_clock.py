"""Somebody sets the clock: nothing that is alive is taken for dead, and the newest stays the newest."""

import os
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import psutil
import pytest

from flows import execution, runs
from flows.runs import Home, RunRecord, is_alive, open_home
from storage import store
from tasks import stage
from tasks.follower import CANCEL, FOLLOWERS, Follower
from tasks.processes import start_of
from tasks.supervisor import Stillness
from tests.flows.conftest import Place
from tests.flows.conftest import place as place  # a fixture
from tests.flows.test_execution import go, statuses
from tests.flows.test_watch import watcher

HOUR = 3600
SetClock = Callable[[float], float]


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """Sets the clock of this process so many hours off the true one; what it then says."""
    now = time.time
    offset = 0.0

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.fromtimestamp(now() + offset, tz)

    monkeypatch.setattr(time, "time", lambda: now() + offset)
    monkeypatch.setattr(time, "time_ns", lambda: int((now() + offset) * 1e9))
    for module in (runs, execution, store, stage):
        monkeypatch.setattr(module, "datetime", Clock)

    def move(hours: float) -> float:
        nonlocal offset
        offset = hours * HOUR
        return now() + offset

    return move


def test_when_a_process_was_started_is_told_by_no_clock_that_can_be_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = start_of(os.getpid())
    # psutil adds the time of day at which the kernel started, which moves when the clock is set.
    assert abs(ours + psutil.boot_time() - psutil.Process().create_time()) < 0.1
    now = time.time
    for hours in (-1, 1):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda hours=hours: now() + hours * HOUR)
            patch.setattr(psutil, "boot_time", lambda: 0.0)
            assert is_alive(os.getpid(), ours)
    assert not is_alive(os.getpid(), ours + 1)
    assert start_of(1 << 30) == 0


def run_at(home: Home, when: datetime) -> str:
    run_id = f"{when:%Y%m%d-%H%M%S}-{when.microsecond // 1000:03d}ff"
    RunRecord(run_id=run_id, recipe="r", recipe_path="r").write(home.run_folder(run_id))
    return run_id


def test_a_run_after_the_clock_was_set_back_is_the_newest(tmp_path: Path) -> None:
    home = Home(tmp_path)
    begin = datetime.now(UTC)
    first = home.new_run_id()
    assert begin - timedelta(seconds=1) <= datetime.strptime(first[:15], "%Y%m%d-%H%M%S").replace(
        tzinfo=UTC
    )
    later = run_at(home, begin + timedelta(hours=5))
    (home.runs / "notes").mkdir()
    ids = [later]
    for _ in range(3):
        ids.append(home.new_run_id())
        RunRecord(run_id=ids[-1], recipe="r", recipe_path="r").write(home.run_folder(ids[-1]))
    assert ids == sorted(ids)
    newest = home.newest()
    assert newest
    assert newest.run_id == ids[-1]


def test_a_run_whose_record_is_damaged_hides_no_other(tmp_path: Path) -> None:
    home = Home(tmp_path)
    sound, damaged = (run_at(home, datetime.now(UTC) - timedelta(hours=n)) for n in (2, 1))
    (home.run_folder(damaged) / "run.json").write_bytes(b"")
    assert [record.run_id for record in home.records()] == [sound]


@pytest.mark.parametrize("offset", [-HOUR, HOUR])
def test_a_follower_is_seen_whatever_the_clock_says(tmp_path: Path, offset: float) -> None:
    mark = tmp_path / "follower"
    still = Stillness()
    for _ in range(3):
        time.sleep(0.02)
        mark.touch()
        written = time.time() + offset
        os.utime(mark, (written, written))
        assert still.seconds([mark]) < HOUR / 60
    time.sleep(0.05)
    assert 0.05 <= still.seconds([mark]) < HOUR / 60
    mark.unlink()
    assert still.seconds([]) < HOUR / 60


@pytest.mark.parametrize("offset", [-24 * HOUR, HOUR])
def test_a_job_is_not_ended_while_another_follows_it_whatever_the_clock_says(
    tmp_path: Path, offset: float
) -> None:
    def follower() -> Follower:
        return Follower(tmp_path, lambda line: None, lambda done, total, unit: None)

    with subprocess.Popen(["sleep", "600"]) as process:
        (tmp_path / "state" / FOLLOWERS).mkdir(parents=True)
        mark = tmp_path / "state" / FOLLOWERS / f"{process.pid}-{start_of(process.pid)}-1"
        mark.touch()
        os.utime(mark, (time.time() + offset, time.time() + offset))
        assert not follower().leave()
        # A process that got the number of one that is gone follows nothing.
        mark.rename(mark.with_name(f"{process.pid}-1.0-1"))
        assert follower().leave()
        process.kill()
    assert (tmp_path / "state" / CANCEL).exists()


def test_nothing_is_built_or_asked_for_twice_whatever_the_clock_says(
    place: Place, set_clock: SetClock
) -> None:
    go(place)
    place.ran()
    requests: list[str] = []
    watching = watcher(place, requests)
    for hours in (0, -1, 24, 0):
        says = set_clock(hours)
        os.utime(place.folder / "raw" / "one.txt", (says, says))
        assert watching.turn() == watcher(place, requests).turn() == []
        again = go(place)
        assert set(statuses(again).values()) == {"hit"}
        newest = open_home().newest()
        assert newest
        assert newest.run_id == again.record.run_id
    # A file that comes while the clock is behind, and is older than all that was read.
    says = set_clock(-1)
    new = place.folder / "raw" / "new.txt"
    new.write_text("new\n")
    os.utime(new, (says, says))
    assert watching.turn() == ["new.txt"]
    shards = go(place).record.stages["mine"].metrics["shards"]
    assert shards == {"built": 1, "reused": 2}
    for hours in (24, -1, 0):
        set_clock(hours)
        assert watching.turn() == watcher(place, requests).turn() == []
        assert set(statuses(go(place)).values()) == {"hit"}
    assert len(requests) == 1
