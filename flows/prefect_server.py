"""The embedded Prefect server: beside Prefect's pages it serves the reports of the home's runs, and it ends by
itself when it is idle. `python -m flows.prefect_server` is the process; `flows/services.py` starts it.
"""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flows.runs import Home
from flows.services import (
    AUTH,
    HOST,
    POLL_SECONDS,
    QUIET,
    REPORTS,
    Service,
    folder_of,
    note,
    read_service,
)
from tasks.processes import start_of

WATCH_SECONDS = 5.0
IDLE_SECONDS = 900.0

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class Reports:
    """An ASGI application around another that serves the reports of a home's runs beside it.

    Prefect's password is asked for by its interface alone; where one is set, no report is served.
    """

    def __init__(self, application: Application, home: Home) -> None:
        self._application, self._home = application, home

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(REPORTS):
            await self._application(scope, receive, send)
            return
        from starlette.responses import FileResponse, PlainTextResponse

        run_id = scope["path"].removeprefix(REPORTS)
        page = self._home.run_folder(run_id) / "report.html"
        is_there = run_id.replace("-", "").isalnum() and not os.environ.get(AUTH) and page.is_file()
        answer = FileResponse(page) if is_there else PlainTextResponse("no report", 404)
        await answer(scope, receive, send)


class Activity:
    """An ASGI application around another that knows when it was last asked something."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self._open = 0
        self._last = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._application(scope, receive, send)
            return
        self._open += 1
        try:
            await self._application(scope, receive, send)
        finally:
            self._open -= 1
            self._last = time.monotonic()

    @property
    def idle_seconds(self) -> float:
        """Time since the last request; 0 while one, or a page's socket, is open."""
        return 0.0 if self._open else time.monotonic() - self._last


def serve_prefect(home: Home, idle_seconds: float) -> None:
    """Be the embedded Prefect server until it is idle, told to end, or no longer the home's."""
    port = bind(home)
    url = f"http://{HOST}:{port.getsockname()[1]}"
    folder = home.path / "prefect"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        QUIET,
        PREFECT_HOME=str(folder),
        PREFECT_API_DATABASE_CONNECTION_URL=f"sqlite+aiosqlite:///{folder / 'prefect.db'}",
        # On any port but 4200 the page asks the wrong one unless it is told.
        PREFECT_SERVER_UI_API_URL=f"{url}/api",
        PREFECT_SERVER_LOGGING_LEVEL="WARNING",
    )
    os.environ.pop("PREFECT_API_URL", None)

    import uvicorn
    from prefect.server.api.server import create_app

    _write_at_once()
    activity = Activity(Reports(create_app(), home))
    server = uvicorn.Server(
        uvicorn.Config(activity, log_level="warning", timeout_graceful_shutdown=3)
    )
    note(home, Service(name="prefect", pid=os.getpid(), started=start_of(os.getpid()), url=url))
    threading.Thread(
        target=_watch, args=(home, activity, server, idle_seconds), daemon=True
    ).start()
    port.listen(128)
    asyncio.run(server.serve(sockets=[port]))


def bind(home: Home) -> socket.socket:
    """The port that the home's server had before, where it is free: what asked there finds it again."""
    old = read_service(home, "prefect")
    port = urlsplit(old.url).port if old else 0
    bound = socket.socket()
    # Or connections of the server that was killed keep the port for a minute.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((HOST, port))
    except OSError:
        bound.bind((HOST, 0))
    return bound


def _write_at_once() -> None:
    """Let SQLite transactions that will write take the write lock when they begin.

    Prefect begins them as readers; one that another writer overtook is then refused at once
    ("database is locked", whatever the time-out), and the client waits two seconds and more before
    it tries again: measured, four subflows of four tasks took 6.4 s, and 0.7 s with this.
    """
    from prefect.server.database import configurations
    from sqlalchemy import Connection

    def begin(self: object, conn: Connection) -> None:
        if configurations.SQLITE_BEGIN_MODE.get() is not None:
            conn.exec_driver_sql("BEGIN IMMEDIATE")

    configurations.AioSqliteConfiguration.begin_sqlite_stmt = begin


def _watch(home: Home, activity: Activity, server: Any, idle_seconds: float) -> None:
    while not (server.started or server.should_exit):
        time.sleep(POLL_SECONDS)  # on a busy machine it may take longer than it may be idle
    started = time.monotonic()
    while not server.should_exit:
        time.sleep(min(WATCH_SECONDS, idle_seconds / 4))
        service = read_service(home, "prefect")
        is_ours = service is not None and service.pid == os.getpid()
        idle = min(activity.idle_seconds, time.monotonic() - started)
        is_idle = idle > idle_seconds and not (folder_of(home) / "keep").exists()
        # A stage may have nothing to tell for longer than that.
        if not is_ours or (is_idle and not home.live_runs()):
            server.should_exit = True


if __name__ == "__main__":
    serve_prefect(
        Home(Path(os.environ["BESSEMER_HOME"])),
        float(os.environ.get("BESSEMER_IDLE_SECONDS", IDLE_SECONDS)),
    )
