"""One torch job on two nodes: addresses of one machine, and in the long form network namespaces."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conf.launch import LaunchConfig
from tasks.launch import JobFailed
from tasks.processes import descendants
from tests.model.small_jobs import ROOT, free_port
from tests.model.small_tokens import write_small_tokens
from tests.tasks.launching import (
    WORKER,
    count,
    install_ssh,
    make_job,
    processes_of,
    run,
    wait_for,
)
from tests.tasks.node_zero import STEPS, train

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Network:
    """Two nodes that reach each other."""

    rendezvous: str
    interface: str
    within: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    """What stands before a command, so that it runs on that node."""


@pytest.fixture(params=["addresses", pytest.param("namespaces", marks=pytest.mark.soak)])
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    if request.param == "addresses":
        yield Network(f"127.0.0.2:{free_port()}", "lo")
        return
    names = [f"bessemer{os.getpid()}n{node}" for node in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "wire0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "wire0",
            "netns",
            names[1],
        )
        for node, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{node + 1}/24", "dev", "wire0")
            for device in ("lo", "wire0"):
                ip("-n", name, "link", "set", device, "up")
        first, second = (["ip", "netns", "exec", name] for name in names)
        yield Network("10.77.0.1:29511", "wire0", (first, second))
    finally:
        for name in names:
            ip("netns", "delete", name)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@dataclass
class Nodes:
    """The job on both nodes."""

    folder: Path
    network: Network

    @property
    def attempt(self) -> Path:
        return self.folder / "attempt"

    def start(self) -> "list[subprocess.Popen[str]]":
        """First and second node, each with a home of its own: its host's lock is one per home."""
        launch = LaunchConfig(
            engine="ddp",
            nodes=2,
            threads=1,
            rendezvous=self.network.rendezvous,
            environment={"GLOO_SOCKET_IFNAME": self.network.interface},
        )
        job = self.attempt / "state" / "job.json"
        job.unlink(missing_ok=True)
        zero = [sys.executable, "-m", "tests.tasks.node_zero", str(self.folder)]
        first = self._start(0, [*zero, launch.model_dump_json()])
        wait_for(job.exists)
        return [
            first,
            self._start(1, [sys.executable, "-m", "tasks.node", "model.pretrain", str(job), "1"]),
        ]

    def _start(self, node: int, command: list[str]) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*self.network.within[node], *command],
            cwd=ROOT,
            env=os.environ
            | {"BESSEMER_HOME": str(self.folder / str(node)), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def losses(self) -> list[float]:
        path = self.attempt / "logs" / "metrics.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return [json.loads(line)["loss"] for line in lines]


def test_two_nodes_lose_one_and_end_like_one_process(tmp_path: Path, network: Network) -> None:
    write_small_tokens(tmp_path / "tokens" / "files")
    nodes = Nodes(tmp_path, network)
    first, second = nodes.start()
    wait_for(lambda: len(nodes.losses()) > 8)
    for pid in [*descendants(second.pid), second.pid]:
        os.kill(pid, signal.SIGKILL)
    second.communicate()
    output = first.communicate(timeout=120)[0]
    assert first.returncode == 1, output
    assert "JobFailed: pretrain: rank 1 of 2" in output
    assert not processes_of(nodes.attempt), "the second node's ranks went with it"
    reached = len(nodes.losses())
    assert reached < STEPS
    ended = [node.communicate(timeout=120)[0] for node in nodes.start()]
    assert (nodes.attempt / "logs" / "result.json").exists(), ended
    plain = Nodes(tmp_path / "plain", network)
    train(plain.folder, tmp_path / "tokens", LaunchConfig(threads=1))
    assert nodes.losses() == pytest.approx(plain.losses(), rel=0, abs=1e-6)


@pytest.mark.soak
def test_a_node_of_a_host_file_ends_when_the_first_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESSEMER_HOME", str(tmp_path))
    hostfile = install_ssh(tmp_path, monkeypatch)
    # The other host: nothing below the first one's supervisor.
    (tmp_path / "bin" / "ssh").write_text("#!/bin/sh\nexec sleep 600\n")
    job, failed = make_job(tmp_path), list[JobFailed]()
    launch = {"launcher": "deepspeed", "engine": "zero1", "nodes": 2, "hostfile": str(hostfile)}

    def follow() -> None:
        with pytest.raises(JobFailed) as caught:
            run(job, act="raise", act_at=100, steps=100_000, launch=launch)
        failed.append(caught.value)

    follower = threading.Thread(target=follow)
    follower.start()
    path = job.state / "job.json"
    wait_for(path.exists)
    other = subprocess.Popen(
        [sys.executable, "-m", "tasks.node", WORKER, str(path), "1"],
        cwd=ROOT,
        env=os.environ
        | {
            "BESSEMER_HOME": str(tmp_path / "other"),
            "BESSEMER_RENDEZVOUS": f"127.0.0.1:{free_port()}",
            "PYTHONPATH": str(ROOT),
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    follower.join(180)
    assert "the thing broke" in str(failed[0])
    assert "the job has ended on the first node" in other.communicate(timeout=60)[0]
    assert count(job, 1) > 0
    assert not processes_of(job.path)
