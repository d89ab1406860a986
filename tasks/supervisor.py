"""The process that owns a torch job: `python -m tasks.supervisor JOBFILE`.

It runs in a session of its own, so that the job survives the death of the flow that started it, and
holds (by inherited descriptors) the lease on the artifact and the lock of the attempt. Two
processes, so that no `kill -9` of one of them leaves ranks behind:

    guardian      parent; adopts every orphan below it; when the supervisor is gone, kills what is
                  left of the job, and only then lets go of lease and lock by ending
    supervisor    child; takes the host's lock, starts the ranks, watches them, writes exit.json

When the guardian is killed, the kernel sends the supervisor SIGTERM and it stops the job in order.
It ends the job when asked (SIGTERM, or the file `state/cancel`), past the deadline, when progress
and output stand still, and when nobody has followed for `orphan_seconds`: first SIGTERM to every
rank, which checkpoints, then after `grace_seconds` SIGKILL to the whole tree.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from conf.contract import EXIT, JOB, OUTPUT, PROGRESS, RESULT, ExitCode, ExitFile, JobFile, Progress
from tasks.command import RENDEZVOUS, ROOT, Placement, command, environment, free_port
from tasks.explain import RankNote, explain, read_notes, tail_of
from tasks.follower import CANCEL, FOLLOWERS
from tasks.hosts import over_ssh, read_hosts
from tasks.processes import (
    adopt_orphans,
    descendants,
    die_with_parent,
    is_alive,
    kill_descendants,
    out_of_memory_kills,
    send,
    take_cpu,
    take_cuda,
    uses_cuda,
)
from tasks.rank import note_path

POLL_SECONDS = 0.1
SLURM_SECONDS = 15.0
"""How long Slurm may take, beside the ranks' own time, to end a job."""
LINGER_SECONDS = 10.0
"""How long a launcher may take to end once all its ranks have written their end."""


@dataclass(frozen=True)
class Ending:
    """Why a running job has to end."""

    code: ExitCode
    reason: str


class Stillness:
    """How long files have stayed as they are; their times are only compared with one another, for the
    clock may be set while a job runs."""

    def __init__(self) -> None:
        self._newest = 0.0
        self._since = time.monotonic()

    def seconds(self, paths: Iterable[Path]) -> float:
        """Time since one of the files was last seen to be written, or since the begin."""
        if (newest := _newest(paths)) != self._newest:
            self._newest, self._since = newest, time.monotonic()
        return time.monotonic() - self._since


