"""What counts as arrived, and when that starts a run; tests/e2e has the service start a real one."""

import json
from pathlib import Path

import pytest

from conf.mistakes import RecipeError
from flows import cli_services
from flows.arrivals import Arrivals, Folder, Wholeness, open_place
from flows.runs import NEWEST_RUNS, RunRecord, open_home
from flows.watch import Watcher, look_once
from flows.watches import Watch, add_watch, remove_watches, watches
from storage.bucket import Bucket
from storage.source import HashCache
from tests.flows.conftest import Place
from tests.flows.test_execution import go


class Clock:
    """Time that stands still unless it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def looking(folder: Path, wholeness: Wholeness, clock: Clock) -> Arrivals:
    return Arrivals(Folder(folder, HashCache()), wholeness, 10.0, clock)


def test_a_file_counts_once_it_has_not_changed_for_a_while(tmp_path: Path, clock: Clock) -> None:
    arrivals = looking(tmp_path, "stable", clock)
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "甲.jsonl"
    file.write_text("half")
    assert arrivals.look() == {}
    clock.now = 9.0
    file.write_text("half and the rest")
    assert arrivals.look() == {}
    clock.now = 18.0  # nine seconds since it changed
    assert arrivals.look() == {}
    clock.now = 19.0
    (whole,) = arrivals.look()
    assert whole == "sub/甲.jsonl"
    # What is not finished by its name, or hidden, never counts.
    for name in ("b.jsonl.part", "c.tmp", ".d.jsonl", "e~", "_SUCCESS"):
        (tmp_path / name).write_text("x")
    arrivals.look()
    clock.now = 60.0
    assert set(arrivals.look()) == {"sub/甲.jsonl"}
    file.unlink()
    assert arrivals.look() == {}


def test_a_copy_has_the_name_of_its_own_and_the_content_of_the_first(
    tmp_path: Path, clock: Clock
) -> None:
    arrivals = looking(tmp_path, "stable", clock)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same 钢")
    arrivals.look()
    clock.now = 10.0
    found = arrivals.look()
    assert found["a.txt"] == found["b.txt"]


def test_success_beside_or_above_a_file_says_that_it_is_whole(tmp_path: Path, clock: Clock) -> None:
    for name in ("day1/a.txt", "day1/deep/b.txt", "day2/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    arrivals = looking(tmp_path, "success", clock)
    assert arrivals.look() == {}
    (tmp_path / "day1" / "_SUCCESS").touch()
    assert set(arrivals.look()) == {"day1/a.txt", "day1/deep/b.txt"}


def test_a_manifest_counts_when_all_its_files_are_there_in_full(
    tmp_path: Path, clock: Clock
) -> None:
    folder = tmp_path / "day1"
    folder.mkdir()
    (folder / "a.txt").write_text("12345")
    arrivals = looking(tmp_path, "manifest", clock)
    lines = [{"name": "a.txt", "bytes": 5}, {"name": "b.txt", "bytes": 3}]
    manifest = json.dumps({"files": lines})
    (folder / "manifest.json").write_text(manifest[:20])
    assert arrivals.look() == {}
    (folder / "manifest.json").write_text(manifest)
    (folder / "b.txt").write_text("12")
    assert arrivals.look() == {}
    (folder / "b.txt").write_text("123")
    (folder / "not listed.txt").write_text("x")
    assert set(arrivals.look()) == {"day1/a.txt", "day1/b.txt"}


def test_objects_are_whole_when_they_are_there(s3_server: str, tmp_path: Path) -> None:
    url = f"{s3_server}/{tmp_path.name}"
    Bucket(url).put("new/a.txt", "钢".encode())
    place = open_place(f"{url}/new", HashCache(tmp_path / "hashes.sqlite"), tmp_path)
    local = tmp_path / "a.txt"
    local.write_text("钢", "utf-8")
    assert Arrivals(place, "stable", 0.0).look() == {
        "a.txt": HashCache().digests([local])[0][1]  # one content, wherever it lies
    }


class Asked(Watcher):
    """A watcher whose requests are kept instead of sent."""

    requests: list[str]

    def _start(self, request: str) -> None:
        self.requests.append(request)
        self._flow_run = None


def watcher(place: Place, requests: list[str]) -> Asked:
    watch = Watch(place=str(place.folder / "raw"), recipe=str(place.recipe), settle_seconds=0)
    made = Asked.of(watch, open_home())
    assert isinstance(made, Asked)
    made.requests = requests
    return made


def test_one_run_for_each_new_content_and_none_for_what_a_run_has_read(place: Place) -> None:
    requests: list[str] = []
    watching = watcher(place, requests)
    assert watching.turn() == ["one.txt", "two.txt"]
    assert watching.turn() == []  # asked for already
    assert watcher(place, requests).turn() == ["one.txt", "two.txt"]  # after a restart:
    assert requests[0] == requests[1]  # the same request, of which the server makes one run
    go(place)
    assert watching.turn() == []
    raw = place.folder / "raw"
    (raw / "again.txt").write_bytes((raw / "one.txt").read_bytes())  # dropped twice
    (raw / "one.txt").touch()
    assert watching.turn() == []
    (raw / "three.txt").write_text("new\n")
    assert watching.turn() == ["three.txt"]
    go(place)  # a run by schedule, or by hand, is as good
    assert watcher(place, requests).turn() == []
    assert len(set(requests)) == 2


def test_runs_of_other_recipes_do_not_make_old_files_new(place: Place) -> None:
    go(place)
    home = open_home()
    for _ in range(NEWEST_RUNS):
        other = RunRecord(run_id=home.new_run_id(), recipe="other", recipe_path="", status="done")
        other.write(home.run_folder(other.run_id))
    assert watcher(place, []).turn() == []


def test_what_a_failed_run_has_read_is_asked_for_once(place: Place) -> None:
    (place.folder / "fault").touch()
    go(place, f"other.fails={place.folder / 'fault'}")
    requests: list[str] = []
    watching = watcher(place, requests)
    assert watching.turn() == ["one.txt", "two.txt"]
    go(place, f"other.fails={place.folder / 'fault'}")
    assert watching.turn() == []
    assert len(requests) == 1


def test_what_is_watched_is_checked_noted_and_forgotten(place: Place) -> None:
    home, raw = open_home(), str(place.folder / "raw")
    watch = Watch(place=raw, recipe=str(place.recipe), overrides=["seed=3"])
    add_watch(home, watch, place.folder)
    extending = watch.model_copy(update={"is_extension": True})
    add_watch(home, extending, place.folder)  # in place of the first
    assert watches(home) == [extending]
    with pytest.raises(RecipeError, match="no node is called"):
        add_watch(home, watch.model_copy(update={"overrides": ["sed=3"]}), place.folder)
    with pytest.raises(ValueError, match="no such folder; make it"):
        add_watch(home, watch.model_copy(update={"place": "/nowhere"}), place.folder)
    with pytest.raises(ValueError, match="name the place"):
        cli_services.watch(is_end=True)
    assert watches(home) == [extending]
    assert remove_watches(home, raw) == 1
    assert remove_watches(home, raw) == 0


def test_a_bucket_that_is_away_is_looked_at_again(place: Place, away: str) -> None:
    watch = Watch(place=f"{away}/new", recipe=str(place.recipe))
    watching = Watcher.of(watch, open_home())
    for _ in range(2):
        look_once(watching)
        assert "cannot be reached" in watching.trouble
