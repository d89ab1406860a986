"""The command line and the environment in which the ranks of a torch job start."""

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from conf.launch import LaunchConfig
from tasks.hosts import read_hosts
from tasks.processes import HostLock, cores

ROOT = Path(__file__).resolve().parents[1]
"""Folder from which the packages are imported."""
RENDEZVOUS = "BESSEMER_RENDEZVOUS"
"""Variable with the first node's HOST:PORT, where the job file does not have it."""


@dataclass(frozen=True)
class Placement:
    """Where a job runs; holding it holds the locks."""

    device: Literal["cpu", "cuda"]
    threads: int
    """CPU threads per rank."""
    devices: tuple[str, ...] = ()
    """CUDA devices, one per rank."""
    locks: tuple[HostLock, ...] = field(default=(), repr=False)

    @staticmethod
    def on_cpu(launch: LaunchConfig, lock: HostLock) -> "Placement":
        """All ranks on this host's cores."""
        return Placement("cpu", threads_per_rank(launch), locks=(lock,))

    @staticmethod
    def elsewhere(launch: LaunchConfig) -> "Placement":
        """On machines that another program hands out; nothing of this one is taken."""
        return Placement("cuda" if launch.device == "cuda" else "cpu", threads_per_rank(launch))

    @staticmethod
    def on_cuda(launch: LaunchConfig, taken: Mapping[str, HostLock]) -> "Placement":
        """One device per rank."""
        return Placement(
            "cuda", threads_per_rank(launch), tuple(taken), locks=tuple(taken.values())
        )


def threads_per_rank(launch: LaunchConfig) -> int:
    """CPU threads of each rank: what the setting says, else an equal share of the cores."""
    return launch.threads or max(1, cores() // launch.processes)


def command(
    launch: LaunchConfig, module: str, job_file: Path, placement: Placement, node: int = 0
) -> list[str]:
    """The process to start for a job on one of its nodes.

    A single rank with engine `plain` is started directly: torchrun would import torch in a process
    of its own (seconds) to watch over one child, which the supervisor does already.
    """
    python = [sys.executable, "-u", "-m"]
    rank = ["tasks.rank", module, str(job_file)]
    if launch.launcher == "deepspeed":
        options = _deepspeed_options(placement, launch, node)
        return [
            *python,
            "deepspeed.launcher.runner",
            *options,
            "--no_local_rank",
            "--module",
            *rank,
        ]
    if launch.ranks == 1 and launch.engine == "plain":
        return [*python, *rank]
    if launch.nodes == 1:
        place = ["--standalone", "--local-addr", "127.0.0.1"]
    else:
        host, _, port = launch.rendezvous.rpartition(":")
        place = ["--nnodes", str(launch.nodes), "--node-rank", str(node)]
        place += ["--master-addr", host, "--master-port", port]
    options = ["--nproc-per-node", str(launch.processes), *place]
    return [*python, "torch.distributed.run", *options, "-m", *rank]


def _deepspeed_options(placement: Placement, launch: LaunchConfig, node: int) -> list[str]:
    if launch.nodes > 1:
        return _deepspeed_nodes(placement, launch, node)
    # The launcher numbers devices itself and refuses CUDA_VISIBLE_DEVICES beside --num_gpus.
    if placement.device == "cuda":
        ranks = ["--include", f"localhost:{','.join(placement.devices)}"]
    else:
        ranks = ["--num_gpus", str(launch.processes)]
    return [*ranks, "--master_addr", "127.0.0.1", "--master_port", str(free_port())]


def _deepspeed_nodes(placement: Placement, launch: LaunchConfig, node: int) -> list[str]:
    """Every node starts its own ranks, told who the others are; of their devices the number counts."""
    any_devices = [str(number) for number in range(launch.processes)]
    devices = [any_devices] * launch.nodes
    if placement.device == "cuda":
        devices[node] = list(placement.devices)
    hosts = zip(read_hosts(launch), devices, strict=True)
    host, _, port = launch.rendezvous.rpartition(":")
    return [
        *("--hostfile", str(Path(launch.hostfile).expanduser())),
        *("--include", "@".join(f"{name}:{','.join(own)}" for name, own in hosts)),
        *("--no_ssh", "--node_rank", str(node), "--master_addr", host, "--master_port", port),
    ]


def environment(launch: LaunchConfig, placement: Placement) -> dict[str, str]:
    """This process's environment, with threads, devices and addresses set and telemetry off.

    The working directory stays out of the module path: a user's folder may well hold a `conf` or a
    `tasks` of its own.
    """
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    wanted = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        # Ninja, which makes DeepSpeed's kernels, lies beside this interpreter.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(placement.threads),
        "MKL_NUM_THREADS": str(placement.threads),
        # Threads that spin while they wait for one another make a step four times as slow as soon as
        # another process wants a core (868 against 193 ms, measured on two busy cores).
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        wanted.pop(name, None)
    wanted.pop("MASTER_ADDR", None)
    if launch.nodes == 1:
        wanted["MASTER_ADDR"] = "127.0.0.1"
        # Also beside NCCL: checkpoints that are written beside training meet by gloo.
        wanted["GLOO_SOCKET_IFNAME"] = "lo"
    if placement.device == "cpu":
        wanted["CUDA_VISIBLE_DEVICES"] = ""
        wanted["DS_ACCELERATOR"] = "cpu"
    elif launch.launcher == "deepspeed":
        wanted.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        wanted["CUDA_VISIBLE_DEVICES"] = ",".join(placement.devices)
    if home := os.environ.get("BESSEMER_HOME"):
        wanted.setdefault("TORCH_EXTENSIONS_DIR", str(Path(home).absolute() / "torch_extensions"))
    return {**wanted, **launch.environment}


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
