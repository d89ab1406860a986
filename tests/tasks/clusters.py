"""A small Dask or Ray cluster on loopback, in processes of its own: `python -m tests.tasks.clusters KIND`.

Prints its address and ends when its standard input does, so that none outlives its test run.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
QUIET = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Named for other systems; it keeps all of Ray on loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1",
}


def _dask() -> None:
    from distributed import LocalCluster

    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address=None,
            worker_dashboard_address=None,
            local_directory=folder,
            memory_limit=0,
        ) as cluster,
    ):
        _serve(cluster.scheduler_address)


def _ray() -> None:
    import ray

    with tempfile.TemporaryDirectory() as folder:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80_000_000,
            _temp_dir=folder,
            log_to_driver=False,
        )
        _serve(ray.get_runtime_context().gcs_address)
        ray.shutdown()


def _serve(address: str) -> None:
    print(address, flush=True)  # noqa: T201
    sys.stdin.read()


class Clusters:
    """Clusters that are started together and waited for when they are needed."""

    def __init__(self) -> None:
        self._starting = {kind: self._start(kind) for kind in ("dask", "ray")}
        self._addresses: dict[str, str] = {}

    @staticmethod
    def _start(kind: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.tasks.clusters", kind],
            env={**os.environ, **QUIET, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def address(self, kind: str) -> str:
        if kind not in self._addresses:
            stdout = self._starting[kind].stdout
            assert stdout
            line = ""
            while ":" not in line:
                line = stdout.readline()
                assert line, f"the {kind} cluster did not start"
            self._addresses[kind] = line.strip()
        return self._addresses[kind]

    def end(self) -> None:
        for process in self._starting.values():
            assert process.stdin
            process.stdin.close()
        for process in self._starting.values():
            process.wait(120)


@pytest.fixture(scope="session")
def clusters(s3_server: str) -> Iterator[Clusters]:
    """Both kinds, with the S3 client's environment; one of each for all tests."""
    started = Clusters()
    os.environ |= {name: QUIET[name] for name in QUIET if name.startswith("RAY")}
    yield started
    if (ray := sys.modules.get("ray")) is not None:
        ray.shutdown()
    started.end()


if __name__ == "__main__":
    {"dask": _dask, "ray": _ray}[sys.argv[1]]()
