"""What a torch job and its launcher agree on: file names, exit codes, the job file, metric names.

They never import each other; they meet in the files named here.
"""

from enum import IntEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from conf.launch import LaunchConfig

JOB = "job.json"
"""In `state/`: what to do, a JobFile."""
METRICS = "metrics.jsonl"
"""In `logs/`: one JSON object a line, `step` and named numbers; cut back to a checkpoint's offset on resume."""
SAMPLES = "samples.jsonl"
"""In `logs/`: what the model wrote after fixed prompts, an object a line: `step`, `prompt`, `text`."""
PROGRESS = "progress.json"
"""In `logs/`: replaced atomically; step, total, unit, and the latest numbers."""
RESULT = "result.json"
"""In `logs/`: the figures of a finished job, written last by rank 0."""
OUTPUT = "output.log"
"""In `logs/`: everything the job printed."""
EXIT = "exit.json"
"""In `state/`: how the job ended, an ExitFile, written by the supervisor."""


class ExitCode(IntEnum):
    """How a worker says why it ended."""

    DONE = 0
    FAILED = 1
    REQUEUE = 75
    """Asked to stop; a checkpoint was saved; start again to go on."""
    DIVERGED = 76
    """The guard stopped it: loss or gradients were not finite too often in a row."""
    GATE = 77
    """A gate with on_gate=fail was not passed."""


class JobFile(BaseModel):
    """All that a worker is told. Paths are absolute."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    node: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    """Input name -> the `files` folder of the artifact."""
    sources: dict[str, list[str]]
    """Name of a source setting -> its files, in order."""
    files: Path
    """What is written here becomes the artifact."""
    logs: Path
    state: Path
    """Checkpoints; survives a failure, removed on commit."""
    launch: LaunchConfig


class ExitFile(BaseModel):
    """How a job ended, in words for people."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: int
    reason: str
    tail: list[str]
    """Last lines of the failing rank."""
    seconds: float
    waited_seconds: float = 0.0
    """How long other jobs had the host before this one could begin; not part of `seconds`."""


class Progress(BaseModel):
    """Where a job is."""

    model_config = ConfigDict(extra="allow")

    step: int
    total: int
    unit: str = "steps"
    updated: float
    """Seconds since the epoch."""
