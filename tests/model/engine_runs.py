"""Every engine over the same small pretraining in one pair of ranks: `python -m tests.model.engine_runs
TOKENS FOLDER ENGINE=STEP ...`.

For each engine: an unbroken run in FOLDER/ENGINE; a run in FOLDER/ENGINE-broken that dies while it
writes down that step, and is run again by a new engine. Starting processes costs more than the runs.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from conf.contract import JobFile
from conf.launch import LaunchConfig
from conf.pretrain import PhaseConfig, PretrainConfig
from conf.shape import ShapeConfig
from model.journal import Journal
from model.pretrain import work
from model.ranks import Ranks, join_ranks
from tests.model.small_jobs import write_job

# Everything that could break a resume is on: dropout, a mixture, two phases, accumulation, held-out looks.
SETTINGS = PretrainConfig(
    shape=ShapeConfig(dim=32, layers=2, heads=4, kv_heads=2, context=32, dropout=0.1),
    tokens=20 * 256,
    batch_tokens=256,
    learning_rate=3e-3,
    phases=(
        PhaseConfig(tokens=0.6, mix={"en": 0.7, "zh": 0.3}),
        PhaseConfig(tokens=0.4, mix={"zh": 1.0}),
    ),
    held_tokens=4096,
    evaluate_every_steps=10,
    checkpoint_every_steps=4,
)


class Killed(BaseException):
    """The journal's pen breaks: nothing behind it runs."""


class BreakingJournal(Journal):
    """Dies when it is to write down a step."""

    def __init__(self, logs: Path, *, is_writer: bool, last: int) -> None:
        super().__init__(logs, is_writer=is_writer)
        self._last = last

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        if step == self._last:
            raise Killed
        super().write(step, figures)


def run(
    attempt: Path, tokens: Path, engine: str, ranks: Ranks, *, last: int = 0, **settings: object
) -> None:
    """The whole job, or up to the step at which it dies."""
    # Buckets of DeepSpeed that this small model does not fit into at once.
    buckets = {"reduce_bucket_size": 20_000, "stage3_prefetch_bucket_size": 10_000}
    launch = LaunchConfig.model_validate(
        {
            "engine": engine,
            "processes": ranks.world,
            "threads": 1,
            "micro_batch": 3,
            "deepspeed": {"zero_optimization": buckets} if engine.startswith("zero") else {},
        }
    )
    chosen = SETTINGS.model_copy(update={"launch": launch, **settings})
    if ranks.is_first:
        write_job(attempt, "pretrain", chosen, {"tokens": tokens}, launch)
    ranks.wait()
    job = JobFile.model_validate_json((attempt / "state" / "job.json").read_text("utf-8"))
    journal = BreakingJournal(attempt / "logs", is_writer=ranks.is_first, last=last or -1)
    try:
        work(job, ranks, journal)
    except Killed:
        assert last, "only a run that is to be killed dies"
    ranks.wait()


def main() -> None:
    """Entry of each rank."""
    tokens, folder = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = join_ranks(LaunchConfig(engine="ddp", processes=2, threads=1, device="cpu"))
    for wish in sys.argv[3:]:
        engine, _, last = wish.partition("=")
        run(folder / engine, tokens, engine, ranks)
        broken = folder / f"{engine}-broken"
        run(broken, tokens, engine, ranks, last=int(last))
        run(broken, tokens, engine, ranks)
    ranks.leave()


if __name__ == "__main__":
    main()
