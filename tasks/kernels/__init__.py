"""Compiled loops over text and hashes; imported late, since numba takes a third of a second.

numba keys what it compiled by the file of a function alone, and would go on with what an imported file
said before it changed. So its cache lies in a folder named after the content of all of them.

The loops use no linear algebra: numba does not get to look for scipy's, which would be half of the time that
a process needs to begin.
"""

# numba's modules carry no types that pyright could follow
# pyright: basic

import hashlib
import importlib
import os
from pathlib import Path
from typing import Any, cast

from numba.core import config as numba_config
from numba.np import linalg

FOLDER = Path(__file__).parent


def cache_folder(folder: Path = FOLDER) -> Path:
    """Where compiled code of exactly these sources is kept: beside them, or in the user's cache."""
    content = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    name = hashlib.sha256(content).hexdigest()[:16]
    if os.access(folder, os.W_OK):
        return folder / "__pycache__" / name
    return Path.home() / ".cache" / "bessemer" / "kernels" / name


def _load_without_blas() -> None:
    """Import the module of numba that asks for BLAS once, at import, and goes on without it."""

    def no_blas() -> None:
        raise ImportError

    asked, linalg.ensure_blas = linalg.ensure_blas, no_blas
    try:
        importlib.import_module("numba.np.arraymath")
    finally:
        linalg.ensure_blas = asked


_load_without_blas()
if "NUMBA_CACHE_DIR" not in os.environ:
    cast("Any", numba_config).CACHE_DIR = str(cache_folder())
