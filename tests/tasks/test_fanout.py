"""Shards are built once, by workers that never outlive their parent."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from storage.errors import PartsFailed
from storage.store import PARTS_BUILT, Store
from tasks.fanout import PartItem, fan_out
from tasks.stage import Job

REPOSITORY = Path(__file__).parents[2]


def double(files: Path, number: int) -> dict[str, Any]:
    (files / "out.txt").write_text(f"{number} 的两倍是 {2 * number}", "utf-8")
    return {"doubled": 2 * number, "worker": os.getpid()}


def double_but_seven(files: Path, number: int) -> dict[str, Any]:
    if number == 7:
        raise ValueError("seven is poisoned")
    return double(files, number)


def double_but_die(files: Path, number: int) -> dict[str, Any]:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return double(files, number)


def leave_half_then_fail(files: Path, flag: Path) -> dict[str, Any]:
    if flag.exists():
        return double(files, 1)
    (files / "half.txt").write_text("half")
    flag.touch()
    raise RuntimeError("the first time fails")


def with_timer(files: Path) -> dict[str, Any]:
    signal.setitimer(signal.ITIMER_REAL, 0)  # raises ValueError outside a main thread
    return {}


def threads_of_libraries(files: Path) -> dict[str, Any]:
    import polars as pl

    return {"polars": pl.thread_pool_size()}


def sleep_long(files: Path, seconds: float) -> dict[str, Any]:
    (files / "begun").touch()
    time.sleep(seconds)
    return {}


def never_let_go(files: Path, seconds: float) -> dict[str, Any]:
    """Backtrack for ages inside one call that keeps the interpreter's lock."""
    (files / "begun").touch()
    re.match(r"(a*)*b", "a" * 40)
    return {}


def job_of(store: Store, tmp_path: Path, workers: int = 1) -> Job:
    path = tmp_path / "attempt"
    for name in ("files", "logs", "state"):
        (path / name).mkdir(parents=True, exist_ok=True)
    return Job(node="n", stage="made", path=path, store=store, workers=workers)


def items(numbers: range) -> list[PartItem]:
    return [PartItem({"number": n}, (n,), label=f"shard {n}") for n in numbers]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_no_items_no_parts(store: Store, tmp_path: Path) -> None:
    job = job_of(store, tmp_path)
    assert fan_out(job, double, []) == []
    assert job.metrics["shards"] == {"built": 0, "reused": 0}
    assert job.parts == []


@pytest.mark.parametrize("workers", [1, 2])
def test_parts_come_in_item_order_and_only_new_ones_are_built(
    store: Store, tmp_path: Path, workers: int
) -> None:
    job = job_of(store, tmp_path, workers)
    seen: list[tuple[float, float, str]] = []
    job.report_progress = lambda done, total, unit: seen.append((done, total, unit))
    first = fan_out(job, double, items(range(3)))
    assert [part.metrics["doubled"] for part in first] == [0, 2, 4]
    assert [(p.files / "out.txt").read_text("utf-8") for p in first][2] == "2 的两倍是 4"
    assert seen == [(n, 3, "parts") for n in (1, 2, 3)]
    assert job.parts == [part.fingerprint for part in first]
    again = job_of(store, tmp_path, workers)
    second = fan_out(again, double, items(range(2, 5)))
    assert [part.is_reused for part in second] == [True, False, False]
    assert second[0].digest == first[2].digest
    assert again.metrics["shards"] == {"built": 2, "reused": 1}
    record = store.record(second[1].fingerprint)
    assert record is not None
    assert (record.kind, record.stage) == ("part", "made/part")
    assert record.identity["number"] == 3


def test_the_number_of_workers_does_not_change_the_bytes(tmp_path: Path) -> None:
    one, two = (
        fan_out(job_of(Store(tmp_path / f"s{n}"), tmp_path, n), double, items(range(4)))
        for n in (1, 2)
    )
    assert [(p.fingerprint, p.digest) for p in one] == [(p.fingerprint, p.digest) for p in two]


def test_parts_on_s3_are_shared_by_machines(s3_server: str, tmp_path: Path) -> None:
    url = f"{s3_server}/{tmp_path.name}"
    here, there = (Store(url, cache=tmp_path / name) for name in ("here", "there"))
    built = fan_out(job_of(here, tmp_path, 2), double, items(range(3)))
    job = job_of(there, tmp_path, 2)
    found = fan_out(job, double, items(range(3)))
    assert job.metrics["shards"] == {"built": 0, "reused": 3}
    assert [part.digest for part in found] == [part.digest for part in built]
    assert (found[2].files / "out.txt").read_text("utf-8") == "2 的两倍是 4"


def test_version_and_function_are_identity(store: Store, tmp_path: Path) -> None:
    job = job_of(store, tmp_path)
    parts = [
        *fan_out(job, double, items(range(1))),
        *fan_out(job, double, items(range(1)), version=2),
        *fan_out(job, double_but_seven, items(range(1))),
    ]
    assert len({part.fingerprint for part in parts}) == 3
    assert job.metrics["shards"] == {"built": 3, "reused": 0}


