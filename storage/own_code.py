"""Functions in a user's own file, which a recipe names and whose content enters identity."""

import ast
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SHAPES = {
    "score": "`def score(answer) -> float`, given a dict with text, is_ended, messages, reference",
    "drops": "`def drops(document) -> bool`, given a dict with text, url, source, domain, language",
}
"""What a file has to have, by the name of its function."""


def own_function(path: Path, name: str) -> Callable[..., Any]:
    """The function `name` (of SHAPES) of a file of Python. Raises ValueError where the file has none."""
    names: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    # The file is the user's own, named in the recipe, and enters identity by its content.
    exec(compile(path.read_text("utf-8"), str(path), "exec"), names)
    if not callable(function := names.get(name)):
        raise _lacking(path, name)
    return function


def refuse_other_code(path: Path, name: str) -> None:
    """Raises ValueError for a file that is no Python, or in which nothing has that name; nothing of it is run."""
    try:
        tree = ast.parse(path.read_text("utf-8"), str(path))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is no Python ({error}); it needs {SHAPES[name]}") from error
    if not {name, "*"} & {*_names_given(tree)}:
        raise _lacking(path, name)


def _names_given(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.alias(name=name, asname=other):
                yield other or name
            case _:
                pass


def _lacking(path: Path, name: str) -> ValueError:
    return ValueError(f"{path} has no function `{name}`; it needs {SHAPES[name]}")


def own_scores(paths: Sequence[Path]) -> Callable[[Mapping[str, Any]], float]:
    """The sum of what the functions `score(answer)` of users' files give an answer.

    Raises ValueError, as does the sum for what is no finite number.
    """
    functions = [(path, own_function(path, "score")) for path in paths]

    def score(path: Path, function: Callable[..., Any], answer: Mapping[str, Any]) -> float:
        value = function(dict(answer))
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(
                f"{path}: score gave {value!r} for the answer {answer['text'][:80]!r}; it must be a finite number"
            )
        return float(value)

    return lambda answer: sum(score(*one, answer) for one in functions)
