"""Local services: Prefect's server, kept for later commands, a worker for its page, MLflow's pages, a watcher.

All of a home's services live under `HOME/services`: for each a file with pid, start time and address,
and its output. They listen on loopback, on ports chosen free, each in a session of its own. The
Prefect server ends by itself when nothing has asked it anything for `$BESSEMER_IDLE_SECONDS` (15
minutes), unless `bessemer up` said to keep it; `bessemer down` ends all. Beside Prefect's pages it serves the
reports of the runs, at `/report/RUN`.
"""

import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from pydantic import BaseModel, ConfigDict

from flows.runs import FileLock, Home, RunRecord, ServiceError, is_alive
from flows.watches import watches
from tasks.processes import start_of

HOST = "127.0.0.1"
START_SECONDS = 180.0
"""A server that has not answered by then never will; on a busy machine it took 100 s."""
STOP_SECONDS = 15.0
POLL_SECONDS = 0.1
HEALTH_SECONDS = 5.0
KEEP_SECONDS = 1.0
"""Time between two looks of a run after its server."""
LOG_TAIL_LINES = 15
NAMES = ("watcher", "worker", "mlflow", "prefect")
"""In the order in which they are ended: the worker still has to tell the server."""
PROCESSES = {"worker": ("flows.worker", "deployments"), "watcher": ("flows.watch", "runs")}
"""Module of each, and the page of Prefect's that shows what it does."""
EXTERNAL = "BESSEMER_SERVICES"
"""Set to `external` in a deployment whose services something else starts, such as Docker Compose."""
REPORTS = "/report/"
"""Where the Prefect server has the reports of runs, each by the run's id."""
AUTH = "PREFECT_SERVER_API_AUTH_STRING"
"""Environment variable: `NAME:PASSWORD`, which the embedded server asks everyone for; set it for every
command of the home."""
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Telemetry of both off."""
_log = logging.getLogger("bessemer.run")


class Service(BaseModel):
    """A service that was started: where it answers, and which process it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    pid: int
    started: float
    url: str
    """Address of its page."""

    @property
    def is_running(self) -> bool:
        """Whether its process is there."""
        return is_alive(self.pid, self.started)


def prefect_environment(home: Home, url: str) -> dict[str, str]:
    """What a process sets before it imports Prefect, to use the server at an API address."""
    folder = home.path / "prefect"
    folder.mkdir(parents=True, exist_ok=True)
    logging_file = folder / "logging.yml"
    logging_file.write_text(json.dumps(_LOGGING), "utf-8")
    password = os.environ.get("PREFECT_API_AUTH_STRING") or os.environ.get(AUTH)
    return {
        **QUIET,
        **({"PREFECT_API_AUTH_STRING": password} if password else {}),
        "PREFECT_API_URL": url,
        "PREFECT_HOME": str(folder),
        "PREFECT_LOGGING_SETTINGS_PATH": str(logging_file),
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
    }


def ensure_prefect(home: Home) -> str:
    """API address of the server to use: the one the environment names, else the embedded one.

    Starts the embedded one where it does not answer; several commands at once start one.
    Raises ServiceError when it does not answer, with the end of its output when it does not start, and
    where something else is to start it and nobody says where it is.
    """
    if named := os.environ.get("PREFECT_API_URL"):
        if not _answers(f"{named.rstrip('/')}/health"):
            raise ServiceError(
                f"PREFECT_API_URL names {named}, which does not answer; start that server, or unset "
                "the variable to use the embedded one"
            )
        return named
    if os.environ.get(EXTERNAL) == "external":
        raise ServiceError(
            f"{EXTERNAL}=external says that something else starts the services; set PREFECT_API_URL to "
            "its server, or unset the variable to use the embedded one"
        )
    service = _answering(home)
    if service is None:
        with FileLock(folder_of(home) / "start.lock"):
            service = _answering(home) or _start_prefect(home)
    return f"{service.url}/api"


