"""The frame of every worker: read the job, join the ranks, work, say how it ended."""

import ctypes
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conf.contract import JobFile
from conf.settings import Settings
from model.journal import Journal
from model.loop import Ended
from model.ranks import Ranks, join_ranks

KEPT_BYTES = 1 << 30
"""Freed memory that a process keeps; glibc's own bound is 128 kB to 64 MB."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""
Work = Callable[[JobFile, Ranks, Journal], dict[str, Any]]
"""Does the job on every rank; the first rank's figures become `result.json`."""


def run(work: Work) -> None:
    """Entry of `python -m model.STAGE JOBFILE`. Exits with the code that says how it ended."""
    keep_freed_memory()
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


def keep_freed_memory() -> None:
    """Have glibc give this process's tensors out of memory that earlier ones have freed.

    It returns what large ones leave to the kernel at once, and the next step gets it again page by page,
    zeroed: a fifth of a step's time on a CPU.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def identity_of_job(job: JobFile, settings: Settings) -> dict[str, Any]:
    """What a checkpoint belongs to: the settings that are identity, and the content of the inputs."""
    return {
        "stage": job.stage,
        "settings": settings.identity(),
        "inputs": {name: _content_of(Path(files)) for name, files in job.inputs.items()},
    }


def _content_of(files: Path) -> str:
    """The digest of the artifact that owns the folder; for a bare folder, its names and sizes."""
    record = files.parent / "record.json"
    if record.is_file():
        return str(json.loads(record.read_text("utf-8"))["digest"])
    sizes = [
        f"{path.relative_to(files)}:{path.stat().st_size}"
        for path in sorted(files.rglob("*"))
        if path.is_file()
    ]
    return hashlib.sha256("\n".join(sizes).encode("utf-8")).hexdigest()
