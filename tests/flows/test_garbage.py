"""Python looks for garbage again once a command is at work."""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from flows.garbage import put_off
from flows.serve import Limits, serve
from tests.flows.conftest import Place
from tests.flows.test_execution import go

USUAL = gc.get_threshold()


@pytest.fixture(autouse=True)
def started() -> Iterator[None]:
    """As `bessemer` begins."""
    put_off()
    yield
    gc.set_threshold(*USUAL)
    gc.unfreeze()


def test_closed_connections_of_a_server_do_not_pile_up(tmp_path: Path) -> None:
    def closed() -> int:
        return sum(type(one).__name__ == "_SelectorSocketTransport" for one in gc.get_objects())

    async def ask(url: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b'"ok"' in await reader.read()
        writer.close()

    async def after_requests() -> int:
        urls: asyncio.Queue[str] = asyncio.Queue()
        limits = Limits(port=0)
        serving = asyncio.create_task(
            serve(
                [],
                lambda served: pytest.fail("no model"),
                limits,
                tmp_path / "rated",
                urls.put_nowait,
            )
        )
        url = await urls.get()
        for _ in range(300):
            await ask(url)
        found = closed()
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving
        return found

    # 600 ends of connections were closed, each of which only a search frees.
    assert asyncio.run(after_requests()) < 200


def test_a_run_of_hits_does_not_look_and_one_that_builds_does(place: Place) -> None:
    go(place)
    assert gc.get_threshold() == USUAL
    put_off()
    go(place)
    assert gc.get_threshold() != USUAL