@contextlib.contextmanager
def kept_prefect(home: Home, api: str) -> Generator[None]:
    """Within it the embedded server, where `api` is its address, is started again, there, when it dies.

    What asks it meanwhile asks again until it is back. Any other server is left to those who run it.
    """
    if not _is_embedded(home, api):
        yield
        return
    is_over = threading.Event()

    def keep() -> None:
        patience = KEEP_SECONDS
        while not is_over.wait(patience):
            patience = KEEP_SECONDS
            if not has_lost_prefect(home, api):
                continue
            try:
                with FileLock(folder_of(home) / "start.lock"):
                    # Looked at again: `down` may have ended it, or another run has started it.
                    if _is_embedded(home, api) and has_lost_prefect(home, api):
                        _log.warning("the Prefect server is gone; it is started again")
                        _start_prefect(home)
            except ServiceError as error:
                _log.warning("%s", error)
                patience = START_SECONDS

    threading.Thread(target=keep, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def has_lost_prefect(home: Home, api: str) -> bool:
    """Whether no process of the home's serves Prefect at that address."""
    return not _is_embedded(home, api) or "prefect" not in {one.name for one in running(home)}


def _is_embedded(home: Home, api: str) -> bool:
    service = read_service(home, "prefect")
    return service is not None and api == f"{service.url}/api"


def up(home: Home) -> list[Service]:
    """Start what is not running and keep all until `down`; nothing where others see to the services."""
    if os.environ.get(EXTERNAL) == "external":
        return []
    folder = folder_of(home)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "keep").touch()
    api = ensure_prefect(home)
    wanted = ["worker", "watcher"] if watches(home) else ["worker"]
    with FileLock(folder / "start.lock"):
        for name in wanted:
            ensure_process(home, api, name)
        mlflow = read_service(home, "mlflow")
        if mlflow is None or not mlflow.is_running:
            _start_mlflow(home)
    started = running(home)
    for name in set(wanted) - {service.name for service in started}:
        raise ServiceError(_died(name, folder / f"{name}.log"))
    return started


def down(home: Home, *, waits: bool = False) -> list[Service]:
    """End every service of the home with all its processes; those that were running.

    A run that goes on would ask for its server until it ends: raises ServiceError that names it, or,
    with `waits`, stays until no run is left.
    """
    while live := home.live_runs():
        if not waits:
            raise ServiceError(_still_needed(live))
        time.sleep(POLL_SECONDS)
    with FileLock(folder_of(home) / "start.lock"):  # or a run that ends now starts its server again
        (folder_of(home) / "keep").unlink(missing_ok=True)
        ended = running(home)
        for service in ended:
            _end_group(service)
        for file in folder_of(home).glob("*.json"):
            file.unlink(missing_ok=True)
    return ended


def _still_needed(live: list[RunRecord]) -> str:
    runs = ", ".join(f"{record.run_id} ({record.recipe}, process {record.pid})" for record in live)
    pids = " ".join(str(record.pid) for record in live)
    return (
        f"not ended, for the services are in use by the run {runs}; `bessemer down --wait` waits for "
        f"its end, and `kill {pids}` or the Prefect page cancels it, to be gone on with later"
    )


def running(home: Home) -> list[Service]:
    """Services of the home whose process is there."""
    services = [read_service(home, name) for name in NAMES]
    return [service for service in services if service and service.is_running]


def read_service(home: Home, name: str) -> Service | None:
    """What was noted of a service when it was started; None when there is nothing."""
    file = folder_of(home) / f"{name}.json"
    try:
        return Service.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None


def folder_of(home: Home) -> Path:
    """Where what is known of the home's services lies."""
    return home.path / "services"


def note(home: Home, service: Service) -> None:
    """Write down where a service answers and which process it is."""
    file = folder_of(home) / f"{service.name}.json"
    draft = file.with_suffix(f".{os.getpid()}")
    draft.write_text(service.model_dump_json(indent=1), "utf-8")
    draft.replace(file)


def _answering(home: Home) -> Service | None:
    service = read_service(home, "prefect")
    if service and service.is_running and _answers(f"{service.url}/api/health"):
        return service
    return None


def _answers(url: str) -> bool:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=HEALTH_SECONDS)
    try:
        connection.request("GET", parts.path)
        return connection.getresponse().status == http.HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()


