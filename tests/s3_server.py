"""An S3 server of the tests' own, in this process, on loopback."""

import os
import socket
from collections.abc import Iterator

import pytest

from tests.faults.faulty_s3 import client_of


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 server of the test's own on loopback, with the client's environment set for it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = client_of(f"http://{host}:{port}")
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    import s3fs

    s3fs.S3FileSystem().mkdir("artifacts-of-tests")
    yield "s3://artifacts-of-tests"
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def away(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket whose server does not answer; clients know at once."""
    import s3fs

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{bound.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3fs.S3FileSystem.clear_instance_cache()
        yield s3_server
    s3fs.S3FileSystem.clear_instance_cache()
