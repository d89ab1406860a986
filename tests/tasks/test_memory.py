"""Memory: the limit of a group counts, and arrays beyond the bound lie on disk."""

from pathlib import Path

import numpy as np
import pytest

from tasks.memory import Scratch, _group_limits  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("0::/a/b", "a/memory.max"),
        ("6:cpu:/x\n4:memory:/a/b", "memory/a/memory.limit_in_bytes"),
        ("0::/not/mounted", "memory.max"),
    ],
)
def test_the_limit_of_an_outer_group_holds(tmp_path: Path, line: str, file: str) -> None:
    place = tmp_path / file
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("1048576\n")
    membership = tmp_path / "cgroup"
    membership.write_text(line + "\n")
    assert _group_limits(tmp_path, membership) == [1_048_576]
    place.write_text("max\n")
    assert _group_limits(tmp_path, membership) == []


def test_arrays_beyond_the_bound_lie_in_files_without_a_name(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, memory_mb=1)
    first, second = scratch.empty((100, 1000), np.int64), scratch.empty((1000, 100), np.int64)
    assert first.flags.owndata
    assert second.flags.writeable
    assert not second.flags.owndata
    second[:] = 7
    assert second.sum() == 700_000
    assert list(tmp_path.iterdir()) == []
