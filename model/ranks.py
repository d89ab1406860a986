"""The processes of one job: who this one is, how they add up numbers, and when to stop."""

import os
import signal
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from conf.launch import LaunchConfig

Group = dist.ProcessGroup
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A rank that waits longer for the others gives up, so that one dead rank ends the job."""


@dataclass
class Ranks:
    """This process among the processes of its job. Alone, every exchange is free.

    Where several processes hold one model together, they are peers: they get the same data and agree in
    every figure, and `rank` and `world` number the groups of peers.
    """

    rank: int = 0
    world: int = 1
    peer: int = 0
    """Which of the processes of its model this is."""
    peers: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    is_stopping: bool = False
    """Set by SIGTERM: save at the next step's end and leave."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.place == 0

    @property
    def place(self) -> int:
        """Number of this process among all of the job."""
        return self.rank * self.peers + self.peer

    @property
    def processes(self) -> int:
        """All of the job."""
        return self.world * self.peers

    def add(self, numbers: Sequence[float]) -> list[float]:
        """Sum of each number over the ranks, the same on all processes (float64)."""
        if self.processes == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        # Peers bring the same numbers; whole ones stay whole.
        return (total / self.peers).tolist()

    def gather(self, value: Any) -> list[Any]:
        """The plain value of every rank, in order."""
        if self.processes == 1:
            return [value]
        values: list[Any] = [None] * self.processes
        dist.all_gather_object(values, value)
        return values[:: self.peers]

    def wait(self, group: Group | None = None) -> None:
        """Until all processes are here, or a thread of each, which has a group of its own."""
        if self.processes > 1:
            dist.barrier(group)

    def group_of_threads(self) -> Group | None:
        """Where threads of all processes meet while the processes themselves exchange other things."""
        if self.processes == 1:
            return None
        return cast("Group", dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT))

    def stop_on_sigterm(self) -> None:
        """Take SIGTERM as the wish to save and leave."""

        def note(_number: int, _frame: object) -> None:
            self.is_stopping = True

        signal.signal(signal.SIGTERM, note)

    def leave(self) -> None:
        """Part from the other ranks."""
        if dist.is_initialized():
            dist.destroy_process_group()


def join_ranks(launch: LaunchConfig) -> Ranks:
    """Become a rank of the job, by the environment that torchrun or deepspeed set.

    Raises ValueError when the number of processes is not the one that the launch settings name, or
    CUDA is asked for and absent.
    """
    place, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world != launch.ranks:
        raise ValueError(
            f"{world} process(es) were started, the launch settings name {launch.ranks}; start the job "
            f"through its launcher"
        )
    device = _device(launch)
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(launch.threads or max(1, cores // world))
    if device.type == "cuda" and launch.is_deterministic:
        be_deterministic()
    # Engines that spread weights or states exchange them even where one rank has them all.
    if world > 1 or launch.engine not in ("plain", "ddp"):
        backend = "nccl" if device.type == "cuda" else "gloo"
        if backend == "nccl" and launch.offload == "parameters" and launch.engine == "fsdp":
            # Ranks put their parts of a norm and of a checkpoint together on the host, where they are.
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    rank, peer = divmod(place, launch.model_processes)
    return Ranks(
        rank=rank,
        world=world // launch.model_processes,
        peer=peer,
        peers=launch.model_processes,
        device=device,
    )


def be_deterministic() -> None:
    """Have CUDA take kernels that give the same bits every time, and warn where there is none."""
    # cuBLAS reads it when its first handle is made; without it its split sums may differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Memory that is written before it is read needs no filling; that costs a pass over every tensor.
    cast("Any", torch.utils.deterministic).fill_uninitialized_memory = False


@contextmanager
def same_bits() -> Generator[None]:
    """While weights learn, a kernel that only warns is none where determinism is asked for.

    torch's attention is one of them on CUDA: where a warning is enough, FlashAttention adds its gradients up
    in any order, and cuDNN goes before it. What else a step computes has a deterministic form; sampling
    (a cumulative sum) has none, and stays outside.
    """
    is_asked = torch.are_deterministic_algorithms_enabled()
    if not (is_asked and torch.is_deterministic_algorithms_warn_only_enabled()):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def _device(launch: LaunchConfig) -> torch.device:
    if launch.device == "cpu" or (launch.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "launch.device is cuda and no CUDA device was found; use launch.device=auto"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
