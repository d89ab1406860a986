"""What the fault tests share: a whole small recipe, run by the real command, and ways to end it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from flows.runs import Home
from flows.services import read_service
from tasks.processes import descendants
from tests.tasks.launching import processes_of, wait_for

RECIPE = """
seed: 0
launch: {threads: 1}
shape: {dim: 32, layers: 1, heads: 2, kv_heads: 1, context: 128}
stages:
  world: {warcs: 4, good_pages: 24, animals: 6, chats: 60, pairs: 60, held_pairs: 10}
  extract:
    sources: [{node: world, path: "crawl/*.warc.gz", domain: web}]
    bucket_bytes: 65536
  filter: {from: {corpus: extract}}
  tokenizer: {from: {corpus: filter}, vocabulary: 300}
  tokenize: {from: {corpus: filter, tokenizer: tokenizer}}
  pretrain:
    from: {tokens: tokenize}
    tokens: 81920
    batch_tokens: 512
    held_tokens: 2000
    evaluate_every_steps: 0
    checkpoint_every_steps: 10
  chats:
    sources:
      - {node: world, path: chats/train.jsonl, split: train}
      - {node: world, path: chats/held.jsonl, split: held}
  sft: {from: {policy: pretrain, conversations: chats}, max_steps: 2, batch_rows: 4, held_rows: 4}
  pairs:
    sources:
      - {node: world, path: preferences/train.jsonl, split: train}
      - {node: world, path: preferences/held.jsonl, split: held}
  reward:
    from: {policy: sft, preferences: pairs}
    max_steps: 2
    batch_rows: 4
    scale_answers: 4
    max_new_tokens: 4
  ppo:
    from: {policy: sft, reward: reward, conversations: chats}
    iterations: 24
    rollout_rows: 4
    minibatch_rows: 4
    max_new_tokens: 8
    held_prompts: 4
    checkpoint_every_iterations: 3
"""

PATIENCE_SECONDS = 1200
"""Of a busy machine; a run whose Prefect server is gone tells it so for some minutes."""
Told = dict[str, Any]
"""What `run --json` prints."""


@dataclass
class Place:
    """A working folder with the recipe, and the command line in it; stores are told apart by name."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the commands find set, beside what they need."""
    within: Sequence[str] = ()
    """What stands before the command, such as that it runs in another network."""
    bucket: str = ""
    """`s3://` address below which the stores are; folders beside the home where it is empty."""

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "small.yaml").write_text(RECIPE, "utf-8")

    def store(self, name: str) -> Path:
        """Folder of a store, or of what is built and read of one on S3."""
        return self.folder / "home" / "cache" if self.bucket else self.folder / name

    def start(self, store: str, *arguments: str) -> "subprocess.Popen[str]":
        """`bessemer run small.yaml` in a process group of its own."""
        address = f"{self.bucket}/{store}" if self.bucket else self.store(store)
        return self._bessemer("run", "small.yaml", f"store={address}", *arguments, "--json")

    def run(self, store: str, *arguments: str) -> Told:
        """A run that has to end well."""
        return finish(self.start(store, *arguments))

    def verify(self) -> dict[str, Any]:
        """What `verify --full` finds in the store of the newest run."""
        return finish(self._bessemer("verify", "--full", "--json"), expect=1)

    def down(self) -> None:
        """End the services."""
        self._bessemer("down").communicate(timeout=60)

    def copy(self, store: str, target: str, *, without: Sequence[str]) -> None:
        """A copy of a finished store that lacks the artifacts of some nodes and their parts."""
        shutil.copytree(self.store(store), self.store(target), symlinks=True)
        for path in (self.store(target) / "artifacts").iterdir():
            if json.loads((path / "record.json").read_bytes())["node"] in without:
                shutil.rmtree(path)

    def written(self, store: str) -> dict[str, int]:
        """When each artifact of a store was committed."""
        records = self.store(store).glob("artifacts/*/record.json")
        return {path.parent.name: path.stat().st_mtime_ns for path in records}

    def attempt(self, store: str, stage: str) -> Path | None:
        """Folder of a torch stage's unfinished attempt, once its job is described."""
        for path in self.store(store).glob("attempts/*/*/state/job.json"):
            with contextlib.suppress(FileNotFoundError):
                if json.loads(path.read_bytes())["stage"] == stage:
                    return path.parents[1]
        return None

    def going(self) -> list[str]:
        """Names of the flow runs that Prefect's page shows as running."""
        service = read_service(Home(self.folder / "home"), "prefect")
        assert service
        wanted = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING"]}}}}
        found = httpx.post(f"{service.url}/api/flow_runs/filter", json=wanted, timeout=30)
        return [run["name"] for run in found.raise_for_status().json()]

    def _bessemer(self, *arguments: str) -> "subprocess.Popen[str]":
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "BESSEMER_"))}
        return subprocess.Popen(
            [*self.within, str(Path(sys.executable).with_name("bessemer")), *arguments],
            cwd=self.folder,
            env={
                **kept,
                "BESSEMER_HOME": str(self.folder / "home"),
                "BESSEMER_TRACKING": "off",
                "BESSEMER_WORKERS": "1",
                "BESSEMER_RESERVE_GB": "off",  # full disks are filled here, not foreseen
                **self.environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


def finish(process: "subprocess.Popen[str]", expect: int = 0) -> Told:
    """Wait for a command's end and read the object that it prints last."""
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == expect, out + err
    return json.loads(out.splitlines()[-1])


def digests(told: Told) -> dict[str, str]:
    """Node -> digest of its artifact."""
    return {name: stage["digest"] for name, stage in told["stages"].items()}


def built(told: Told) -> set[str]:
    """Nodes that were built."""
    return {name for name, stage in told["stages"].items() if stage["status"] == "built"}


def steps_of(attempt: Path) -> int:
    """Steps that a torch job has noted."""
    try:
        return (attempt / "logs" / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def wait_until(
    flow: "subprocess.Popen[str]", condition: Callable[[], Any], seconds: float = 120
) -> None:
    """Wait for a moment in the life of a run, which must not end before it."""
    wait_for(lambda: condition() or flow.poll() is not None, seconds)
    assert flow.poll() is None, flow.communicate()


def kill_flow(flow: "subprocess.Popen[str]") -> None:
    """kill -9 of the command's whole process group; torch jobs have groups of their own."""
    os.killpg(flow.pid, signal.SIGKILL)
    flow.communicate(timeout=30)


def kill_tree(flow: "subprocess.Popen[str]", attempt: Path) -> None:
    """kill -9 of the command, the supervisor and the ranks."""
    kill_flow(flow)
    for pid in processes_of(attempt):
        # Another may have taken it along.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not processes_of(attempt))


def below(flow: "subprocess.Popen[str]") -> set[int]:
    """The live processes of a run: the command's own and all that it started."""
    return {flow.pid, *descendants(flow.pid)}


def is_fanned_out(flow: "subprocess.Popen[str]") -> bool:
    """Whether a run has worker processes for shards: children of its fork server, which keep its name."""
    lines = [Path(f"/proc/{pid}/cmdline") for pid in descendants(flow.pid)]
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return sum(b"forkserver" in line.read_bytes() for line in lines) > 1
    return False
