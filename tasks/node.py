"""One node's part of a torch job on several: `python -m tasks.node MODULE JOBFILE [NUMBER]`.

Slurm starts it on each of its nodes and tells the number; on every node but the first it is started over
ssh where there is a host file, else by hand. It ends with the code of its ranks, and stops them, checkpoint first, when the job is to end.
"""

import os
import signal
import sys
from pathlib import Path

from conf.contract import JobFile
from tasks.command import RENDEZVOUS
from tasks.processes import die_with_parent, kill_descendants
from tasks.supervisor import Supervisor, guard


def main() -> None:
    """Run this node's ranks of the job to their end."""
    module, job_file = sys.argv[1:3]
    number = int(sys.argv[3] if len(sys.argv) > 3 else os.environ["SLURM_NODEID"])
    job = JobFile.model_validate_json(Path(job_file).read_text("utf-8"))
    if place := os.environ.get(RENDEZVOUS):
        launch = job.launch.model_copy(update={"rendezvous": place})
        job = job.model_copy(update={"launch": launch})

    def supervise() -> int:
        die_with_parent(signal.SIGTERM)
        ended = Supervisor(job, module, node=number).run()
        kill_descendants()
        sys.stdout.write(f"[node {number}] {ended.reason}\n")
        sys.stdout.flush()
        return ended.code

    def on_lost(what: str) -> None:
        sys.stdout.write(f"[node {number}] its supervisor {what}\n")

    sys.exit(abs(guard(supervise, on_lost)))


if __name__ == "__main__":
    main()
