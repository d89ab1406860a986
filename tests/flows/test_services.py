"""What can be told of services without starting them; tests/e2e starts them."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from flows import services
from flows.prefect_server import Activity, bind
from flows.runs import NEWEST_RUNS, FileLock, Home, RunRecord, RunStatus, ServiceError, is_alive
from flows.services import (
    PROCESSES,
    Service,
    down,
    ensure_prefect,
    ensure_process,
    has_lost_prefect,
    kept_prefect,
    prefect_environment,
    read_service,
    running,
)
from tasks.processes import start_of
from tests.tasks.launching import wait_for


class Healthy(BaseHTTPRequestHandler):
    """Answers as a server that is well."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/api/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:  # type: ignore[override]
        """Quiet."""


def test_the_server_that_the_environment_names_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        named = f"http://127.0.0.1:{server.server_port}/api"
        monkeypatch.setenv("PREFECT_API_URL", named)
        assert ensure_prefect(Home(tmp_path)) == named
        server.shutdown()
    with pytest.raises(ServiceError, match="does not answer; start that server, or unset"):
        ensure_prefect(Home(tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_was_never_started_is_not_running(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert running(home) == []
    assert down(home) == []


def test_a_number_that_another_process_got_is_not_the_service(tmp_path: Path) -> None:
    home = Home(tmp_path)
    (tmp_path / "services").mkdir()
    # Our own process, but as if the service had been started an hour earlier.
    started = start_of(os.getpid()) - 3600
    service = Service(name="prefect", pid=os.getpid(), started=started, url="http://127.0.0.1:1")
    (tmp_path / "services" / "prefect.json").write_text(service.model_dump_json(), "utf-8")
    assert read_service(home, "prefect") == service
    assert running(home) == []
    assert down(home) == []  # and we are not killed
    assert is_alive(os.getpid(), start_of(os.getpid()))


@pytest.fixture
def gone(tmp_path: Path) -> Service:
    """The embedded server of the home `tmp_path`, whose process is gone."""
    service = Service(name="prefect", pid=2**22 + 1, started=1.0, url="http://127.0.0.1:1")
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "prefect.json").write_text(service.model_dump_json(), "utf-8")
    return service


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When a server was to be started, which fails."""
    times: list[float] = []

    def fail(home: Home) -> None:
        times.append(time.monotonic())
        raise ServiceError("no room")

    monkeypatch.setattr(services, "KEEP_SECONDS", 0.01)
    monkeypatch.setattr(services, "START_SECONDS", 0.1)
    monkeypatch.setattr(services, "_start_prefect", fail)
    return times


def test_a_run_starts_its_server_again_as_often_as_it_takes(
    tmp_path: Path, gone: Service, starts: list[float]
) -> None:
    home = Home(tmp_path)
    assert has_lost_prefect(home, f"{gone.url}/api")
    with kept_prefect(home, f"{gone.url}/api"):
        wait_for(lambda: len(starts) >= 3, 20)
    assert starts[2] - starts[1] > 0.1
    time.sleep(0.2)
    reached = len(starts)
    time.sleep(0.3)
    assert len(starts) == reached


@pytest.mark.usefixtures("gone")
def test_a_server_that_is_not_the_home_s_is_not_started(
    tmp_path: Path, starts: list[float]
) -> None:
    with kept_prefect(Home(tmp_path), "http://elsewhere:4200/api"):
        time.sleep(0.2)
    assert starts == []


def test_a_server_that_down_ends_is_not_started_again(tmp_path: Path, starts: list[float]) -> None:
    home, folder = Home(tmp_path), tmp_path / "services"
    folder.mkdir()
    with subprocess.Popen(["sleep", "60"]) as process:
        service = Service(
            name="prefect", pid=process.pid, started=start_of(process.pid), url="http://127.0.0.1:1"
        )
        (folder / "prefect.json").write_text(service.model_dump_json(), "utf-8")
        with kept_prefect(home, f"{service.url}/api"):
            with FileLock(folder / "start.lock"):  # as `down` does
                process.kill()
                process.wait()
                time.sleep(0.2)
                (folder / "prefect.json").unlink()
            time.sleep(0.2)
    assert starts == []


def test_everything_of_prefect_is_kept_in_the_home_and_telemetry_is_off(tmp_path: Path) -> None:
    environment = prefect_environment(Home(tmp_path), "http://127.0.0.1:1/api")
    assert environment["PREFECT_HOME"].startswith(str(tmp_path))
    assert environment["DO_NOT_TRACK"] == "1"
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert Path(environment["PREFECT_LOGGING_SETTINGS_PATH"]).is_file()


def test_an_open_request_is_activity_and_idleness_is_counted_from_its_end() -> None:
    asked = asyncio.Event()
    finish = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        asked.set()
        await finish.wait()

    async def scenario() -> tuple[float, float]:
        activity = Activity(application)
        request = asyncio.create_task(activity({"type": "http"}, None, None))  # type: ignore[arg-type]
        await asked.wait()
        await asyncio.sleep(0.05)
        while_open = activity.idle_seconds
        finish.set()
        await request
        await asyncio.sleep(0.05)
        return while_open, activity.idle_seconds

    while_open, after = asyncio.run(scenario())
    assert while_open == 0.0
    assert 0.04 < after < 5.0


def test_a_file_lock_keeps_a_second_holder_out(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with FileLock(tmp_path / "lock"):
            order.append("second")

    with FileLock(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]


def test_down_is_refused_while_a_run_needs_the_services(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = start_of(process.pid)
        record = RunRecord(
            run_id="20260131-235959-1", recipe="demo", recipe_path="demo", pid=process.pid
        )
        record.pid_started = started
        record.write(home.run_folder(record.run_id))
        with pytest.raises(ServiceError, match=r"run 20260131-235959-1 \(demo, process \d+\)"):
            down(home)
        # One that ended long ago is not in use, whatever its process does; one just ended may still
        # be telling the server.
        record.status = "cancelled"
        for ago, is_live in ((5, True), (3600, False)):
            record.ended = (datetime.now(UTC) - timedelta(seconds=ago)).isoformat(
                timespec="seconds"
            )
            record.write(home.run_folder(record.run_id))
            assert bool(home.live_runs()) is is_live
        process.kill()
    record.ended = None
    record.write(home.run_folder(record.run_id))
    assert down(home) == []


def note(home: Home, name: str, pid: int, url: str) -> None:
    service = Service(name=name, pid=pid, started=start_of(pid), url=url)
    (home.path / "services").mkdir(exist_ok=True)
    (home.path / "services" / f"{name}.json").write_text(service.model_dump_json(), "utf-8")


def test_a_server_that_comes_back_is_where_it_was_unless_its_place_is_taken(
    tmp_path: Path,
) -> None:
    home = Home(tmp_path)
    with bind(home) as first:
        first.listen()
        port = first.getsockname()[1]
        note(home, "prefect", os.getpid(), f"http://127.0.0.1:{port}")
        with socket.create_connection(("127.0.0.1", port)), first.accept()[0] as asked:
            asked.close()  # the server's end first: its port is not free for a minute
        with bind(home) as elsewhere:
            assert elsewhere.getsockname()[1] != port
    with bind(home) as again:
        assert again.getsockname()[1] == port


def test_a_service_that_asks_a_server_elsewhere_is_replaced_and_its_runs_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "standing.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(PROCESSES, "worker", ("standing", "deployments"))
    home = Home(tmp_path / "home")
    home.path.mkdir()
    begins_a_run = (
        "import subprocess as s; print(s.Popen(['sleep', '600']).pid, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", begins_a_run], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as old:
        assert old.stdout
        run = int(old.stdout.readline())
        note(home, "worker", old.pid, "http://127.0.0.1:1/deployments")
        ensure_process(home, "http://127.0.0.1:2/api", "worker")
        assert start_of(old.pid) == 0
    assert is_alive(run, start_of(run))
    os.kill(run, signal.SIGKILL)
    worker = read_service(home, "worker")
    assert worker
    assert worker.is_running
    assert worker.url == "http://127.0.0.1:2/deployments"
    ensure_process(home, "http://127.0.0.1:2/api", "worker")
    assert read_service(home, "worker") == worker
    assert down(home) == [worker]
    assert not worker.is_running


def test_a_long_run_is_not_forgotten_behind_many_short_ones(tmp_path: Path) -> None:
    home = Home(tmp_path)

    def write(status: RunStatus, pid: int) -> RunRecord:
        record = RunRecord(run_id=home.new_run_id(), recipe="r", recipe_path="r", status=status)
        record.pid, record.pid_started = pid, start_of(pid)
        record.ended = "2026-01-01T00:00:00+00:00" if status == "done" else None
        record.write(home.run_folder(record.run_id))
        return record

    with subprocess.Popen(["sleep", "600"]) as process:
        long = write("running", process.pid)
        for _ in range(NEWEST_RUNS):
            write("done", 1)
        assert [record.run_id for record in home.live_runs()] == [long.run_id]
        process.kill()
    assert [record.run_id for record in home.dead_runs()] == [long.run_id]
    long.ended = datetime.now(UTC).isoformat(timespec="seconds")
    long.write(home.run_folder(long.run_id))
    assert home.dead_runs() == []
    assert len(home.newest_records()) == NEWEST_RUNS
