"""Every engine over the same small pretraining in one pair of ranks: `python -m tests.model.engine_runs
TOKENS FOLDER NAME=STEP:PORT ... OLD-to-NEW ... NAME!STEP`.

For NAME=STEP:PORT, of LAUNCHES: an unbroken run in FOLDER/NAME; a run in FOLDER/NAME-broken whose processes,
forked from the ranks and met at that port, get kill -9 while they write down that step, and which the ranks
end; a run with a strict guard. For OLD-to-NEW the engine NEW ends what OLD has begun, in FOLDER/OLD-to-NEW.
Starting processes costs more than the runs. For NAME!STEP a run in FOLDER/NAME in which the ranks themselves
get kill -9 at that step, or at none.
"""

import importlib
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from conf.contract import JobFile
from conf.launch import LaunchConfig
from conf.pretrain import PhaseConfig, PretrainConfig
from conf.shape import ShapeConfig
from model import loop
from model.journal import Journal
from model.optimizer import LossScale
from model.pretrain import work
from model.ranks import Ranks, join_ranks
from tests.model.small_jobs import write_job

STEPS = 12
# Everything that could break a resume is on: dropout, a mixture, two phases, accumulation, held-out looks.
SETTINGS = PretrainConfig(
    shape=ShapeConfig(
        dim=32,
        layers=2,
        heads=4,
        kv_heads=2,
        context=32,
        dropout=0.1,
        has_qk_norm=True,
        has_qkv_bias=True,
    ),
    tokens=STEPS * 256,
    batch_tokens=256,
    learning_rate=3e-3,
    phases=(
        PhaseConfig(tokens=0.6, mix={"en": 0.7, "zh": 0.3}),
        PhaseConfig(tokens=0.4, mix={"zh": 1.0}),
    ),
    held_tokens=4096,
    evaluate_every_steps=6,
    checkpoint_every_steps=4,
)

# Buckets of DeepSpeed that this small model does not fit into at once.
BUCKETS = {
    "zero_optimization": {"reduce_bucket_size": 20_000, "stage3_prefetch_bucket_size": 10_000}
}
LAUNCHES: dict[str, dict[str, Any]] = {
    "plain": {"engine": "plain"},
    "ddp": {"engine": "ddp"},
    "fsdp": {"engine": "fsdp"},
    "tensor": {"engine": "fsdp", "tensor_parallel": 2},
    "pipeline": {"engine": "ddp", "pipeline_stages": 2},
    "zero1": {"engine": "zero1", "deepspeed": BUCKETS},
    "zero2": {"engine": "zero2", "deepspeed": BUCKETS},
    "zero3": {"engine": "zero3", "deepspeed": BUCKETS},
    "zero3_parameters": {"engine": "zero3", "deepspeed": BUCKETS, "offload": "parameters"},
    "fsdp_parameters": {"engine": "fsdp", "offload": "parameters"},
    "zero1_offload": {"engine": "zero1", "deepspeed": BUCKETS, "offload": "optimizer"},
    "zero2_offload": {"engine": "zero2", "deepspeed": BUCKETS, "offload": "optimizer"},
    "zero3_offload": {"engine": "zero3", "deepspeed": BUCKETS, "offload": "optimizer"},
    "zero2_fused_adam": {"engine": "zero2", "adamw": "deepspeed"},
    "zero3_cpu_adam": {"engine": "zero3", "adamw": "deepspeed", "offload": "parameters"},
    "plain_fp16": {"engine": "plain"},
    "fsdp_fp16": {"engine": "fsdp"},
    "zero1_fp16": {"engine": "zero1", "deepspeed": BUCKETS},
    "zero2_fp16": {"engine": "zero2", "deepspeed": BUCKETS},
    "zero3_fp16": {"engine": "zero3", "deepspeed": BUCKETS},
    "plain_muon": {"engine": "plain"},
    "ddp_muon": {"engine": "ddp"},
    "fsdp_muon": {"engine": "fsdp"},
    "tensor_muon": {"engine": "fsdp", "tensor_parallel": 2},
    "pipeline_muon": {"engine": "ddp", "pipeline_stages": 2},
    "plain_bf16": {"engine": "plain"},
    "ddp_bf16": {"engine": "ddp"},
    "fsdp_bf16": {"engine": "fsdp"},
    "tensor_bf16": {"engine": "fsdp", "tensor_parallel": 2},
    "pipeline_bf16": {"engine": "ddp", "pipeline_stages": 2},
    "zero2_bf16": {"engine": "zero2", "deepspeed": BUCKETS},
    "zero3_bf16": {"engine": "zero3", "deepspeed": BUCKETS},
    "fsdp_recomputed": {"engine": "fsdp", "checkpoint_activations": True},
    "tensor_recomputed": {
        "engine": "fsdp", "tensor_parallel": 2, "checkpoint_activations": True,
    },
    "pipeline_recomputed": {
        "engine": "ddp", "pipeline_stages": 2, "checkpoint_activations": True,
    },
    "zero3_recomputed": {"engine": "zero3", "deepspeed": BUCKETS, "checkpoint_activations": True},
}  # fmt: skip


