"""Torch jobs as a stage sees them: start or join, follow, stop, explain.

    stage (in the flow)  --starts-->  supervisor  --starts-->  launcher  --starts-->  ranks
         |  follows by files only         |  holds the lease, the attempt's lock, the host's lock
         v                                v
    logs/output.log progress.json    state/job.json exit.json cancel followers/ ranks/

The flow may die, be killed or be restarted at any time: the job goes on, and whoever wants the same
artifact next joins it. Only files connect the two, so that a broken follower cannot break a job.
"""

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from conf.contract import EXIT, JOB, OUTPUT, RESULT, ExitCode, ExitFile, JobFile
from conf.launch import DEEPSPEED_ENGINES, LaunchConfig
from conf.settings import Settings
from storage.artifact import Artifact
from storage.errors import BessemerError
from storage.lease import FileLease, acquire
from storage.source import SourceFile
from storage.store import Claim, Store
from tasks.command import ROOT
from tasks.explain import tail_of
from tasks.follower import CANCEL, FOLLOWERS, Follower, newest_attempt
from tasks.hosts import read_hosts
from tasks.processes import cores, cuda_devices, uses_cuda
from tasks.rank import RANKS

if TYPE_CHECKING:
    # tasks.stage follows running attempts with what stands here.
    from tasks.stage import Job

POLL_SECONDS = 0.1
COPIES = "sources"
"""In `state/`: copies of source files that are on S3."""
LOCK = "supervisor.lock"
"""In `state/`: locked as long as guardian or supervisor live."""


class JobFailed(BessemerError):
    """A torch job ended without a result; `.ended` says how. Its attempt stays, to be resumed."""

    def __init__(self, node: str, ended: ExitFile, output: Path) -> None:
        self.ended = ended
        tail = "\n".join(f"    {line}" for line in ended.tail[-15:])
        super().__init__(
            f"{node}: {ended.reason} (exit code {ended.code}, after {ended.seconds:.0f} s). "
            f"The whole output is in {output}" + (f"; it ended with:\n{tail}" if tail else ".")
        )


class JobStopped(JobFailed):
    """A torch job ended before its result because it was asked to; running again goes on."""


def run_worker(
    job: "Job", module: str, settings: Settings, inputs: Mapping[str, Artifact]
) -> dict[str, Any]:
    """Run `python -m module JOBFILE` as the attempt's torch job and return its result.json.

    A job of this attempt that is already running (its flow died) is joined; one that has already
    ended well is not run again. `settings.launch` says where and how. Only torch stages call this.

    Raises ValueError when the job cannot be started as asked, JobFailed when it ended badly,
    JobStopped when it was stopped (deadline, nobody followed, a request).
    """
    launch = cast("LaunchConfig", cast("Any", settings).launch)
    preflight(launch, module, inputs)
    wanted = _job_file(job, settings, launch, inputs)
    for folder in (job.files, job.logs, job.state):
        folder.mkdir(parents=True, exist_ok=True)
    while (lock := acquire(job.state / LOCK)) is None:
        _follow(job, lambda: _is_free(job.state / LOCK))
    try:
        if (result := _earlier_result(job, wanted)) is not None:
            job.log.info("the job had already ended well; its result is taken over")
            return result
        supervisor = _start(job, module, wanted, lock)
    # Interrupted between the start and the following: nobody else would ask the job to stop.
    except BaseException:
        (job.state / CANCEL).touch()
        raise
    finally:
        lock.release()
    # A killed guardian leaves the supervisor to stop the job: the lock says when both are gone.
    _follow(job, lambda: supervisor.poll() is not None and _is_free(job.state / LOCK))
    return _result(job)


