"""A lease is held by whoever holds a copy of its descriptor, and by nobody else."""

import os
import subprocess
import sys
from pathlib import Path

from storage.lease import acquire, is_held


def test_a_lease_is_held_once(tmp_path: Path) -> None:
    path = tmp_path / "leases" / "x.lock"
    assert not is_held(path)
    lease = acquire(path)
    assert lease is not None
    assert acquire(path) is None
    assert is_held(path)
    lease.release()
    lease.release()
    assert not is_held(path)


def test_a_child_that_inherits_it_keeps_it_after_us(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    lease = acquire(path)
    assert lease is not None
    assert lease.fd is not None
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lease.fd]
    )
    lease.release()
    assert is_held(path)
    child.kill()
    child.wait()
    assert not is_held(path)


def test_other_children_do_not_hold_it(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    lease = acquire(path)
    assert lease is not None
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lease.release()
    assert not is_held(path)
    child.kill()
    child.wait()


def test_it_is_free_after_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    code = (
        "import sys; from pathlib import Path; from storage.lease import acquire\n"
        "lease = acquire(Path(sys.argv[1])); print('held', flush=True); input()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    assert is_held(path)
    child.kill()
    child.wait()
    assert not is_held(path)


def test_a_lock_file_that_was_removed_guards_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    old = acquire(path)
    assert old is not None
    path.unlink()
    new = acquire(path)
    assert new is not None
    assert new.fd is not None
    assert os.fstat(new.fd).st_ino == path.stat().st_ino
    new.release()
    old.release()
