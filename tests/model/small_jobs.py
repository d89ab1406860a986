"""Jobs as the launcher would write them, run in processes of their own."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from conf.contract import JobFile
from conf.launch import LaunchConfig
from conf.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def write_job(
    attempt: Path, stage: str, settings: Settings, inputs: dict[str, Path], launch: LaunchConfig
) -> Path:
    """The job file of an attempt in that folder."""
    for name in ("files", "logs", "state"):
        (attempt / name).mkdir(parents=True, exist_ok=True)
    job = JobFile(
        stage=stage,
        node=stage,
        settings=settings.model_dump(mode="json"),
        inputs={name: str(path) for name, path in inputs.items()},
        sources={},
        files=attempt / "files",
        logs=attempt / "logs",
        state=attempt / "state",
        launch=launch,
    )
    path = attempt / "state" / "job.json"
    path.write_text(job.model_dump_json(), "utf-8")
    return path


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(module: str, job: Path, *, processes: int = 1, **environment: str) -> list[Any]:
    """The ranks of a job, started as a launcher would; environment variables as keywords."""
    port = free_port()
    ranks: list[Any] = []
    for rank in range(processes):
        variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
        if processes > 1:
            variables |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", module, str(job)],
                cwd=ROOT,
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return ranks


def start_pair(module: str, *arguments: str, processes: int = 2) -> list[Any]:
    """Ranks that run a test's module, as a launcher would start them."""
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip


def finish(ranks: list[Any], *, code: int = 0, timeout: float = 240) -> str:
    """Wait for all ranks; every one must end with that code. Returns what they printed."""
    # All at once: a rank that cannot write what it says waits, and the others for it.
    with ThreadPoolExecutor(len(ranks)) as pool:
        output = "".join(pool.map(lambda rank: rank.communicate(timeout=timeout)[0], ranks))
    assert [rank.returncode for rank in ranks] == [code] * len(ranks), output
    return output
