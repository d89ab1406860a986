"""Places that a home watches for new data: a file of the home, which the service of `flows/watch.py` reads."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from flows.arrivals import Wholeness
from flows.graph import load_graph
from flows.runs import FileLock, Home
from storage.fetched import SCHEME
from storage.store_local import write_atomically


class Watch(BaseModel):
    """A place, and the run that new content there starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    place: str
    """A folder, absolute, or `s3://bucket/prefix`."""
    recipe: str
    overrides: list[str] = Field(default_factory=list[str])
    is_extension: bool = False
    """Whether the run goes on from the newest complete one (`--extend`); else all is rebuilt that the
    new files change."""
    wholeness: Wholeness = "stable"
    settle_seconds: float = Field(default=10.0, ge=0)
    """How long a file must not have changed; of `stable` alone."""


_WATCHES = TypeAdapter(list[Watch])


def watches(home: Home) -> list[Watch]:
    """What is to be watched."""
    try:
        return _WATCHES.validate_json(_file(home).read_bytes())
    except FileNotFoundError:
        return []


def add_watch(home: Home, watch: Watch, base: Path) -> None:
    """Note a watch, in place of one of the same place and recipe.

    `base` is the folder that relative paths of the recipe start from. Raises RecipeError for a recipe
    that is not sound, ValueError for a folder that is not there.
    """
    load_graph(watch.recipe, watch.overrides, base=base)
    if not watch.place.startswith(SCHEME) and not Path(watch.place).is_dir():
        raise ValueError(f"{watch.place}: no such folder; make it, or name another")
    with FileLock(_file(home).with_suffix(".lock")):
        others = [w for w in watches(home) if (w.place, w.recipe) != (watch.place, watch.recipe)]
        write_atomically(_file(home), _WATCHES.dump_json([*others, watch], indent=1))


def remove_watches(home: Home, place: str) -> int:
    """Watch a place no longer; how many watches of it there were."""
    with FileLock(_file(home).with_suffix(".lock")):
        known = watches(home)
        left = [watch for watch in known if watch.place != place]
        write_atomically(_file(home), _WATCHES.dump_json(left, indent=1))
    return len(known) - len(left)


def _file(home: Home) -> Path:
    return home.path / "watches.json"
