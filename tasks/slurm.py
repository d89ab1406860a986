"""A torch job under Slurm: `python -m tasks.slurm MODULE JOBFILE` submits it and waits until it has left
the queue.

The batch job starts `tasks.node` on each of its nodes. Ranks that save and leave (a time limit, a higher
priority) end it with the code that says so, and it puts itself back into the queue, whether anybody
follows or not. Who is started anew while it is there waits for it instead of submitting a second one.
"""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from conf.contract import OUTPUT, PROGRESS, ExitCode, JobFile, Progress
from tasks.command import RENDEZVOUS, ROOT
from tasks.follower import CANCEL

POLL_SECONDS = 1.0
SCRIPT = "slurm.sh"
NUMBER = "slurm.id"
"""In `state/`: the number of the batch job."""


def script(job: JobFile, module: str) -> str:
    """The batch script of a job."""
    launch = job.launch
    options = {
        "job-name": f"bessemer-{job.node}",
        **launch.slurm,
        "nodes": launch.nodes,
        "ntasks-per-node": 1,
        "output": job.logs / OUTPUT,
        "open-mode": "append",
        # Steps hear of the time limit as long before it as they may take to save.
        "signal": f"TERM@{max(60, round(2 * launch.grace_seconds))}",
    }
    lines = ["#!/bin/bash", "#SBATCH --requeue"]
    lines += [f"#SBATCH --{name}={value}" for name, value in options.items()]
    path, job_file = shlex.quote(str(ROOT)), shlex.quote(str(job.state / "job.json"))
    return "\n".join(
        [
            *lines,
            f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            f"export {RENDEZVOUS}=$first:$((20000 + SLURM_JOB_ID % 20000))",
            f"srun {shlex.quote(sys.executable)} -u -m tasks.node {module} {job_file}",
            "code=$?",
            f"if [ $code -eq {int(ExitCode.REQUEUE)} ] && "
            f"[ ! -e {shlex.quote(str(job.state / CANCEL))} ]; then",
            '  exec scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            "exit $code",
            "",
        ]
    )


class BatchJob:
    """A job in Slurm's queue."""

    def __init__(self, job: JobFile, number: str) -> None:
        self.job, self.number = job, number
        self._asked: float | None = None

    @staticmethod
    def of(job: JobFile, module: str) -> "BatchJob":
        """The one that this attempt has in the queue already, else a new one.

        Raises RuntimeError with what sbatch says when it refuses.
        """
        note = job.state / NUMBER
        if note.exists():
            earlier = BatchJob(job, note.read_text("utf-8"))
            if earlier.status():
                return earlier
        path = job.state / SCRIPT
        path.write_text(script(job, module), "utf-8")
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"sbatch refuses {path}: {done.stderr.strip()}; see launch.slurm")
        # With several clusters: number;cluster.
        number = done.stdout.strip().partition(";")[0]
        note.write_text(number, "utf-8")
        return BatchJob(job, number)

    def status(self) -> str:
        """The queue's word for it, empty when it is no longer there."""
        done = subprocess.run(
            ["squeue", "--noheader", "--format=%T", "--jobs", self.number],
            capture_output=True,
            text=True,
        )
        if done.returncode and "Invalid job id" not in done.stderr:
            # A controller that is restarting knows nothing for a while; the job goes on.
            return "UNKNOWN"
        return done.stdout.strip()

    def ask_to_end(self, number: int, frame: FrameType | None) -> None:
        """Have the nodes stop their ranks, checkpoint first."""
        self._asked = self._asked or time.monotonic()
        (self.job.state / CANCEL).touch()

    def wait(self) -> None:
        """Until it has left the queue; a job that was asked to end is taken out of it in time."""
        while status := self.status():
            grace = self.job.launch.grace_seconds if status != "PENDING" else 0.0
            if self._asked is not None and time.monotonic() - self._asked >= grace:
                subprocess.run(["scancel", self.number], check=False)
            if status != "RUNNING":
                self._tell(f"{status.lower()} in Slurm's queue")
            time.sleep(POLL_SECONDS)

    def _tell(self, where: str) -> None:
        progress = Progress(step=0, total=0, unit=where, updated=time.time())
        draft = self.job.logs / f".{PROGRESS}.slurm"
        draft.write_text(progress.model_dump_json(), "utf-8")
        draft.replace(self.job.logs / PROGRESS)


def main() -> None:
    """Submit the job of the job file, or find it, and wait for its end."""
    module, job_file = sys.argv[1:3]
    batch = BatchJob.of(JobFile.model_validate_json(Path(job_file).read_text("utf-8")), module)
    signal.signal(signal.SIGTERM, batch.ask_to_end)
    sys.stdout.write(f"[slurm] batch job {batch.number}\n")
    sys.stdout.flush()
    batch.wait()


if __name__ == "__main__":
    main()
