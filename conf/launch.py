"""Where and how the jobs of torch stages run. Nothing here changes what is computed."""

from typing import Annotated, Literal

from pydantic import Field

from conf.settings import Settings


class LaunchConfig(Settings):
    """One job: which launcher starts how many processes, on what, with which engine."""

    launcher: Literal["torchrun", "deepspeed"] = "torchrun"
    """Program that starts the ranks."""
    engine: Literal["plain", "ddp", "zero2"] = "plain"
    """How parameters and optimizer state are spread; `plain` needs one process."""
    processes: Annotated[int, Field(ge=1)] = 1
    """Ranks on this host."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where a device is found."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads per rank; 0 divides the cores among the ranks."""
    micro_batch: Annotated[int, Field(ge=0)] = 0
    """Sequences per forward pass and rank; 0 takes the whole batch of the rank at once."""
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Longest time between two checkpoints, besides those that the stage's settings ask for."""
    deadline_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Job is ended after this long; 0 for never. What was reached stays resumable."""
    stall_seconds: Annotated[float, Field(ge=0)] = 1800.0
    """Job is ended when its progress stands still for this long; 0 for never."""
    orphan_seconds: Annotated[float, Field(ge=0)] = 600.0
    """How long a job whose follower is gone goes on; 0 for ever."""
    grace_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Time between asking a job to stop (it checkpoints) and killing it."""
