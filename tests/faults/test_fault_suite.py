"""The fault suite: a small recipe is hurt in many ways, one plain run after each has to heal it.

After each fault the artifacts are those of a run that nothing disturbs, bit for bit; nothing that was
committed is lost or built twice. Every fault leaves a line in the table (tests/faults/table.py).

Which moments are hit follows from a seed: the day's, unless BESSEMER_FAULT_SEED names one, so that the
moments of many days add up; BESSEMER_FAULT_MOMENTS says how many. Mounting needs root. A clock that is set is tests/faults/test_clock.py's.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from flows.runs import Home
from flows.services import read_service
from tasks.processes import descendants
from tests.faults.disks import mount, mounted
from tests.faults.faulty_s3 import client_of, faulty_s3
from tests.faults.small_run import (
    PATIENCE_SECONDS,
    Place,
    Told,
    built,
    digests,
    finish,
    steps_of,
    wait_until,
)
from tests.faults.table import Commits, Table
from tests.tasks.launching import processes_of

pytestmark = [pytest.mark.soak, pytest.mark.e2e, pytest.mark.timeout(0)]

SEED = int(os.environ.get("BESSEMER_FAULT_SEED") or datetime.now(UTC).toordinal())
MOMENTS = int(os.environ.get("BESSEMER_FAULT_MOMENTS", "30"))
STAGES = (
    "world", "extract", "filter", "tokenizer", "tokenize", "pretrain",
    "chats", "sft", "pairs", "reward", "ppo",
)  # fmt: skip


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    found = Table()
    yield found
    sys.stdout.write(f"\n{found}\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    found = Place(tmp_path_factory.mktemp("suite"))
    yield found
    found.down()


@pytest.fixture(scope="module")
def unbroken(place: Place) -> Told:
    """The run that nothing disturbs, in the store `unbroken`."""
    return place.run("unbroken")


def heal(
    place: Place, store: str, unbroken: Told, *, since: Commits
) -> tuple[Told, dict[str, Any]]:
    """One plain run ends well with the bytes of the unbroken one; what it told, and what it cost."""
    started = time.monotonic()
    again = place.run(store)
    seconds = time.monotonic() - started
    assert digests(again) == digests(unbroken)
    return again, {"before": since, "after": place.written(store), "seconds": seconds}


def is_free(row: Any) -> bool:
    return row.lost == row.rebuilt == 0


# kill -9


def attempt_of(place: Place, store: str, stage: str, unbroken: Told) -> Path:
    return place.store(store) / "attempts" / unbroken["stages"][stage]["fingerprint"] / "1"


def victims(place: Place, flow: "subprocess.Popen[str]", attempt: Path) -> dict[str, list[int]]:
    """The processes that take part in a run, by what they do."""
    service = read_service(Home(place.folder / "home"), "prefect")
    found = {"flow": [flow.pid], "server": [service.pid] if service else []}
    for pid in {*descendants(flow.pid), *processes_of(attempt)}:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            names = {
                b"tasks.supervisor": "supervisor",
                b"tasks.rank": "rank",
                b"forkserver": "shards",
            }
            name = next((role for part, role in names.items() if part in line), "other")
            found.setdefault(name, []).append(pid)
    return {role: sorted(pids) for role, pids in found.items() if pids}


@pytest.mark.parametrize("number", range(MOMENTS))
def test_any_process_may_be_killed_at_any_moment(
    place: Place, unbroken: Told, table: Table, number: int
) -> None:
    seed = SEED * 1000 + number
    source = random.Random(seed)
    stage = STAGES[seed % len(STAGES)]
    store = f"killed{number}"
    place.copy("unbroken", store, without=[stage])
    attempt = attempt_of(place, store, stage, unbroken)
    flow = place.start(store)
    wait_until(flow, attempt.exists)
    time.sleep(source.uniform(0, 1.2 * unbroken["stages"][stage]["seconds"]))
    found = victims(place, flow, attempt)
    role = source.choice(sorted(found))
    with contextlib.suppress(ProcessLookupError):
        os.kill(source.choice(found[role]), signal.SIGKILL)
    flow.communicate(timeout=PATIENCE_SECONDS)
    _, cost = heal(place, store, unbroken, since=place.written(store))
    row = table.note(f"kill -9 {role}", stage=stage, seed=seed, **cost)
    assert is_free(row), row
    shutil.rmtree(place.store(store))


# The disk


def bytes_of(folder: Path) -> int:
    return sum(4096 + path.lstat().st_size for path in folder.rglob("*"))


def fill(place: Place, store: str, without: list[str]) -> None:
    """Put a copy of the unbroken store into a mounted folder."""
    place.copy("unbroken", f"{store}_copy", without=without)
    copy = place.store(f"{store}_copy")
    shutil.copytree(copy, place.store(store), symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(copy)


@pytest.mark.parametrize("room", [8 << 10, 96 << 10, 256 << 10])
def test_a_full_disk_stops_a_run_and_harms_nothing(
    place: Place, unbroken: Told, table: Table, room: int
) -> None:
    store = f"full{room}"
    size = bytes_of(place.store("unbroken"))
    with mounted(place.store(store), 2 * size):
        fill(place, store, ["extract", "pretrain"])
        used = shutil.disk_usage(place.store(store)).used
        mount("-o", f"remount,size={used + room}", place.store(store))
        told = finish(place.start(store), expect=1)
        errors = [
            stage["error"] for stage in told["stages"].values() if stage["status"] == "failed"
        ]
        assert any("No space left on device" in error for error in errors), errors
        since = place.written(store)
        mount("-o", f"remount,size={2 * size}", place.store(store))
        _, cost = heal(place, store, unbroken, since=since)
    assert is_free(table.note("disk full", stage="extract, pretrain", seed=room, **cost))


def test_a_read_only_store_gives_what_it_has_and_takes_nothing(
    place: Place, unbroken: Told, table: Table
) -> None:
    with mounted(place.store("fixed"), 2 * bytes_of(place.store("unbroken"))):
        fill(place, "fixed", [])
        mount("-o", "remount,ro", place.store("fixed"))
        assert not built(place.run("fixed"))
        mount("-o", "remount,rw", place.store("fixed"))
        shutil.rmtree(place.store("fixed") / "artifacts" / unbroken["stages"]["ppo"]["fingerprint"])
        since = place.written("fixed")
        mount("-o", "remount,ro", place.store("fixed"))
        told = finish(place.start("fixed"), expect=1)
        assert "Read-only file system" in told["stages"]["ppo"]["error"]
        mount("-o", "remount,rw", place.store("fixed"))
        _, cost = heal(place, "fixed", unbroken, since=since)
    assert is_free(table.note("store read-only", stage="ppo", **cost))


# Others


def test_two_runs_at_once_share_the_work(place: Place, unbroken: Told, table: Table) -> None:
    place.copy("unbroken", "both", without=["extract", "tokenize", "pretrain", "ppo"])
    since = place.written("both")
    told = [finish(flow) for flow in (place.start("both"), place.start("both"))]
    assert [digests(one) for one in told] == [digests(unbroken)] * 2
    assert not built(told[0]) & built(told[1])
    assert built(told[0]) | built(told[1]) == {"extract", "tokenize", "pretrain", "ppo"}
    again, cost = heal(place, "both", unbroken, since=since)
    assert not built(again)
    assert is_free(table.note("two runs at once", **cost))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_prefect_server_is_restarted_in_the_middle_of_a_run(
    place: Place, unbroken: Told, table: Table, number: signal.Signals
) -> None:
    store = f"server{number}"
    place.copy("unbroken", store, without=["pretrain", "ppo"])
    flow = place.start(store)
    wait_until(
        flow,
        lambda: (found := place.attempt(store, "pretrain")) and steps_of(found) > 20,
    )
    service = read_service(Home(place.folder / "home"), "prefect")
    assert service
    os.kill(service.pid, number)
    assert digests(finish(flow)) == digests(unbroken)  # the run has started it again
    assert place.going() == []
    _, cost = heal(place, store, unbroken, since=place.written(store))
    assert is_free(table.note("Prefect server gone", stage="pretrain", seed=number, **cost))


def test_a_store_on_s3_that_fails_again_and_again_gets_all_of_it(
    place: Place, unbroken: Told, table: Table
) -> None:
    with faulty_s3(0.2, SEED) as (address, faulty):
        away = Place(place.folder, client_of(address), bucket="s3://stores")
        script = "import s3fs; s3fs.S3FileSystem().mkdir('stores')"
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, **away.environment}, check=True
        )
        flow = away.start("faulty")
        flow.communicate(timeout=PATIENCE_SECONDS)
        _, cost = heal(away, "faulty", unbroken, since=away.written("faulty"))
        row = table.note("S3 errors, slow answers", seed=SEED, **cost)
        assert is_free(row), row
        assert all(faulty.faults.values()), faulty.faults
        # All that was built is in the bucket: with an empty cache it is found there.
        shutil.rmtree(away.store("faulty"))
        assert not built(away.run("faulty"))


def flip(path: Path, source: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[source.randrange(len(content))] ^= 1 << source.randrange(8)
    path.write_bytes(content)


def test_a_flipped_bit_in_an_artifact_of_each_kind_is_found_and_mended(
    place: Place, unbroken: Told, table: Table
) -> None:
    place.copy("unbroken", "flipped", without=[])
    assert not built(place.run("flipped"))
    source = random.Random(SEED)
    chosen: dict[str, Path] = {}
    artifacts = sorted((place.store("flipped") / "artifacts").iterdir())
    for path in source.sample(artifacts, len(artifacts)):
        kind = json.loads((path / "record.json").read_bytes())["kind"]
        files = [f for f in sorted(path.glob("files/**/*")) if f.is_file() and f.stat().st_size]
        if kind not in chosen and files:
            chosen[kind] = path
            flip(source.choice(files), source)
    assert len(chosen) == 9, sorted(chosen)
    hurt = {path.name for path in chosen.values()}
    assert {item["fingerprint"] for item in place.verify()["damaged"]} == hurt
    since = place.written("flipped")  # without the damaged ones, which were set aside
    _, cost = heal(place, "flipped", unbroken, since=since)
    for kind in sorted(chosen):
        assert is_free(table.note(f"bit flipped: {kind}", seed=SEED, **cost))
