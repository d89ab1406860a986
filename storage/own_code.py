"""Functions in a user's own file, which a recipe names and whose content enters identity."""

import math
from collections.abc import Callable, Mapping, Sequence
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


def own_scores(paths: Sequence[Path]) -> Callable[[Mapping[str, Any]], float]:
    """The sum of what the functions `score(answer)` of users' files give an answer.

    Raises ValueError, as does the sum for what is no finite number.
    """
    shape = "`def score(answer) -> float`, given a dict with text, is_ended, messages, reference"
    functions = [(path, own_function(path, "score", shape)) for path in paths]

    def score(path: Path, function: Callable[..., Any], answer: Mapping[str, Any]) -> float:
        value = function(dict(answer))
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(
                f"{path}: score gave {value!r} for the answer {answer['text'][:80]!r}; it must be a finite number"
            )
        return float(value)

    return lambda answer: sum(score(*one, answer) for one in functions)