def preflight(launch: LaunchConfig, module: str, inputs: Mapping[str, Artifact]) -> None:
    """Refuse what cannot work before a process is started. Raises ValueError."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"there is no module {module} to run; check the name of the worker")
    check_host(launch)
    for name, artifact in inputs.items():
        if not artifact.files.is_dir():
            raise ValueError(f"input {name}: {artifact.files} is missing; build it first")


def check_host(launch: LaunchConfig) -> None:
    """Raises ValueError, with the mend, where this host has not what a launch asks for."""
    if launch.engine == "plain" and launch.ranks > 1:
        raise ValueError(
            f"launch.engine=plain with launch.processes={launch.processes} on launch.nodes="
            f"{launch.nodes}: plain is one process; set launch.engine=ddp, or launch.processes=1"
        )
    if launch.engine in DEEPSPEED_ENGINES and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"launch.engine={launch.engine} needs deepspeed, which is not installed here; install it "
            "or set launch.engine=fsdp"
        )
    if launch.launcher == "slurm":
        if shutil.which("sbatch") is None:
            raise ValueError(
                "launch.launcher=slurm needs sbatch, which is not on the PATH; run on a login node of the "
                "cluster, or set launch.launcher=torchrun"
            )
        return  # what the nodes have is for Slurm to say
    is_cuda = uses_cuda(launch.device)
    if is_cuda and len(cuda_devices()) < launch.processes:
        raise ValueError(
            f"launch.device={launch.device} with launch.processes={launch.processes}, but this host offers "
            f"{len(cuda_devices())} CUDA devices; set launch.device=cpu or fewer processes"
        )
    if launch.hostfile:
        read_hosts(launch)
    if launch.adamw == "deepspeed":
        _check_compilers(launch, is_cuda=is_cuda)
    if launch.threads and launch.processes * launch.threads > cores():
        raise ValueError(
            f"{launch.processes} processes x {launch.threads} threads are more than the "
            f"{cores()} cores of this host; set launch.threads=0 to divide them"
        )


def _check_compilers(launch: LaunchConfig, *, is_cuda: bool) -> None:
    """DeepSpeed's AdamW is made where it runs, at its first start."""
    wanted = {os.environ.get("CXX", "c++"): "a C++ compiler"}
    if is_cuda and launch.offload == "none":
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        wanted[shutil.which("nvcc") or f"{home}/bin/nvcc"] = "the CUDA toolkit"
    for program, name in wanted.items():
        if shutil.which(program) is None:
            raise ValueError(
                f"launch.adamw=deepspeed needs {name} to make its kernel, and {program} was not found; "
                f"install it, or set launch.adamw=torch"
            )


def _job_file(
    job: "Job", settings: Settings, launch: LaunchConfig, inputs: Mapping[str, Artifact]
) -> JobFile:
    return JobFile(
        stage=job.stage,
        node=job.node,
        settings=settings.model_dump(mode="json"),
        inputs={name: str(artifact.files.absolute()) for name, artifact in inputs.items()},
        sources={
            name: [_local_place(file, job.state / COPIES / name) for file in source.files]
            for name, source in job.sources.items()
        },
        files=job.files.absolute(),
        logs=job.logs.absolute(),
        state=job.state.absolute(),
        launch=launch,
    )


def _local_place(file: SourceFile, copies: Path) -> str:
    """Where a worker finds a file; one on S3 in a copy that lasts as long as the attempt."""
    if file.remote is None:
        return str(file.path.absolute())
    copy = copies / str(file.spec_index) / file.name
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with file.fetched() as path:
            partial = Path(shutil.copyfile(path, f"{copy}.partial"))
        partial.replace(copy)
    return str(copy.absolute())


def _earlier_result(job: "Job", wanted: JobFile) -> dict[str, Any] | None:
    """The result of an earlier run of the same job in this attempt, where it ended well."""
    ended = _read_exit(job.state)
    if ended is None or ended.code != ExitCode.DONE or not (job.logs / RESULT).exists():
        return None
    try:
        earlier = JobFile.model_validate_json((job.state / JOB).read_text("utf-8"))
    except (FileNotFoundError, ValidationError):
        return None
    # How it was launched does not change what was computed.
    relaunched = {
        "launch": wanted.launch,
        "settings": {**earlier.settings, "launch": wanted.settings["launch"]},
    }
    is_same = earlier.model_copy(update=relaunched) == wanted
    return json.loads((job.logs / RESULT).read_text("utf-8")) if is_same else None


