"""Two hosts, as network namespaces: the servers on one, the run on the other, and a link that is cut."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.faults.faulty_s3 import client_of
from tests.faults.small_run import Place, built, digests, steps_of, wait_until
from tests.faults.table import Table
from tests.tasks.launching import wait_for

pytestmark = [pytest.mark.soak, pytest.mark.e2e, pytest.mark.timeout(0)]

HERE, THERE = "10.78.0.1", "10.78.0.2"
CUT_SECONDS = 60


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces with a link between them."""
    names = (f"bessemer{os.getpid()}a", f"bessemer{os.getpid()}b")
    try:
        ip("netns", "add", names[0])
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("namespaces need root")
    try:
        ip("netns", "add", names[1])
        ip(
            *["link", "add", "wire0", "netns"],
            names[0],
            *["type", "veth", "peer", "wire0", "netns"],
            names[1],
        )
        for name, address in zip(names, (HERE, THERE), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "wire0")
            for device in ("lo", "wire0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)


@contextmanager
def serving(host: str, *command: str, **environment: str) -> Generator[None]:
    """A server on a host, of which nothing stays behind."""
    process = subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, "-m", *command],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def inside(host: str, code: str, **environment: str) -> str:
    """What a piece of Python prints on a host."""
    command = ["ip", "netns", "exec", host, sys.executable, "-c", code]
    return subprocess.run(
        command, env={**os.environ, **environment}, check=True, capture_output=True, text=True
    ).stdout


def test_a_link_that_is_cut_for_a_minute_loses_nothing(
    hosts: tuple[str, str], tmp_path: Path
) -> None:
    plain = Place(tmp_path / "plain")
    try:
        unbroken = plain.run("unbroken")
    finally:
        plain.down()
    one, other = hosts
    client = client_of(f"http://{HERE}:9000")
    prefect = {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    with (
        serving(one, "moto.server", "-H", HERE, "-p", "9000"),
        serving(one, "prefect", "server", "start", "--host", HERE, "--port", "4200", **prefect),
    ):
        health = f"import httpx; print(httpx.get('http://{HERE}:4200/api/health').text)"

        def is_up() -> bool:
            with suppress(subprocess.CalledProcessError):
                return "true" in inside(other, health)
            return False

        wait_for(is_up, 300)
        inside(other, "import s3fs; s3fs.S3FileSystem().mkdir('stores')", **client)
        place = Place(
            tmp_path / "other",
            {**client, "PREFECT_API_URL": f"http://{HERE}:4200/api"},
            within=("ip", "netns", "exec", other),
            bucket="s3://stores",
        )
        flow = place.start("cut")
        wait_until(
            flow,
            lambda: (found := place.attempt("cut", "pretrain")) and steps_of(found) > 20,
            seconds=900,
        )
        before = place.written("cut")
        ip("-n", one, "link", "set", "wire0", "down")
        time.sleep(CUT_SECONDS)
        ip("-n", one, "link", "set", "wire0", "up")
        out, _ = flow.communicate(timeout=1200)
        ended = out.splitlines()[-1] if out else ""
        started = time.monotonic()
        again = place.run("cut")
        seconds = time.monotonic() - started
        assert digests(again) == digests(unbroken)
        row = Table().note(
            "link cut for 60 s",
            stage="pretrain",
            before=before,
            after=place.written("cut"),
            seconds=seconds,
        )
        assert row.lost == row.rebuilt == 0, ended
        # All that was built is in the bucket: a third machine, with an empty cache, finds it.
        shutil.rmtree(place.store("cut"))
        assert not built(place.run("cut"))