def test_equal_items_are_built_once(store: Store, tmp_path: Path) -> None:
    job = job_of(store, tmp_path)
    parts = fan_out(job, double, [*items(range(1)), *items(range(1))])
    assert parts[0] == parts[1]
    assert len(job.parts) == 1
    assert job.metrics["shards"] == {"built": 1, "reused": 0}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_poisoned_item_is_named_and_the_others_are_kept(
    store: Store, tmp_path: Path, workers: int
) -> None:
    job = job_of(store, tmp_path, workers)
    with pytest.raises(PartsFailed, match=r"1 of 5 .*\n.*shard 7: ValueError: seven is poisoned"):
        fan_out(job, double_but_seven, items(range(5, 10)))
    retry = job_of(store, tmp_path, workers)
    with pytest.raises(PartsFailed):
        fan_out(retry, double_but_seven, items(range(5, 10)))
    kept = fan_out(retry, double_but_seven, items(range(8, 10)))
    assert all(part.is_reused for part in kept)


def test_a_killed_worker_costs_its_item_alone(store: Store, tmp_path: Path) -> None:
    job = job_of(store, tmp_path, 2)
    with pytest.raises(PartsFailed, match=r"1 of 5 .*\nshard 3: its worker died"):
        fan_out(job, double_but_die, items(range(5)))
    kept = [i for i in items(range(5)) if i.label != "shard 3"]
    assert all(p.is_reused for p in fan_out(job_of(store, tmp_path), double_but_die, kept))


def test_what_a_failed_build_wrote_is_gone_when_it_is_tried_again(
    store: Store, tmp_path: Path
) -> None:
    item = PartItem({"once": 1}, (tmp_path / "flag",), "shard")
    with pytest.raises(PartsFailed):
        fan_out(job_of(store, tmp_path), leave_half_then_fail, [item])
    (part,) = fan_out(job_of(store, tmp_path), leave_half_then_fail, [item])
    assert [path.name for path in part.files.iterdir()] == ["out.txt"]


def test_a_build_runs_in_a_main_thread_also_under_a_task_runner(
    store: Store, tmp_path: Path
) -> None:
    done: list[int] = []
    thread = threading.Thread(
        target=lambda: done.append(
            len(fan_out(job_of(store, tmp_path, 1), with_timer, [PartItem({"timer": 1})]))
        )
    )
    thread.start()
    thread.join()
    assert done == [1]


def test_workers_share_the_cores(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POLARS_MAX_THREADS", raising=False)
    made = [PartItem({"t": n}) for n in range(2)]
    parts = fan_out(job_of(store, tmp_path, 2), threads_of_libraries, made)
    assert {p.metrics["polars"] for p in parts} == {max(1, (os.cpu_count() or 1) // 2)}


def test_a_nested_function_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use a function of a module"):
        fan_out(job_of(store, tmp_path), lambda files: {}, items(range(1)))


def test_gc_keeps_parts_of_a_job_at_work(store: Store, tmp_path: Path) -> None:
    with store.claim("whole") or pytest.fail("no claim") as claim:
        job = Job(node="n", stage="made", path=claim.path, store=store)
        parts = fan_out(job, double, items(range(2)))
        assert set((job.state / PARTS_BUILT).read_text().split()) == set(job.parts)
        assert store.gc([], dry_run=False) == []
    assert len([r for r in store.gc([], dry_run=False) if r.kind == "part"]) == 2
    assert store.find(parts[0].fingerprint) is None


FLOW = """
import sys
from pathlib import Path
from storage.store import Store
from tasks.fanout import PartItem, fan_out
from tasks.stage import Job
from tests.tasks.test_fanout import FUNCTION

if __name__ == "__main__":
    root = Path(sys.argv[1])
    job = Job(node="n", stage="made", path=root / "job", store=Store(root / "store"), workers=2)
    fan_out(job, FUNCTION, [PartItem({"n": n}, (60.0,)) for n in range(4)])
"""


@pytest.mark.parametrize(
    ("how", "function"),
    [
        (signal.SIGKILL, "sleep_long"),
        (signal.SIGINT, "sleep_long"),
        (signal.SIGKILL, "never_let_go"),
    ],
)
def test_workers_end_with_their_parent(tmp_path: Path, how: signal.Signals, function: str) -> None:
    script = tmp_path / "flow.py"
    script.write_text(FLOW.replace("FUNCTION", function))
    flow = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("store/attempts/*/1/files/begun"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = psutil.Process(flow.pid).children(recursive=True)
    assert len(workers) >= 2
    flow.send_signal(how)
    assert flow.wait(20) != 0
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert alive == []
    store = Store(tmp_path / "store")
    names = [path.name for path in (tmp_path / "store" / "attempts").iterdir()]
    assert not any(store.is_claimed(name) for name in names)


SLOW_START = """
import sys, time
if any("forkserver" in word for word in sys.orig_argv):
    time.sleep(1)
"""


def test_ctrl_c_while_workers_start_ends_them_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_START)
    script = tmp_path / "flow.py"
    script.write_text(FLOW.replace("FUNCTION", "sleep_long"))
    flow = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 30
    while not workers:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        children = psutil.Process(flow.pid).children()
        workers = [child for child in children if "forkserver" in " ".join(child.cmdline())]
    os.killpg(flow.pid, signal.SIGINT)
    _, said = flow.communicate(timeout=20)
    assert flow.returncode != 0
    assert said.count(b"Traceback") == 1  # the flow's own
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert alive == []
