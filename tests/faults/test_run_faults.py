"""A whole recipe by the real command: killed, interrupted, damaged; the result stays the same."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.runs import Home
from flows.services import read_service
from storage.store import PARTS_BUILT
from tasks.processes import is_alive
from tests.faults.small_run import (
    Place,
    Told,
    below,
    built,
    digests,
    finish,
    is_fanned_out,
    kill_flow,
    kill_tree,
    steps_of,
    wait_until,
)
from tests.tasks.launching import processes_of, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    found = Place(tmp_path_factory.mktemp("faults"))
    yield found
    found.down()


@pytest.fixture(scope="module")
def unbroken(place: Place) -> Told:
    """The run that nothing disturbs, in the store `unbroken`."""
    return place.run("unbroken")


def attempt_at(place: Place, store: str, stage: str, step: int) -> Path | None:
    """The attempt at a stage, once its job is that far."""
    attempt = place.attempt(store, stage)
    return attempt if attempt and steps_of(attempt) > step else None


def interrupt(flow: "subprocess.Popen[str]") -> Told:
    """Ctrl-C: every process of the run ends, without a word of Python's; what it tells last."""
    processes = below(flow)
    os.killpg(flow.pid, signal.SIGINT)
    out, err = flow.communicate(timeout=60)
    assert flow.returncode == 130, out + err
    assert "Traceback" not in out + err
    wait_for(lambda: not any(is_alive(pid) for pid in processes), 20)
    return json.loads(out.splitlines()[-1])


def kill_at(place: Place, store: str, stage: str, step: int) -> int:
    """kill -9 of everything, once a torch stage is that far; how far it came."""
    flow = place.start(store)
    wait_until(flow, lambda: attempt_at(place, store, stage, step))
    attempt = place.attempt(store, stage)
    assert attempt
    kill_tree(flow, attempt)
    return steps_of(attempt)


def test_training_interrupted_and_killed_gives_the_weights_of_an_unbroken_run(
    place: Place, unbroken: Told
) -> None:
    place.copy("unbroken", "broken", without=["pretrain", "ppo"])
    flow = place.start("broken")
    wait_until(flow, lambda: attempt_at(place, "broken", "pretrain", 25))
    assert interrupt(flow)["stages"]["pretrain"]["status"] == "failed"
    interrupted = place.attempt("broken", "pretrain")
    assert interrupted
    killed = kill_at(place, "broken", "pretrain", steps_of(interrupted) + 20)
    killed_later = kill_at(place, "broken", "ppo", 5)
    again = place.run("broken")
    assert built(again) == {"ppo"}
    assert digests(again) == digests(unbroken)
    # No step twice and none left out.
    for stage, reached in (("pretrain", killed), ("ppo", killed_later)):
        noted = steps_of(Path(again["stages"][stage]["path"]))
        assert noted == steps_of(Path(unbroken["stages"][stage]["path"])) > reached


def test_a_job_whose_flow_is_killed_goes_on_and_the_next_run_joins_it(
    place: Place, unbroken: Told
) -> None:
    place.copy("unbroken", "joined", without=["pretrain"])
    flow = place.start("joined")
    wait_until(flow, lambda: attempt_at(place, "joined", "pretrain", 0))
    attempt = place.attempt("joined", "pretrain")
    assert attempt
    workers = processes_of(attempt)
    kill_flow(flow)
    assert workers
    assert all(is_alive(pid) for pid in workers)
    assert place.going()
    again = place.run("joined")
    assert built(again) == {"pretrain"}
    assert digests(again) == digests(unbroken)
    assert place.going() == []


def test_a_prefect_server_that_is_killed_comes_back_and_hears_the_end(
    place: Place, unbroken: Told
) -> None:
    place.copy("unbroken", "served", without=["pretrain"])
    flow = place.start("served")
    wait_until(flow, lambda: attempt_at(place, "served", "pretrain", 10))
    server = read_service(Home(place.folder / "home"), "prefect")
    assert server
    os.kill(server.pid, signal.SIGKILL)
    told = finish(flow)
    assert built(told) == {"pretrain"}
    assert digests(told) == digests(unbroken)
    again = read_service(Home(place.folder / "home"), "prefect")
    assert again
    assert again.pid != server.pid
    assert again.url == server.url
    assert place.going() == []


def test_killed_in_the_middle_of_tokenize_costs_no_shard_twice(
    place: Place, unbroken: Told
) -> None:
    place.copy("unbroken", "killed_tokenize", without=["tokenize"])
    attempts = place.store("killed_tokenize") / "attempts"
    flow = place.start("killed_tokenize")
    wait_until(flow, lambda: any(attempts.glob(f"*/*/state/{PARTS_BUILT}")))
    kill_flow(flow)
    again = place.run("killed_tokenize")
    shards = again["stages"]["tokenize"]["metrics"]["shards"]
    assert shards["reused"] >= 1
    assert shards["reused"] + shards["built"] == 4
    assert built(again) == {"tokenize"}
    assert digests(again) == digests(unbroken)


def test_what_is_damaged_is_named_and_rebuilt_and_nothing_else(
    place: Place, unbroken: Told
) -> None:
    place.copy("unbroken", "damaged", without=[])
    assert not built(place.run("damaged"))
    artifacts = place.store("damaged") / "artifacts"
    corpus = artifacts / unbroken["stages"]["extract"]["fingerprint"]
    shard = json.loads((corpus / "files/manifest.json").read_bytes())["shards"][2]["part"]
    text = artifacts / shard / "files/shard.parquet"
    content = bytearray(text.read_bytes())
    content[len(content) // 2] ^= 1
    text.write_bytes(content)
    tokenizer = unbroken["stages"]["tokenizer"]["fingerprint"]
    (artifacts / tokenizer / "files/tokenizer.json").unlink()

    damaged = {item["fingerprint"]: item for item in place.verify()["damaged"]}
    assert {name: item["node"] for name, item in damaged.items()} == {
        shard: "extract",
        tokenizer: "tokenizer",
    }
    assert "shard.parquet" in damaged[shard]["wrong"]
    assert "tokenizer.json" in damaged[tokenizer]["wrong"]
    before = place.written("damaged")
    again = place.run("damaged")
    assert built(again) == {"extract", "tokenizer"}
    after = place.written("damaged")
    assert {name for name in after if after[name] != before.get(name)} == set(damaged)
    assert digests(again) == digests(unbroken)


def test_ctrl_c_ends_a_fan_out_and_the_next_run_goes_on(place: Place, unbroken: Told) -> None:
    place.copy("unbroken", "cancelled", without=["extract"])
    flow = place.start("cancelled")
    # Its workers have just been started: they have not yet said that Ctrl-C is not for them.
    wait_until(flow, lambda: is_fanned_out(flow))
    assert interrupt(flow)["stages"]["extract"]["status"] == "failed"
    again = finish(place.start("cancelled"))
    assert built(again) == {"extract"}
    assert digests(again) == digests(unbroken)
