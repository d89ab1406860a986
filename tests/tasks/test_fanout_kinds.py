"""Processes of this machine, a Dask and a Ray cluster: the same parts, the same faults survived."""

import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from conf.dedup import DedupConfig
from conf.extract import ExtractConfig
from conf.fanout import LOCAL, FanoutConfig
from conf.mistakes import RecipeError
from flows.graph import load_graph
from storage.errors import PartsFailed
from storage.store import Store
from tasks.dedup import dedup
from tasks.extract import extract
from tasks.fanout import PartItem, fan_out
from tasks.processes import interrupt
from tasks.stage import Job
from tests.tasks.clusters import Clusters
from tests.tasks.corpus_runs import run_stage, spec

KINDS = ("local", "dask", "ray")
Run = Callable[..., Job]


def write_lines(files: Path, number: int) -> dict[str, Any]:
    """Fails on seven, dies on three."""
    if number == 7:
        raise ValueError("seven is poisoned")
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    (files / "lines.txt").write_text(f"{number} 行中文 and English\n" * number, "utf-8")
    return {"lines": number, "is_main": threading.current_thread() is threading.main_thread()}


def kill_the_worker_once(files: Path, flag: Path, kind: str) -> dict[str, Any]:
    if flag.exists():
        return write_lines(files, 1)
    (files / "half.txt").write_text("half")
    flag.touch()
    # Over the server of processes, whoever wanted the part.
    worker = psutil.Process().parent().parent() if kind != "local" else psutil.Process()
    assert worker
    worker.kill()
    time.sleep(60)
    return {}


def note_and_wait(files: Path, log: Path, seconds: float) -> dict[str, Any]:
    with log.open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    time.sleep(seconds)
    return {}


def copy_both(files: Path, inputs: list[Path], scratch: Path) -> dict[str, Any]:
    texts = [path.read_text("utf-8") for path in (*inputs, scratch)]
    (files / "all.txt").write_text("".join(texts), "utf-8")
    return {}


def items(*numbers: int) -> list[PartItem]:
    return [PartItem({"number": n}, (n,), label=f"shard {n}") for n in numbers]


@pytest.fixture(params=KINDS)
def fanout(request: pytest.FixtureRequest, clusters: Clusters) -> FanoutConfig:
    return LOCAL if request.param == "local" else of_kind(request.param, clusters)


def of_kind(kind: str, clusters: Clusters) -> FanoutConfig:
    return FanoutConfig.model_validate({"kind": kind, "address": clusters.address(kind)})


