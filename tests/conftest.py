"""What all tests share: one thread each, a home of their own, the folders of real data and oracle numbers."""

import os
from pathlib import Path

# `make test` runs two tests at a time; torch reads it when it is imported, here or in a child.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.s3_server import s3_server as s3_server
from tests.tasks.clusters import clusters as clusters

TESTS = Path(__file__).parent
SHARED = Path(__file__).resolve().parents[2] / "shared"
LONGEST = ("faults/test_run_faults.py", "model/test_engines.py", "e2e/test_cli.py")
"""Begun first, so that no process ends with one of them while the other has nothing left."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file is run by one process, and files whose tests ask the same server by the same one."""
    servers = {item.path: "s3" for item in items if "s3_server" in _fixtures(item)}
    for item in items:
        file = item.path.relative_to(TESTS)
        folder = file.parts[0]
        group = folder if folder == "serve" else servers.get(item.path, str(file))
        item.add_marker(pytest.mark.xdist_group("s3" if folder == "storage" else group))
    items.sort(key=lambda item: str(item.path.relative_to(TESTS)) not in LONGEST)


def _fixtures(item: pytest.Item) -> list[str]:
    return item.fixturenames if isinstance(item, pytest.Function) else []


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