FIRST_SCALE = 2.0**24


class Killed(BaseException):
    """The journal's pen breaks: nothing behind it runs."""


class BreakingJournal(Journal):
    """Dies when it is to write down a step, or has its process killed."""

    def __init__(self, logs: Path, *, is_writer: bool, last: int, is_killed: bool = False) -> None:
        super().__init__(logs, is_writer=is_writer)
        self._last, self._is_killed = last, is_killed

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        if step == self._last and self._is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self._last:
            raise Killed
        super().write(step, figures)


def placed(name: str, ranks: Ranks) -> tuple[LaunchConfig, Ranks]:
    """One of LAUNCHES, and this process's place in it."""
    launch = LaunchConfig.model_validate(
        {**LAUNCHES[name], "processes": ranks.processes, "threads": 1, "micro_batch": 3}
    )
    peers = launch.model_processes
    rank, peer = divmod(ranks.place, peers)
    return launch, replace(ranks, rank=rank, world=ranks.processes // peers, peer=peer, peers=peers)


def run(
    attempt: Path,
    tokens: Path,
    name: str,
    ranks: Ranks,
    *,
    killed_at: int = 0,
    **settings: object,
) -> None:
    """The whole job, or up to the step at which this process gets kill -9."""
    launch, ranks = placed(name, ranks)
    kind = {"optimizer": "muon"} if name.endswith("_muon") else {}
    kind |= {"precision": name[-4:]} if name.endswith(("_fp16", "_bf16")) else {}
    chosen = SETTINGS.model_copy(update={"launch": launch, **kind, **settings})
    if ranks.is_first:
        write_job(attempt, "pretrain", chosen, {"tokens": tokens}, launch)
    ranks.wait()
    job = JobFile.model_validate_json((attempt / "state" / "job.json").read_text("utf-8"))
    journal = BreakingJournal(
        attempt / "logs", is_writer=ranks.is_first, last=killed_at or -1, is_killed=True
    )
    # In fp16 the first steps overflow; by what ranks are averaged over, each multiplies its loss.
    first = (FIRST_SCALE / ranks.world, 0, 2000)
    with patch.object(LossScale.__init__, "__defaults__", first):
        work(job, ranks, journal)
    ranks.wait()


def run_guarded(folder: Path, tokens: Path, name: str, ranks: Ranks) -> None:
    """A run in which every step a little above the usual is left out, in FOLDER/NAME-guarded."""
    with patch.object(loop, "USUAL_AT_LEAST", 3):
        run(folder / f"{name}-guarded", tokens, name, ranks, guard_sigmas=0.01, bad_steps=STEPS)


def move_on(folder: Path, old: str, new: str, tokens: Path, ranks: Ranks) -> None:
    """Go on with the engine `new` from the last checkpoint but one of `old`."""
    attempt = folder / f"{old}-to-{new}"
    if ranks.is_first:
        shutil.copytree(folder / old, attempt)
        shutil.rmtree(max((attempt / "state" / "checkpoints").glob("step_*")))
    ranks.wait()
    run(attempt, tokens, new, ranks)


def joined() -> Ranks:
    """This process in the group that its environment names."""
    processes = int(os.environ["WORLD_SIZE"])
    return join_ranks(LaunchConfig(engine="ddp", processes=processes, threads=1, device="cpu"))


def die(attempt: Path, tokens: Path, name: str, step: str, port: str) -> None:
    """Run up to that step, in a group of its own, and get kill -9."""
    os.environ["MASTER_PORT"] = port
    run(attempt, tokens, name, joined(), killed_at=int(step))


def main() -> None:
    """Entry of each rank."""
    tokens, folder = Path(sys.argv[1]), Path(sys.argv[2])
    deaths = [wish.partition("=") for wish in sys.argv[3:] if "=" in wish]
    if any(name.startswith("zero") for name, _, _ in deaths):
        importlib.import_module("deepspeed")  # once, not in every fork
    for name, _, at in deaths:
        asked = (folder / f"{name}-broken", tokens, name, *at.split(":"))
        victim = multiprocessing.get_context("fork").Process(target=die, args=asked)
        victim.start()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL, f"{name}: {victim.exitcode}"
    ranks = joined()
    for name, _, _ in deaths:
        run(folder / name, tokens, name, ranks)
        run(folder / f"{name}-broken", tokens, name, ranks)
        run_guarded(folder, tokens, name, ranks)
    for wish in sys.argv[3:]:
        name, is_killed, step = wish.partition("!")
        old, is_move, new = wish.partition("-to-")
        if is_killed:
            run(folder / name, tokens, name, ranks, killed_at=int(step))
        elif is_move:
            move_on(folder, old, new, tokens, ranks)
    ranks.leave()


if __name__ == "__main__":
    main()
