"""An S3 server that fails: before it does what it is asked, after it, by silence, or late."""

import random
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, Literal

Fault = Literal["refused", "lost", "cut", "slow"]
Application = Callable[[dict[str, Any], Any], Iterable[bytes]]
ERROR = b"<Error><Code>%s</Code><Message>planted</Message></Error>"


class Faulty:
    """A WSGI application in front of another, which spoils a share of the requests.

    `refused`: status 503 and nothing is done. `lost`: it is done, and told as status 500, so that the
    client does it again. `cut`: the connection ends instead of an answer. `slow`: the answer waits.
    """

    def __init__(
        self, application: Application, share: float, seed: int, slow_seconds: float
    ) -> None:
        self._application, self._share, self._slow = application, share, slow_seconds
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.faults: dict[Fault, int] = {"refused": 0, "lost": 0, "cut": 0, "slow": 0}
        """How often each was met."""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        match self._next():
            case "refused":
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                return _error(start_response, "503 Slow Down", b"SlowDown")
            case "lost":
                list(self._application(environ, lambda *_: None))
                return _error(start_response, "500 Internal Server Error", b"InternalError")
            case "cut":
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                return []
            case "slow":
                time.sleep(self._slow)
            case None:
                pass
        return self._application(environ, start_response)

    def _next(self) -> Fault | None:
        with self._lock:
            if self._random.random() >= self._share:
                return None
            fault = self._random.choice(list(self.faults))
            self.faults[fault] += 1
            return fault


def _error(start_response: Any, status: str, code: bytes) -> list[bytes]:
    content = ERROR % code
    start_response(
        status, [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))]
    )
    return [content]


def client_of(address: str) -> dict[str, str]:
    """Environment of a client of a server of the tests."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def faulty_s3(share: float, seed: int, slow_seconds: float = 1.0) -> Generator[tuple[str, Faulty]]:
    """The address of such a server on loopback, and its application."""
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    application = Faulty(DomainDispatcherApplication(create_backend_app), share, seed, slow_seconds)
    server = make_server(
        "127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", application
    finally:
        server.shutdown()
        thread.join()