def _start(job: "Job", module: str, wanted: JobFile, lock: FileLease) -> "subprocess.Popen[bytes]":
    """Start the supervisor of a fresh run; lease and lock pass into its hands."""
    for stale in (job.state / EXIT, job.state / CANCEL, job.logs / RESULT):
        stale.unlink(missing_ok=True)
    for folder in (job.state / RANKS, job.state / FOLLOWERS):
        folder.mkdir(exist_ok=True)
        for stale in folder.iterdir():
            stale.unlink()
    job_path = job.state / JOB
    partial = job_path.with_suffix(".partial")
    partial.write_text(wanted.model_dump_json(indent=1), "utf-8")
    partial.replace(job_path)
    kept = [fd for fd in (lock.fd, job.lease_fd) if fd is not None]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (job.logs / OUTPUT).open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tasks.supervisor", module, str(job_path.absolute())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            start_new_session=True,
            pass_fds=kept,
        )


def _result(job: "Job") -> dict[str, Any]:
    ended = _read_exit(job.state) or ExitFile(
        code=ExitCode.FAILED,
        reason="the job vanished without a word: guardian and supervisor were both killed",
        tail=tail_of(job.logs / OUTPUT),
        seconds=0.0,
    )
    job.waited_seconds += ended.waited_seconds
    match ended.code:
        case ExitCode.DONE:
            return json.loads((job.logs / RESULT).read_text("utf-8"))
        case ExitCode.REQUEUE:
            raise JobStopped(job.node, ended, job.logs / OUTPUT)
        case _:
            raise JobFailed(job.node, ended, job.logs / OUTPUT)


def _read_exit(state: Path) -> ExitFile | None:
    try:
        return ExitFile.model_validate_json((state / EXIT).read_text("utf-8"))
    except FileNotFoundError:
        return None


def _is_free(path: Path) -> bool:
    lease = acquire(path)
    if lease is None:
        return False
    lease.release()
    return True


def _follow(job: "Job", is_over: Callable[[], bool]) -> None:
    """Relay output and progress until the job is over; when interrupted, stop the job first."""
    with Follower(job.path, job.log.info, job.report_progress) as follower:
        try:
            while not is_over():
                follower.look()
                time.sleep(POLL_SECONDS)
        # Also a cancelled flow or Ctrl-C: the job must get its checkpoint before we go.
        except BaseException:
            _leave(job, follower, is_over)
            raise
        follower.look()


def _leave(job: "Job", follower: Follower, is_over: Callable[[], bool]) -> None:
    """Leave a job: ask it to end, and wait until it has, unless somebody else follows it."""
    if is_over() or not follower.leave():
        return
    job.log.info("stopping the job; it saves a checkpoint first")
    while not is_over():
        time.sleep(POLL_SECONDS)


def follow_elsewhere(
    store: Store,
    fingerprint: str,
    *,
    node: str,
    take: Callable[[], Claim | None],
    report_progress: Callable[[float, float, str], None],
) -> Claim:
    """Follow the process that holds an artifact's lease until `take` gets it.

    Output and progress of a torch job that outlived its flow, or that another run started, appear
    here as if it were ours, and it counts as followed. Who is interrupted here and was the last to
    follow has asked the job to end, and waits until it has.
    """
    log = logging.getLogger(f"bessemer.{node}")
    log.info("already being built by another process; following it")
    with contextlib.ExitStack() as stack:
        follower: Follower | None = None
        try:
            while (claim := take()) is None:
                if follower is None and (attempt := newest_attempt(store.root, fingerprint)):
                    follower = stack.enter_context(Follower(attempt, log.info, report_progress))
                if follower is not None:
                    follower.look()
                time.sleep(POLL_SECONDS * 2)
        except BaseException:
            if follower is not None and follower.leave():
                log.info("stopping the job; it saves a checkpoint first")
                while (claim := take()) is None:
                    time.sleep(POLL_SECONDS)
                claim.release()
            raise
    return claim
