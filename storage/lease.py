"""Who works on a fingerprint: a lock that the kernel frees when its last holder is gone.

`flock` belongs to the open file, not to the process: every copy of the descriptor (inherited by a
supervisor through `pass_fds`) holds the lease, and it ends when the last copy is closed, also by
`kill -9`. It is never unlocked by hand, which would free it for all copies.
"""

import fcntl
import os
from pathlib import Path


class FileLease:
    """A held lease; `fd` may be handed to a child, which then holds it too."""

    def __init__(self, fd: int) -> None:
        self.fd: int | None = fd

    def release(self) -> None:
        """Give up this process's copy; the lease lives on while a child holds one."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def acquire(path: Path) -> FileLease | None:
    """Take the lease at `path`, or None when it is held by someone alive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        # gc removes lock files under their lock: one that is no longer at its path guards nothing.
        if is_at(fd, path):
            return FileLease(fd)
        os.close(fd)


def is_held(path: Path) -> bool:
    """Whether someone alive holds the lease."""
    if not path.exists():
        return False
    lease = acquire(path)
    if lease is None:
        return True
    lease.release()
    return False


def is_at(fd: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.fstat(fd).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
