"""Functions in a user's own file, which a recipe names and whose content enters identity."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def own_function(path: Path, name: str, shape: str) -> Callable[..., Any]:
    """The function `name` of a file of Python; `shape` says what it takes and gives.

    Raises ValueError where the file has none.
    """
    names: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    # The file is the user's own, named in the recipe, and enters identity by its content.
    exec(compile(path.read_text("utf-8"), str(path), "exec"), names)
    if not callable(function := names.get(name)):
        raise ValueError(f"{path} has no function `{name}`; it needs {shape}")
    return function
