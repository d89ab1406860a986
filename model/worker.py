"""The frame of every worker: read the job, join the ranks, work, say how it ended."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conf.contract import JobFile
from model.journal import Journal
from model.loop import Ended
from model.ranks import Ranks, join_ranks

Work = Callable[[JobFile, Ranks, Journal], dict[str, Any]]
"""Does the job on every rank; the first rank's figures become `result.json`."""


def run(work: Work) -> None:
    """Entry of `python -m model.STAGE JOBFILE`. Exits with the code that says how it ended."""
    job = JobFile.model_validate_json(Path(sys.argv[1]).read_text("utf-8"))
    ranks = join_ranks(job.launch)
    ranks.stop_on_sigterm()
    journal = Journal(job.logs, is_writer=ranks.is_first)
    try:
        figures = work(job, ranks, journal)
    except Ended as end:
        sys.stderr.write(f"{end}\n")
        sys.stderr.flush()
        ranks.leave()
        sys.exit(int(end.code))
    ranks.wait()
    journal.result(figures)
    ranks.leave()