@dataclass
class Supervisor:
    """One run of one job, or of its part on one of its nodes."""

    job: JobFile
    module: str
    node: int | None = None
    """Number of the node; none for the supervisor of the whole job, which stands on the first, or beside
    all of them where Slurm starts them."""
    started: float = field(default_factory=time.monotonic)
    is_asked: bool = False
    _unfollowed: Stillness = field(default_factory=Stillness)
    _standing: Stillness = field(default_factory=Stillness)
    _others: "dict[str, subprocess.Popen[bytes]]" = field(
        default_factory=dict[str, "subprocess.Popen[bytes]"]
    )
    """Host -> what stands here for its node of the job."""

    def run(self) -> ExitFile:
        """Wait for the host, run the ranks to their end, and say how it went."""
        launch = self.job.launch
        if launch.hostfile and not launch.rendezvous:
            place = f"{read_hosts(launch)[0]}:{free_port()}"
            launch = launch.model_copy(update={"rendezvous": place})
            self.job = self.job.model_copy(update={"launch": launch})
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask)
        placement = self._wait_for_host()
        waited = time.monotonic() - self.started
        if isinstance(placement, Ending):
            ended = self._exit(placement, [])
        else:
            ended = self._run_ranks(placement)
        return ended.model_copy(update={"waited_seconds": round(waited, 3)})

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True

    def _wait_for_host(self) -> Placement | Ending:
        is_told = False
        while (placement := self._place()) is None:
            if ending := self._unwanted():
                return ending
            if not is_told:
                _say("waiting: another training job has this host's processor")
                self._write_waiting()
                is_told = True
            time.sleep(POLL_SECONDS)
        return placement

    def _place(self) -> Placement | None:
        """Where the ranks run, its locks taken; None while the host is taken."""
        launch = self.job.launch
        if self._is_submitted:
            return Placement.elsewhere(launch)
        if uses_cuda(launch.device):
            taken = take_cuda(launch.processes)
            return None if taken is None else Placement.on_cuda(launch, taken)
        lock = take_cpu()
        return None if lock is None else Placement.on_cpu(launch, lock)

    @property
    def _is_submitted(self) -> bool:
        """Whether the ranks are started by Slurm, somewhere else."""
        return self.node is None and self.job.launch.launcher == "slurm"

    def _write_waiting(self) -> None:
        progress = Progress(step=0, total=0, unit="waiting for another job", updated=time.time())
        _replace(self.job.logs / PROGRESS, progress.model_dump_json())

    def _run_ranks(self, placement: Placement) -> ExitFile:
        begin = time.monotonic()
        self._standing = Stillness()
        kills = out_of_memory_kills()
        launch, job_file = self.job.launch, self.job.state / JOB
        if self._is_submitted:
            arguments = [sys.executable, "-u", "-m", "tasks.slurm", self.module, str(job_file)]
        else:
            arguments = command(launch, self.module, job_file, placement, self.node or 0)
            for rank in self._own_ranks:
                note_path(self.job.state, rank).unlink(missing_ok=True)
        if self.node is None and not self._is_submitted:
            self._start_others()
        _say(
            f"{launch.processes} x {placement.threads} threads on {placement.device}, "
            f"engine {launch.engine}: {self.module}"
        )
        # In a process group of its own, so that a signal meant for the ranks never reaches us.
        launcher = subprocess.Popen(
            arguments,
            env=environment(self.job.launch, placement),
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=lambda: die_with_parent(signal.SIGKILL),
        )
        ending = self._watch(launcher, begin)
        tail = [] if ending is None else self._stop(launcher, ending)
        is_part = self.node is not None
        ended = explain(
            self._notes(),
            ranks=launch.processes if is_part else launch.ranks,
            launcher_code=launcher.poll(),
            output=self.job.logs / OUTPUT,
            has_result=is_part or (self.job.logs / RESULT).exists(),
            is_short_of_memory=out_of_memory_kills() > kills,
            seconds=time.monotonic() - begin,
        )
        # A job may come to its proper end while it is being stopped.
        if ending is None or ended.code == ExitCode.DONE:
            return ended
        return self._exit(ending, tail)

    def _start_others(self) -> None:
        """Have the other nodes start their ranks: over ssh, or by whoever reads the log."""
        launch, job_file = self.job.launch, str(self.job.state / JOB)
        hosts = read_hosts(launch) if launch.hostfile else [""] * launch.nodes
        for number, host in enumerate(hosts[1:], 1):
            part = ["-m", "tasks.node", self.module, job_file, str(number)]
            if not host:
                _say(f"on node {number}: python {' '.join(part)}")
                continue
            _say(f"starting node {number} on {host}")
            variables = {
                "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
                "PYTHONSAFEPATH": "1",
                RENDEZVOUS: launch.rendezvous,
            }
            self._others[host] = subprocess.Popen(
                over_ssh(host, variables, [sys.executable, "-u", *part]),
                stdin=subprocess.DEVNULL,
                process_group=0,
            )

    @property
    def _own_ranks(self) -> range:
        """The ranks of this node."""
        first = (self.node or 0) * self.job.launch.processes
        return range(first, first + self.job.launch.processes)

    def _notes(self) -> list[RankNote]:
        """What the ranks wrote of themselves: of a node its own, else all; those of other nodes may end
        a little later."""
        end = time.monotonic() + LINGER_SECONDS
        while True:
            notes = read_notes(self.job.state)
            if self.node is not None:
                return [note for note in notes if note.rank in self._own_ranks]
            others = [note for note in notes if note.rank not in self._own_ranks]
            if all(note.code is not None for note in others) or time.monotonic() > end:
                return notes
            time.sleep(POLL_SECONDS)

    def _watch(self, launcher: "subprocess.Popen[bytes]", begin: float) -> Ending | None:
        """Wait for the launcher's own end (None) or for a reason to stop it."""
        lingers_since: float | None = None
        lost_since: float | None = None
        while launcher.poll() is None:
            if ending := self._unwanted() or self._overdue(begin):
                return ending
            # Ranks that lose those of another node say so themselves, where they notice.
            lost = [host for host, other in self._others.items() if other.poll()]
            lost_since = (lost_since or time.monotonic()) if lost else None
            if lost_since and time.monotonic() - lost_since > LINGER_SECONDS:
                return Ending(ExitCode.FAILED, f"the job's part on {lost[0]} has failed")
            notes = read_notes(self.job.state)
            # What Slurm starts may be queued again when its ranks have ended.
            has_all = len(notes) == self.job.launch.ranks and not self._is_submitted
            if has_all and all(n.code is not None for n in notes):
                lingers_since = lingers_since or time.monotonic()
                if time.monotonic() - lingers_since > LINGER_SECONDS:
                    _say("all ranks have ended, their launcher has not; killing it")
                    return None
            time.sleep(POLL_SECONDS)
        return None

    def _unwanted(self) -> Ending | None:
        if self.is_asked or (self.job.state / CANCEL).exists():
            return Ending(ExitCode.REQUEUE, "stopped on request")
        if self.node and self.job.launch.hostfile and (self.job.state / EXIT).exists():
            return Ending(ExitCode.FAILED, "the job has ended on the first node")
        limit = self.job.launch.orphan_seconds
        alone = self._unfollowed.seconds((self.job.state / FOLLOWERS).glob("*"))
        if limit and alone > limit:
            return Ending(ExitCode.REQUEUE, f"nobody has followed the job for {alone:.0f} s")
        return None

    def _overdue(self, begin: float) -> Ending | None:
        launch = self.job.launch
        if launch.deadline_seconds and time.monotonic() - begin > launch.deadline_seconds:
            return Ending(
                ExitCode.REQUEUE, f"the deadline of {launch.deadline_seconds:g} s has passed"
            )
        if launch.stall_seconds:
            logs = self.job.logs
            still = self._standing.seconds([logs / PROGRESS, *logs.glob("output*.log")])
            if still > launch.stall_seconds:
                return Ending(
                    ExitCode.FAILED,
                    f"progress and output stood still for {still:.0f} s "
                    f"(launch.stall_seconds={launch.stall_seconds:g}): the job hangs",
                )
        return None

    def _stop(self, launcher: "subprocess.Popen[bytes]", ending: Ending) -> list[str]:
        """SIGTERM, grace, SIGKILL. Returns the last lines of the job's own output."""
        tail = tail_of(self.job.logs / OUTPUT)
        _say(f"{ending.reason}; asking the ranks to checkpoint and end")
        below = set(descendants(os.getpid()))
        ranks = [note.pid for note in read_notes(self.job.state) if note.pid in below]
        for pid in ranks or [launcher.pid]:
            send(pid, signal.SIGTERM)
        patience = self.job.launch.grace_seconds + (SLURM_SECONDS if self._is_submitted else 0)
        end = time.monotonic() + patience
        while launcher.poll() is None and any(map(is_alive, ranks or [launcher.pid])):
            if time.monotonic() > end:
                _say(f"still running {patience:g} s later; killing them")
                break
            time.sleep(POLL_SECONDS)
        return tail

    def _exit(self, ending: Ending, tail: list[str]) -> ExitFile:
        notes = read_notes(self.job.state)
        has_saved = bool(notes) and all(note.code in (0, ExitCode.REQUEUE) for note in notes)
        saved = "a checkpoint was saved" if has_saved else "no new checkpoint was saved"
        return ExitFile(
            code=ending.code,
            reason=f"{ending.reason}; {saved}; run again to go on from the newest one",
            tail=tail,
            seconds=time.monotonic() - self.started,
        )


