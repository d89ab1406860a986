"""Pretraining that asks for its own end at step 4 and, run again, has its last rank killed at step 8."""

import os
import signal
import time
from typing import Any

from conf.contract import JobFile
from model.journal import Journal
from model.pretrain import work
from model.ranks import Ranks
from model.worker import run
from tasks.follower import CANCEL
from tests.model.engine_runs import MarkedJournal


def marked_work(job: JobFile, ranks: Ranks, _journal: Journal) -> dict[str, Any]:
    """The job, up to what has not been done yet."""
    asked, killed = job.state / "asked", job.state / "killed"

    def ask() -> None:
        if ranks.is_first:
            asked.touch()
            (job.state / CANCEL).touch()
        while not ranks.is_stopping:
            time.sleep(0.01)

    def kill() -> None:
        if ranks.place == ranks.processes - 1:
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    marked, act = (4, ask) if not asked.exists() else (-1 if killed.exists() else 8, kill)
    journal = MarkedJournal(job.logs, is_writer=ranks.is_first, marked=marked, act=act)
    return work(job, ranks, journal)


if __name__ == "__main__":
    run(marked_work)
