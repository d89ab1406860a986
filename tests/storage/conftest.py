"""The stores that one suite runs on: a local folder, and S3."""

from pathlib import Path

import pytest

from storage.store import Store, open_store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(tmp_path / "store")
    server = request.getfixturevalue("s3_server")
    return open_store(f"{server}/{tmp_path.name}", cache=tmp_path / "cache")