def guard(supervise: Callable[[], int], on_lost: Callable[[str], None]) -> int:
    """Run `supervise` in a child; when it is gone, leave nothing of it. Returns its exit code, which is
    what `supervise` returns.

    `on_lost` is called, after the sweep, with what happened to a child that did not end well.
    """
    adopt_orphans()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        adopt_orphans()
        # At once: a signal during the interpreter's own end would look like a kill.
        os._exit(supervise())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, frame: send(child, signal.Signals(received)))
    _, status = os.waitpid(child, 0)
    kill_descendants()
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        on_lost(f"was killed ({signal.Signals(-code).name})")
    elif code > 0:
        on_lost("failed by itself, see its last lines,")
    return code


def main() -> None:
    """Supervise the job of the job file named on the command line, run by the module named there."""
    module, job_file = sys.argv[1:3]
    job = JobFile.model_validate_json(Path(job_file).read_text("utf-8"))
    started = time.monotonic()

    def supervise() -> int:
        die_with_parent(signal.SIGTERM)
        ended = Supervisor(job, module).run()
        stuck = kill_descendants()
        if stuck:
            _say(f"processes {stuck} do not die: they are stuck in the kernel")
        _replace(job.state / EXIT, ended.model_dump_json(indent=1))
        return 0

    def on_lost(what: str) -> None:
        if (job.state / EXIT).exists():
            return
        ended = ExitFile(
            code=ExitCode.FAILED,
            reason=f"the supervisor {what} and its ranks were killed with it; "
            "run again to go on from the newest checkpoint",
            tail=tail_of(job.logs / OUTPUT),
            seconds=time.monotonic() - started,
        )
        _replace(job.state / EXIT, ended.model_dump_json(indent=1))

    sys.exit(guard(supervise, on_lost))


def _newest(paths: Iterable[Path]) -> float:
    """When the newest of the files was written, in seconds since the epoch; 0 without files."""
    times: list[float] = []
    for path in paths:
        # A follower that leaves removes its file between the listing and the look.
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times, default=0.0)


def _say(text: str) -> None:
    sys.stdout.write(f"[supervisor] {text}\n")
    sys.stdout.flush()


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, "utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
