"""What several tests of tasks start with."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tasks import slurm_stand_in


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Slurm's commands on the PATH, by a stand-in; its books."""
    slurm_stand_in.install(tmp_path / "bin")
    folder = tmp_path / "slurm"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(folder))
    monkeypatch.setenv("BESSEMER_HOME", str(tmp_path))
    controller = subprocess.Popen(
        [sys.executable, "-S", slurm_stand_in.__file__, "control"], start_new_session=True
    )
    yield folder
    os.killpg(controller.pid, signal.SIGKILL)
    controller.wait()
