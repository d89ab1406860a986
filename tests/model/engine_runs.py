"""Every engine over the same small pretraining: `python -m tests.model.engine_runs TOKENS FOLDER ROUND ...`.

A round is one job, or several at once, joined by "+"; each writes into the folder of its name below FOLDER:
NAME, of LAUNCHES, from start to end, NAME-guarded with a strict guard; NAME-killed=STEP until its processes
get kill -9 while they write down that step, NAME-stopped=STEP until one of them gets SIGTERM there, and
without =STEP on from there to the end; OLD-to-NEW ends with the engine NEW what OLD has begun.

Every job runs in processes forked from the ranks: it starts without waiting for imports, and finds nothing
that an engine before it has left in its process (ZeRO 3 changes how torch multiplies by a matrix).
"""

import importlib
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from conf.contract import ExitCode, JobFile
from conf.launch import LaunchConfig
from conf.pretrain import PhaseConfig, PretrainConfig
from conf.shape import ShapeConfig
from model import loop
from model.journal import Journal
from model.loop import Ended
from model.optimizer import LossScale
from model.pretrain import work
from model.ranks import Ranks
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


def break_off() -> None:
    """End the job without a word."""
    raise Killed


class MarkedJournal(Journal):
    """Does something first when it is to write down a certain step, on every rank."""

    def __init__(
        self, logs: Path, *, is_writer: bool, marked: int, act: Callable[[], None] = break_off
    ) -> None:
        super().__init__(logs, is_writer=is_writer)
        self._marked, self._act = marked, act

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        if step == self._marked:
            self._act()
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
    sent: tuple[int, int] = (-1, 0),
    **settings: object,
) -> None:
    """The whole job, or as far as it comes when at a step this process is sent a signal."""
    launch, ranks = placed(name, ranks)
    marked, number = sent
    if number == signal.SIGTERM:
        ranks.stop_on_sigterm()
    kind = {"optimizer": "muon"} if name.endswith("_muon") else {}
    kind |= {"precision": name[-4:]} if name.endswith(("_fp16", "_bf16")) else {}
    chosen = SETTINGS.model_copy(update={"launch": launch, **kind, **settings})
    if ranks.is_first:
        write_job(attempt, "pretrain", chosen, {"tokens": tokens}, launch)
    ranks.wait()
    job = JobFile.model_validate_json((attempt / "state" / "job.json").read_text("utf-8"))
    send = partial(os.kill, os.getpid(), number)
    journal = MarkedJournal(attempt / "logs", is_writer=ranks.is_first, marked=marked, act=send)
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


def joined(meeting: Path) -> Ranks:
    """This process in the group of those that meet in that file."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    store = dist.FileStore(str(meeting), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    return Ranks(rank, processes)


def do(job: str, tokens: Path, folder: Path, meeting: Path) -> None:
    """One job, in a process of its own that ends as a worker does."""
    ranks = joined(meeting)
    attempt, _, step = job.partition("=")
    name, _, end = attempt.partition("-")
    sent = (-1, 0)
    if step and end == "killed":
        sent = (int(step), signal.SIGKILL)
    elif step and ranks.rank == ranks.processes - 1:
        sent = (int(step), signal.SIGTERM)
    try:
        if end.startswith("to-"):
            move_on(folder, name, end.removeprefix("to-"), tokens, ranks)
        elif end == "guarded":
            run_guarded(folder, tokens, name, ranks)
        else:
            run(folder / attempt, tokens, name, ranks, sent=sent)
    except Ended as ended:
        ranks.leave()
        is_due = f"after step {step} of {STEPS}, which was saved" in str(ended)
        sys.exit(int(ended.code) if is_due else str(ended))
    ranks.leave()


def main() -> None:
    """Entry of each rank."""
    tokens, folder, rounds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    if any("zero" in jobs for jobs in rounds):
        importlib.import_module("deepspeed")  # once, not in every fork
    for number, jobs in enumerate(rounds):
        forks: dict[str, Any] = {}
        for job in jobs.split("+"):
            meeting = folder / f"{number}-{job}.meeting"
            forks[job] = multiprocessing.get_context("fork").Process(
                target=do, args=(job, tokens, folder, meeting)
            )
            forks[job].start()
        for job, fork in forks.items():
            fork.join()
            wanted = 0
            if "=" in job:
                wanted = -signal.SIGKILL if "-killed" in job else int(ExitCode.REQUEUE)
            assert fork.exitcode == wanted, f"{job}: {fork.exitcode}"


if __name__ == "__main__":
    main()
