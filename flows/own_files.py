"""Files of a user's own, looked into before anything runs: else what they lack is told hours into a run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from conf.mistakes import Mistake
from storage.fetched import SCHEME
from storage.own_code import refuse_other_code
from storage.people_scores import people_scores
from storage.source import files_matching
from tasks.exams import read_own_tasks

if TYPE_CHECKING:
    from flows.graph import Node


def own_file_mistakes(node: "Node", base: Path) -> Iterator[Mistake]:
    """What is wrong with those that lie on this machine; `base` is where relative paths start from."""
    for setting, specs in node.sources if node.pin is None else ():
        for index, spec in enumerate(specs if setting in CHECKS else ()):
            if spec.node is not None or spec.path.startswith(SCHEME):
                continue
            _, paths = files_matching(spec.path, base)
            try:
                if paths:
                    CHECKS[setting](paths)
            except ValueError as error:
                found, _, mend = str(error).partition("; ")
                place = f"stages.{node.name}.{setting}[{index}]"
                yield Mistake(place, found, mend or "mend the file")


def _have(name: str, paths: Sequence[Path]) -> None:
    for path in paths:
        refuse_other_code(path, name)


def _are_tasks(paths: Sequence[Path]) -> None:
    for path in paths:
        for _ in read_own_tasks(path):
            pass


CHECKS: Mapping[str, Callable[[Sequence[Path]], object]] = {
    "functions": partial(_have, "score"),
    "truth_functions": partial(_have, "score"),
    "own_rules": partial(_have, "drops"),
    "people": people_scores,
    "own_tasks": _are_tasks,
}
"""Setting -> what raises ValueError for files that do not do."""
