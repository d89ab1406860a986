"""Keeps worker processes from compiling the same loop side by side."""

import fcntl
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone() -> Generator[None]:
    """Hold a lock of this user on this machine.

    Within it, call a kernel on some small input: the first process compiles it and writes numba's cache, the
    others wait and then read the cache. The kernel frees the lock of a process that dies.
    """
    path = Path(tempfile.gettempdir()) / f"bessemer-kernels-{os.getuid()}.lock"
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
