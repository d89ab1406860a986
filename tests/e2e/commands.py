"""The command line in a process of its own, in a folder of its own, and what it leaves behind."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil

from flows.runs import Home
from flows.services import read_service
from tests.flows.tiny_stages import LOG

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Command:
    """A working folder and the command line in it."""

    folder: Path
    program: tuple[str, ...] = ("-m", "tests.e2e.app")

    @property
    def home(self) -> Home:
        return Home(self.folder / "home")

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "BESSEMER_"))}
        return {
            **kept,
            "BESSEMER_HOME": str(self.home.path),
            "BESSEMER_WORKERS": "1",
            "BESSEMER_TRACKING": "off",  # one test has it on: it costs seconds of processor time
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
            LOG: str(self.folder / "log.txt"),
            **extra,
        }

    def start(self, *arguments: str, **extra: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *self.program, *arguments],
            cwd=self.folder,
            env=self.environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(
        self, *arguments: str, expect: int = 0, timeout: float = 180.0, **extra: str
    ) -> str:
        process = self.start(*arguments, **extra)
        out, err = process.communicate(timeout=timeout)
        assert process.returncode == expect, out + err
        return out if expect in (0, 1) else err

    def json(self, *arguments: str, expect: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", expect=expect).splitlines()[-1])

    def ran(self) -> list[str]:
        log = self.folder / "log.txt"
        lines = log.read_text("utf-8").split() if log.exists() else []
        log.unlink(missing_ok=True)
        return sorted(lines)

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        """Ask the home's Prefect server."""
        service = read_service(self.home, "prefect")
        assert service
        request = Request(
            f"{service.url}/api/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)


def of_home(home: Home) -> list[psutil.Process]:
    """Processes that were started for a home."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("BESSEMER_HOME") == str(home.path):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition: Any, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
