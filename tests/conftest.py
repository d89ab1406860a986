"""Fixtures that many tests share: the folders of real data and of oracle numbers, where they exist."""

from pathlib import Path

import pytest

from tests.s3_server import s3_server as s3_server
from tests.tasks.clusters import clusters as clusters

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
