"""Connections that are held open for nothing, and those that were closed."""

import asyncio
import gc
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from flows import connections
from flows.garbage import put_off
from flows.serve import Limits, serve

ASK = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
TELL = b"POST /preferences HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@asynccontextmanager
async def empty_server(folder: Path) -> AsyncGenerator[int]:
    """The port of a server without a model, in this process."""
    urls: asyncio.Queue[str] = asyncio.Queue()
    limits, rated = Limits(port=0), folder / "rated.jsonl"
    serving = asyncio.create_task(
        serve([], lambda served: pytest.fail("no model"), limits, rated, urls.put_nowait)
    )
    try:
        yield int((await urls.get()).rpartition(":")[2])
    finally:
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving


def test_closed_connections_do_not_pile_up(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    usual = gc.get_threshold()
    request.addfinalizer(lambda: (gc.set_threshold(*usual), gc.unfreeze()))
    put_off()  # as `bessemer` begins

    async def after_requests() -> int:
        async with empty_server(tmp_path) as port:
            for _ in range(300):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(ASK + b"Connection: close\r\n\r\n")
                assert b'"ok"' in await reader.read()
                writer.close()
            names = [type(one).__name__ for one in gc.get_objects()]
        return names.count("_SelectorSocketTransport")

    # 600 ends of connections were closed, each of which only a search frees.
    assert asyncio.run(after_requests()) < 200


def test_a_request_that_does_not_come_to_its_end_is_waited_for_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 1.0)
    begun = {
        "nothing": b"",
        "half a head": ASK,
        "half a body": TELL + b"Content-Length: 99\r\n\r\n{",
        "half a second one": ASK + b"\r\n" + ASK,
    }

    async def seconds_held(port: int, sent: bytes) -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        if sent.endswith(b"\r\n" + ASK):
            await reader.readuntil(b"}}")
        started = asyncio.get_running_loop().time()
        with suppress(ConnectionResetError):
            while not reader.at_eof():
                with suppress(TimeoutError):  # a byte now and then changes nothing
                    await asyncio.wait_for(reader.read(1), 0.2)
                if sent:
                    writer.write(b"x")
        return asyncio.get_running_loop().time() - started

    async def held() -> dict[str, float]:
        async with empty_server(tmp_path) as port:
            seconds = await asyncio.gather(*(seconds_held(port, sent) for sent in begun.values()))
        return dict(zip(begun, seconds, strict=True))

    assert all(0.9 < seconds < 8 for seconds in asyncio.run(held()).values())


def test_whoever_goes_on_asking_keeps_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 1.0)

    async def ask_slowly() -> None:
        async with empty_server(tmp_path) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(3):
                writer.write(ASK[:9])
                await asyncio.sleep(0.4)
                writer.write(ASK[9:] + b"\r\n")
                assert b"200 OK" in await reader.readuntil(b"}}")

    asyncio.run(ask_slowly())


def test_a_reader_that_takes_nothing_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 1.0)

    async def ask_and_read_nothing() -> None:
        async with empty_server(tmp_path) as port:
            loop, reader = asyncio.get_running_loop(), socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.setblocking(False)
            with reader:
                await loop.sock_connect(reader, ("127.0.0.1", port))
                page = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
                await loop.sock_sendall(reader, page * 400)  # more than the kernel holds
                await asyncio.sleep(2.5)
                while await loop.sock_recv(reader, 1 << 16):
                    pass

    with pytest.raises(ConnectionResetError):
        asyncio.run(asyncio.wait_for(ask_and_read_nothing(), 30))