@pytest.fixture
def job(tmp_path: Path) -> Run:
    def make(fanout: FanoutConfig, name: str = "job", store: Store | None = None) -> Job:
        path = tmp_path / name
        for folder in ("files", "logs", "state"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        store = store or Store(tmp_path / "store")
        return Job(node="n", stage="made", path=path, store=store, workers=2, fanout=fanout)

    return make


def test_the_parts_are_those_of_this_process_and_are_reused(
    fanout: FanoutConfig, job: Run, tmp_path: Path
) -> None:
    alone = job(LOCAL, "alone", Store(tmp_path / "other"))
    alone.workers = 1
    expected = fan_out(alone, write_lines, items(1, 2, 4))
    parts = fan_out(job(fanout), write_lines, items(1, 2, 4))
    assert [(p.fingerprint, p.digest) for p in parts] == [
        (p.fingerprint, p.digest) for p in expected
    ]
    assert all(part.metrics["is_main"] for part in parts)
    again = job(fanout, "again")
    assert fan_out(again, write_lines, items(1, 2, 4, 5))[0].is_reused
    assert again.metrics["shards"] == {"built": 1, "reused": 3}


def test_data_stages_make_the_artifacts_that_they_make_here(
    clusters: Clusters, tmp_path: Path
) -> None:
    for number in range(2):
        lines = [
            json.dumps(
                {"text": f"第{n % 5}篇文章讲河流怎样从山里流到海边。 And {n % 7} in English."}
            )
            for n in range(20 * number, 20 * number + 20)
        ]
        (tmp_path / f"texts-{number}.jsonl").write_text("\n".join(lines), "utf-8")
    digests: dict[str, dict[str, str]] = {}
    for kind in KINDS:
        fanout = LOCAL if kind == "local" else of_kind(kind, clusters)
        root = tmp_path / kind
        root.mkdir()
        sources = ExtractConfig(sources=(spec(tmp_path / "*.jsonl"),))
        corpus = run_stage(extract, sources, {}, root, fanout=fanout).artifact
        done = run_stage(dedup, DedupConfig(), {"corpus": corpus}, root, fanout=fanout)
        assert done.record.build["fanout"] == kind
        digests[kind] = {r.fingerprint: r.digest for r in Store(root / "store").records()}
    assert digests["local"] == digests["dask"] == digests["ray"]
    assert len(digests["local"]) == 7  # two corpora; of each shard text and signatures; the choice


def test_one_that_raises_and_one_that_dies_are_named_and_the_others_kept(
    fanout: FanoutConfig, job: Run
) -> None:
    with pytest.raises(PartsFailed) as failed:
        fan_out(job(fanout), write_lines, items(1, 3, 7))
    assert "2 of 3 parts failed" in str(failed.value)
    assert "shard 7: ValueError: seven is poisoned (test_fanout_kinds.py:" in str(failed.value)
    assert "shard 3: its worker died" in str(failed.value)
    assert fan_out(job(fanout, "again"), write_lines, items(1))[0].is_reused


def test_a_worker_killed_in_the_middle_costs_no_part(
    fanout: FanoutConfig, job: Run, tmp_path: Path
) -> None:
    killer = PartItem({"killer": 1}, (tmp_path / "flag", fanout.kind), "shard 1")
    parts = fan_out(job(fanout), kill_the_worker_once, [killer])
    assert [path.name for path in parts[0].files.iterdir()] == ["lines.txt"]


def test_two_runs_at_once_build_each_part_once(
    fanout: FanoutConfig, job: Run, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    wanted = [PartItem({"n": n}, (log, 0.5)) for n in range(2)]
    built: list[list[str]] = []

    def run(name: str) -> None:
        parts = fan_out(job(fanout, name), note_and_wait, wanted)
        built.append([part.digest for part in parts])

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built[0] == built[1]
    assert len(log.read_text().splitlines()) == 2


def test_ctrl_c_ends_what_is_being_built(fanout: FanoutConfig, job: Run, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()

    def run() -> None:
        with suppress(KeyboardInterrupt):
            fan_out(job(fanout), note_and_wait, [PartItem({"n": n}, (log, 60.0)) for n in range(2)])

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 120
    while len(pids := log.read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    interrupt(thread.ident or 0)
    thread.join(60)
    assert not thread.is_alive()
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(int(pid)) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_with_a_store_on_s3_workers_fetch_what_they_read(
    clusters: Clusters, s3_server: str, job: Run, tmp_path: Path
) -> None:
    fanout = of_kind("dask", clusters)
    store = Store(f"{s3_server}/{tmp_path.name}", cache=tmp_path / "cache")
    made = job(fanout, store=store)
    (read,) = fan_out(made, write_lines, items(1))
    scratch = made.state / "scratch.txt"
    scratch.write_text("草稿")
    shutil.rmtree(store.root / "artifacts")  # as on a machine that has no copy yet
    item = PartItem({"both": 1}, ([read.files / "lines.txt"], scratch))
    (part,) = fan_out(made, copy_both, [item])
    assert (part.files / "all.txt").read_text("utf-8") == "1 行中文 and English\n草稿"
    scratch.unlink()


@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_a_store_that_the_cluster_does_not_see_is_refused(
    kind: str, clusters: Clusters, job: Run, tmp_path: Path
) -> None:
    fanout = of_kind(kind, clusters)
    folder = os.open(tmp_path, os.O_RDONLY)
    only_here = fcntl.fcntl(folder, fcntl.F_DUPFD, 900)
    try:
        hidden = job(fanout, store=Store(f"/proc/self/fd/{only_here}/store"))
        with pytest.raises(
            ValueError, match=r"does not see the store .*; put the store on a folder"
        ):
            fan_out(hidden, write_lines, items(1))
    finally:
        os.close(only_here)
        os.close(folder)


def test_what_cannot_be_reached_is_said(job: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    with pytest.raises(ValueError, match=r"set DASK_SCHEDULER_ADDRESS"):
        fan_out(job(FanoutConfig(kind="dask")), write_lines, items(1))
    nobody = FanoutConfig(kind="dask", address="tcp://127.0.0.1:9")
    monkeypatch.setattr("tasks.fanout_dask.CONNECT_SECONDS", 0.5)
    with pytest.raises(ValueError, match=r"no dask cluster answers at tcp://127.0.0.1:9"):
        fan_out(job(nobody), write_lines, items(1))


def test_an_address_without_a_cluster_is_refused() -> None:
    with pytest.raises(ValueError, match="say fanout=dask or fanout=ray"):
        FanoutConfig(address="tcp://127.0.0.1:1")


def test_a_run_says_whose_processes_it_uses() -> None:
    here = Path(__file__).parent
    given = ["fanout=dask", "fanout.address=tcp://127.0.0.1:8786"]
    graph = load_graph("demo", given, base=here)
    assert graph.fanout == FanoutConfig(kind="dask", address="tcp://127.0.0.1:8786")
    assert load_graph("demo", [], base=here).fanout == LOCAL
    with pytest.raises(RecipeError, match=r"fanout\.kind"):
        load_graph("demo", ["fanout=spark"], base=here)