def _start_prefect(home: Home) -> Service:
    if (old := read_service(home, "prefect")) and old.is_running:
        _end_group(old)  # it is there and does not answer
    process, output = _spawn(home, "prefect", [sys.executable, "-m", "flows.prefect_server"], QUIET)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        service = read_service(home, "prefect")
        if service and service.pid == process.pid and _answers(f"{service.url}/api/health"):
            return service
        time.sleep(POLL_SECONDS)
    process.kill()
    process.wait()
    raise ServiceError(_died("prefect", output))


def ensure_process(home: Home, api: str, name: str) -> None:
    """Have the worker, in whose working directory runs started from the page go on, or the watcher.

    One that asks a server at another address than `api` is replaced.
    """
    service = read_service(home, name)
    module, page = PROCESSES[name]
    url = f"{api.removesuffix('/api')}/{page}"
    if service and service.is_running:
        if service.url == url:
            return
        # It would ask a server for ever that is gone. Alone: the runs that a worker has begun go on.
        _end_processes(_members(service)[:1])
    environment = prefect_environment(home, api)
    command = [sys.executable, "-m", module]
    process, _ = _spawn(home, name, command, environment, folder=Path.cwd())
    note(home, Service(name=name, pid=process.pid, started=start_of(process.pid), url=url))


def _start_mlflow(home: Home) -> Service:
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1",
        "--backend-store-uri", home.tracking_uri,
        "--default-artifact-root", str(home.path / "mlartifacts"),
    ]  # fmt: skip
    environment = {**QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process, output = _spawn(home, "mlflow", command, environment)
    url = f"http://{HOST}:{port}"
    service = Service(
        name="mlflow",
        pid=process.pid,
        started=start_of(process.pid),
        url=url,
    )
    note(home, service)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if _answers(f"{url}/health"):
            return service
        time.sleep(POLL_SECONDS)
    _end_group(service)
    raise ServiceError(_died("mlflow", output))


def _spawn(
    home: Home,
    name: str,
    command: list[str],
    environment: dict[str, str],
    *,
    folder: Path | None = None,
) -> tuple[subprocess.Popen[bytes], Path]:
    """A process of its own session whose output goes to a file, so that it outlives the command."""
    folder_of(home).mkdir(parents=True, exist_ok=True)
    output = folder_of(home) / f"{name}.log"
    root = Path(__file__).resolve().parents[1]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    with output.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=folder or home.path,
            env={
                **os.environ,
                **environment,
                "BESSEMER_HOME": str(home.path),
                "PYTHONPATH": os.pathsep.join(paths),
            },
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, output


def _end_group(service: Service) -> None:
    """End the processes of a service's session."""
    _end_processes(_members(service))


def _end_processes(members: list[psutil.Process]) -> None:
    """Ask processes to end; those that stay are killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(number)
        _, members = psutil.wait_procs(members, timeout=STOP_SECONDS)
        if not members:
            return


def _members(service: Service) -> list[psutil.Process]:
    try:
        leader = psutil.Process(service.pid)
        return [leader, *leader.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _died(name: str, output: Path) -> str:
    lines = output.read_text("utf-8", errors="replace").splitlines()
    tail = "\n".join(lines[-LOG_TAIL_LINES:])
    return f"the service {name} did not start; {output} ends with:\n{tail}"


_LOGGING: dict[str, Any] = {
    # As Prefect's own, but nothing goes to the console: a flow whose terminal is gone would die of
    # its next line, and the command line shows its own progress.
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {
        "api": {"level": 0, "class": "prefect.logging.handlers.APILogHandler"},
        "none": {"class": "logging.NullHandler"},
    },
    "loggers": {
        "prefect": {"level": "WARNING"},
        "prefect.flow_runs": {"level": "INFO", "handlers": ["api"]},
        "prefect.task_runs": {"level": "INFO", "handlers": ["api"]},
        "bessemer": {"level": "INFO", "handlers": ["api"], "propagate": False},
    },
    "root": {"level": "WARNING", "handlers": ["none"]},
}
