"""What all tests share: one thread each, a home of their own, the folders of real data and oracle numbers."""

import os
import signal
from pathlib import Path

# `make test` runs two tests at a time; torch reads it when it is imported, here or in a child.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell's background job we ignore Ctrl-C, and so would all commands that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from xdist.remote import Producer
from xdist.scheduler.loadscope import LoadScopeScheduling

from tests.s3_server import away as away
from tests.s3_server import s3_server as s3_server
from tests.tasks.clusters import clusters as clusters

SHARED = Path(__file__).resolve().parents[2] / "shared"
LONGEST = ("faults/test_run_faults.py", "model/test_engines.py", "e2e/test_cli.py")
"""Begun first, so that no process ends with one of them while the other has nothing left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.nodeid.split("::")[0].removeprefix("tests/") not in LONGEST)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return ByFile(config, log)


class ByFile(LoadScopeScheduling):
    """A file is run by one process, and folders whose files ask one server by the same one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        folder = file.split("/")[1]
        return folder if folder in ("serve", "storage") else file


@pytest.fixture(scope="session", autouse=True)
def home_of_this_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One CPU job trains at a time in a home: tests beside each other must not wait for one another."""
    os.environ.setdefault("BESSEMER_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real public data; the test skips where it is missing."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the folder of real data is not here")
    return SHARED / "data"


@pytest.fixture(scope="session")
def shared_oracle() -> Path:
    """Folder of independent numbers for the alignment losses; the test skips where it is missing."""
    if not (SHARED / "oracle").is_dir():
        pytest.skip("the folder of oracle numbers is not here")
    return SHARED / "oracle"
