"""Slurm on one machine, for tests: sbatch, squeue, scancel, srun and scontrol that really queue, run, kill
and requeue. `python slurm_stand_in.py COMMAND ARGUMENTS...`; its books are in $SLURM_STAND_IN."""

import contextlib
import fcntl
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "scancel", "srun", "scontrol")
QUEUED_SECONDS = 0.3


def install(folder: Path) -> None:
    """Put the commands into a folder, for the PATH."""
    folder.mkdir(parents=True)
    for name in COMMANDS:
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {name} "$@"\n')
        path.chmod(0o755)


def books(number: str, kind: str) -> Path:
    return Path(os.environ["SLURM_STAND_IN"]) / f"{number}.{kind}"


@contextlib.contextmanager
def locked(what: str) -> Iterator[None]:
    with books(what, "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write(path: Path, text: str) -> None:
    """Whole or not at all, for those who read meanwhile."""
    draft = path.with_suffix(f"{path.suffix}.draft")
    draft.write_text(text)
    draft.replace(path)


def draw() -> int:
    """A number for a job, whose port nobody has: other tests have a Slurm of their own on this machine."""
    while True:
        number = random.randrange(1, 20_000)
        with contextlib.suppress(OSError), socket.socket() as port:
            port.bind(("127.0.0.1", 20_000 + number))
            return number


def sbatch(*arguments: str) -> int:
    path = Path(arguments[-1])
    if "--partition=none" in path.read_text():
        sys.stderr.write("sbatch: error: invalid partition specified: none\n")
        return 1
    with locked("books"):
        number = str(draw())
        while books(number, "script").exists():
            number = str(draw())
        write(books(number, "status"), "PENDING")
        # The controller takes what has a script.
        write(books(number, "script"), path.read_text())
    sys.stdout.write(f"{number}\n")
    return 0


def control() -> int:
    """The controller: no descendant of those who submit."""
    taken: set[Path] = set()
    while True:
        for path in set(Path(os.environ["SLURM_STAND_IN"]).glob("*.script")) - taken:
            taken.add(path)
            subprocess.Popen([sys.executable, "-S", __file__, "run", path.stem, str(path)])
        time.sleep(0.05)


def run(number: str, path: str) -> int:
    """What the controller does with one job: wait for the nodes, run, queue again when asked."""
    text = Path(path).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.M))
    variables = os.environ | {
        "SLURM_JOB_ID": number,
        "SLURM_JOB_NODELIST": f"local[0-{options['nodes']}]",
        "SLURM_NNODES": options["nodes"],
    }
    while books(number, "status").exists():
        time.sleep(QUEUED_SECONDS)
        with locked("nodes"):
            with locked("books"), Path(options["output"]).open("ab") as output:
                if not books(number, "status").exists():
                    return 0
                write(books(number, "status"), "RUNNING")
                batch = subprocess.Popen(
                    ["/bin/bash", path],
                    env=variables,
                    stdout=output,
                    stderr=output,
                    process_group=0,
                )
                write(books(number, "group"), str(batch.pid))
            batch.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(batch.pid, signal.SIGKILL)
        with locked("books"):
            if not books(number, "status").exists():
                return 0
            if books(number, "requeue").exists():
                books(number, "requeue").unlink()
                write(books(number, "status"), "PENDING")
            else:
                books(number, "status").rename(books(number, "ended"))
    return 0


def squeue(*arguments: str) -> int:
    path = books(arguments[arguments.index("--jobs") + 1], "status")
    if not path.exists():
        sys.stderr.write("slurm_load_jobs error: Invalid job id specified\n")
        return 1
    sys.stdout.write(path.read_text() + "\n")
    return 0


def scancel(*arguments: str) -> int:
    """With --signal the tasks alone are signalled, as at a time limit; else the job is ended."""
    number = arguments[-1]
    if "--signal=TERM" in arguments:
        for pid in books(number, "tasks").read_text().split():
            os.kill(int(pid), signal.SIGTERM)
        return 0
    with locked("books"), contextlib.suppress(FileNotFoundError, ProcessLookupError):
        books(number, "status").rename(books(number, "ended"))
        os.killpg(int(books(number, "group").read_text()), signal.SIGTERM)
    return 0


def srun(*command: str) -> int:
    """One task a node; a home for each, since the host's lock is one per home."""
    tasks = [
        subprocess.Popen(
            command,
            env=os.environ
            | {"SLURM_NODEID": str(node), "BESSEMER_HOME": f"{os.environ['BESSEMER_HOME']}/{node}"},
        )
        for node in range(int(os.environ["SLURM_NNODES"]))
    ]
    write(books(os.environ["SLURM_JOB_ID"], "tasks"), " ".join(str(task.pid) for task in tasks))
    return max(task.wait() for task in tasks)


def scontrol(*arguments: str) -> int:
    if arguments[0] == "requeue":
        books(arguments[1], "requeue").touch()
        return 0
    sys.stdout.write("127.0.0.1\n" * int(os.environ["SLURM_NNODES"]))
    return 0


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))
