"""A recipe is data: what would run code, read the environment or unfold without bound is refused.

Values may refer to others, as in `${data}/crawl`; that is all that a recipe can do.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from conf.mistakes import Mistake, RecipeError

MOST_BYTES = 1 << 20
MOST_NODES = 100_000
MOST_DEPTH = 50
_REFERENCE = re.compile(r"\$\{([^{}:]*)\}")
_SIGN = "${"
_PASSWORD = re.compile(r"\w://[^/\s@]*:[^/\s@]+@")
_ELSEWHERE = (
    "leave it out: keys of endpoints belong into the environment variable that key_variable names, those of "
    "S3 into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
)


def read_recipe(path: Path) -> str:
    """The text of a recipe's file.

    Raises RecipeError where it is longer than a recipe, unfolds to more or nests deeper than one, and
    what reading raises: OSError, UnicodeDecodeError, YAMLError.
    """
    if path.stat().st_size > MOST_BYTES:
        _refuse(path.name, f"has {path.stat().st_size} bytes, at most {MOST_BYTES} are read")
    text = path.read_text("utf-8")
    if found := _unfolding(text):
        _refuse(path.name, found)
    return text


def _refuse(place: str, found: str) -> None:
    raise RecipeError([Mistake(place, found, "write a recipe, and give data as files")])


def _unfolding(text: str) -> str | None:
    """Why a YAML text is too much, judged by its events alone: an alias counts as all it stands for."""
    import yaml

    sizes: dict[str, int] = {}
    open_anchors: list[tuple[str | None, int]] = []
    nodes = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        anchor = cast("str | None", getattr(event, "anchor", None))
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == name for name, _ in open_anchors):
                return f"*{anchor} stands within itself"
            nodes += sizes.get(str(anchor), 0)
        elif isinstance(event, yaml.NodeEvent):
            nodes += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_anchors.append((anchor, nodes - 1))
            elif anchor:
                sizes[anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            name, before = open_anchors.pop()
            if name:
                sizes[name] = nodes - before
        if nodes > MOST_NODES or len(open_anchors) > MOST_DEPTH:
            return f"has more than {MOST_NODES} values, or nests deeper than {MOST_DEPTH}"
    return None


def check_values(composed: dict[str, Any]) -> list[Mistake]:
    """What the values of a composed, unresolved recipe must not hold: secrets, and more than references."""
    mistakes = [
        Mistake(
            ".".join(place),
            "is an address with a password, and recipes are kept for all to read",
            _ELSEWHERE,
        )
        for place, text in _texts(composed, ())
        if _PASSWORD.search(text)
    ]
    return mistakes or _check_references(composed)


def _check_references(composed: dict[str, Any]) -> list[Mistake]:
    mend = (
        "a recipe reads neither the environment nor the clock; write ${NAME} of another value, or give "
        "the value on the command line as KEY=VALUE"
    )
    mistakes = [
        Mistake(".".join(place), f"{text[:80]!r} is more than references to other values", mend)
        for place, text in _texts(composed, ())
        # What is left of a call (`${oc.env:HOME}`) or of a reference within another one.
        if _SIGN in _REFERENCE.sub("", text)
    ]
    if mistakes:
        return mistakes
    try:
        _Sizes(composed).check()
    except (RecursionError, OverflowError):
        found = f"references lead in a circle, or unfold to more than {MOST_BYTES} characters"
        return [Mistake("recipe", found, "write the values themselves")]
    return []


def _texts(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict | list):
        for key, item in _items(value):
            yield from _texts(item, (*place, key))


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    found = enumerate(value) if isinstance(value, list) else value.items()
    return ((str(key), item) for key, item in found)


class _Sizes:
    """How many characters a value unfolds to, each place reckoned once."""

    def __init__(self, composed: dict[str, Any]) -> None:
        self._composed = composed
        self._known: dict[tuple[str, ...], int] = {}

    def check(self) -> None:
        """Raises OverflowError for too many, RecursionError for circles."""
        self._of(())

    def _of(self, place: tuple[str, ...]) -> int:
        if place not in self._known:
            value = self._at(place)
            if isinstance(value, dict | list):
                size = sum(self._of((*place, key)) for key, _ in _items(value))
            else:
                text = str(value)
                targets = [_target(place, found) for found in _REFERENCE.findall(text)]
                size = len(text) + sum(map(self._of, targets))
            if size > MOST_BYTES:
                raise OverflowError(size)
            self._known[place] = size
        return self._known[place]

    def _at(self, place: tuple[str, ...]) -> Any:
        """The value at a place; nothing where there is none, which composing tells."""
        value: Any = self._composed
        for key in place:
            value = dict(_items(value)).get(key) if isinstance(value, dict | list) else None
        return value


def _target(place: tuple[str, ...], reference: str) -> tuple[str, ...]:
    """Where a reference leads: `a.b[0]` from the top, `.a` beside it, `..a` beside what holds it."""
    name = reference.strip().lstrip(".")
    dots = len(reference.strip()) - len(name)
    start = place[: max(0, len(place) - dots)] if dots else ()
    return (*start, *filter(None, re.split(r"[.\[\]]+", name)))
