"""How much memory there is, and arrays that go to disk when they would need more than their share."""

import ctypes
import math
import mmap
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

GROUPS = Path("/sys/fs/cgroup")
M_ARENA_MAX = -8
"""Of glibc's malloc.h."""
SHARE = 0.25
"""Of the memory there is, what one stage's arrays may take where no bound is set."""


def host_memory() -> int:
    """Bytes that processes of this host may use: what is built in, or the limit of a memory group (container)
    that this process is in."""
    built_in = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([built_in, *_group_limits(GROUPS, Path("/proc/self/cgroup"))])


def _group_limits(groups: Path, membership: Path) -> list[int]:
    """Limits of the groups of both versions that the process is in, those above them included."""
    limits: list[int] = []
    lines = membership.read_text("utf-8").splitlines() if membership.is_file() else []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        match controllers.split(","):
            case [""]:
                root, file = groups, "memory.max"
            case ["memory"]:
                root, file = groups / "memory", "memory.limit_in_bytes"
            case _:
                continue
        # Inside a container the group's own name may not be mounted; its limit is then the root's.
        places = [root, *(root / part for part in _prefixes(name))]
        found = [
            (place / file).read_text("utf-8").strip()
            for place in places
            if (place / file).is_file()
        ]
        limits += [int(text) for text in found if text.isdigit()]
    return limits


def _prefixes(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def give_back() -> None:
    """Return memory that this process has freed to the kernel, as far as glibc and Arrow keep it."""
    if arrow := sys.modules.get("pyarrow"):
        arrow.default_memory_pool().release_unused()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def one_arena() -> None:
    """Have all threads of this process share glibc's heap: a worker computes in one, and what the others
    would free in heaps of their own is hardly ever given back."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_ARENA_MAX, 1)


class Scratch:
    """Gives arrays: in memory up to a bound, then in files of a folder.

    The files have no name, so that nothing stays behind, however the process ends; the kernel keeps of them in
    memory what fits.
    """

    def __init__(self, folder: Path, memory_mb: int | None) -> None:
        """Without a bound in MB it is a quarter of what the host, or its memory group, has."""
        self._folder = folder
        self._left = int(SHARE * host_memory()) if memory_mb is None else memory_mb << 20

    def empty(self, shape: tuple[int, ...], dtype: Any) -> "NDArray[Any]":
        """An array with any content. Raises OSError if there is no room for it on the disk."""
        import numpy as np

        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size <= self._left:
            self._left -= size
            return np.empty(shape, dtype)
        with tempfile.TemporaryFile(dir=self._folder) as stream:
            # A full disk is an error here; later it would be a signal that ends the process.
            os.posix_fallocate(stream.fileno(), 0, size)
            content = mmap.mmap(stream.fileno(), size)
        # Read here and there: reading ahead would read a hundred times what is needed.
        content.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(content, dtype).reshape(shape)
