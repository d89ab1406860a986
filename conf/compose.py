"""From a recipe's file and the command line's overrides to one plain mapping; all of Hydra is here."""

import contextlib
import json
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, cast

from conf.mistakes import Mistake, RecipeError, suggest
from conf.plain import check_values, read_recipe

FOLDER = Path(__file__).parent
GROUPS = ("shape", "launch", "store")
"""Top-level keys that may name a file of the folder of the same name."""
RESERVED = ("data", "defaults", "fanout", "launch", "seed", "shape", "stages", "store")
"""Names that no node may have: a recipe's own keys."""
SHORT = {"store": "url", "fanout": "kind"}
"""Keys of which a plain value, as in `store=PATH`, sets one setting."""
PARTS = "recipe_parts"
LONGEST_SHOWN = 200
"""Characters of an argument, and of what is wrong with it, that an error repeats."""
_lock = threading.Lock()
"""Hydra's state is global to the process: unlocked, concurrent composes fail."""


def compose(recipe: str | Path, overrides: list[str]) -> dict[str, Any]:
    """The recipe with its defaults and overrides merged: data, store, fanout, shape, launch, seed,
    stages.

    `recipe` is a name under `conf/recipe/` or a path of a YAML file. Nodes are plain mappings with
    `uses`, `from` and settings; removed ones are absent. Raises RecipeError.
    """
    mapping, mistakes = compose_leniently(recipe, overrides)
    if mistakes:
        raise RecipeError(mistakes)
    return mapping


def compose_leniently(
    recipe: str | Path, overrides: list[str]
) -> tuple[dict[str, Any], list[Mistake]]:
    """As `compose`, but what can be understood is returned beside all mistakes found in the rest.

    Raises RecipeError where nothing can be understood: no such recipe, no YAML, a broken reference.
    """
    written = _Written()
    _read(_find(str(recipe), None), written)
    mistakes = written.mistakes
    chosen, edits = _sort_overrides(overrides, written, mistakes)
    merged = _merge(written, chosen, edits.hydra)
    for node, inputs in edits.replaced_inputs.items():
        merged["stages"].setdefault(node, {})["from"] = inputs
    for node, name, value in edits.inputs:
        place = merged["stages"].get(node)
        if isinstance(place, dict):
            place["from"] = {**_thawed(place.get("from") or {}), name: value}
    _tidy(merged, mistakes)
    return merged, mistakes


@dataclass
class _Written:
    """What the files of a recipe and of its parents say, in the order in which they are merged."""

    bodies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    choices: dict[str, str] = field(default_factory=dict[str, str])
    mistakes: list[Mistake] = field(default_factory=list[Mistake])

    @property
    def nodes(self) -> set[str]:
        return {name for body in self.bodies for name in (body.get("stages") or {})}


@dataclass
class _Edits:
    hydra: list[str] = field(default_factory=list[str])
    replaced_inputs: dict[str, Any] = field(default_factory=dict[str, Any])
    inputs: list[tuple[str, str, Any]] = field(default_factory=list[tuple[str, str, Any]])


def recipes() -> list[str]:
    """Names of the recipes that come with Bessemer."""
    return sorted(path.stem for path in (FOLDER / "recipe").glob("*.yaml"))


def choices_of(group: str) -> list[str]:
    """Names that a group (shape, launch, store) may be given."""
    return sorted(path.stem for path in (FOLDER / group).glob("*.yaml"))


def _find(recipe: str, beside: Path | None) -> Path:
    is_path = recipe.endswith((".yaml", ".yml")) or "/" in recipe
    places = [Path(recipe).expanduser()] if is_path else [FOLDER / "recipe" / f"{recipe}.yaml"]
    if beside:
        places.insert(0, beside.parent / (recipe if is_path else f"{recipe}.yaml"))
    for place in places:
        if place.is_file():
            return place.resolve()
    mend = "give the path of a YAML file" if is_path else suggest(recipe, recipes())
    raise RecipeError([Mistake(recipe, "there is no such recipe", mend)])


def _read(path: Path, written: _Written, above: tuple[Path, ...] = ()) -> None:
    """Append the bodies of a recipe's parents and its own; an outer recipe's choices win."""
    if path in above:
        chain = " -> ".join(place.stem for place in (*above, path))
        raise RecipeError(
            [Mistake("defaults", f"recipes name one another: {chain}", "remove one of them")]
        )
    body = _load(path)
    defaults = body.pop("defaults", None) or []
    if not isinstance(defaults, list):
        raise RecipeError([Mistake("defaults", f"{defaults!r} is not a list", "write [standard]")])
    if "_self_" not in defaults:
        defaults = [*defaults, "_self_"]
    named = {group: body.pop(group) for group in GROUPS if body.get(group) in choices_of(group)}
    choices: dict[str, str] = {}
    for entry in cast("list[Any]", defaults):
        if entry == "_self_":
            written.bodies.append(_frozen(body))
        elif isinstance(entry, str):
            _read(_find(entry, path), written, (*above, path))
        elif isinstance(entry, dict):
            choices.update(_checked_choices(cast("dict[Any, Any]", entry), written.mistakes))
        else:
            written.mistakes.append(
                Mistake("defaults", f"{entry!r} is no default", "name a recipe or {group: choice}")
            )
    written.choices |= choices | named


def _load(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        loaded = OmegaConf.load(StringIO(read_recipe(path)))
        body = OmegaConf.to_container(loaded, resolve=False)
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(
            [Mistake(path.name, f"is not readable as YAML: {error}", "mend the file")]
        ) from error
    if not isinstance(body, dict):
        raise RecipeError([Mistake(path.name, "is not a mapping", "write `stages:` and nodes")])
    for name, node in _nodes_of(cast("dict[str, Any]", body), path.name).items():
        if node is not None and not isinstance(node, dict):
            raise RecipeError(
                [Mistake(f"stages.{name}", f"{node!r} is no node", "write a mapping, or null")]
            )
    return cast("dict[str, Any]", body)


def _nodes_of(body: dict[str, Any], place: str) -> dict[str, Any]:
    nodes = body.get("stages") or {}
    if not isinstance(nodes, dict):
        raise RecipeError(
            [Mistake(f"{place}: stages", f"{nodes!r} is no mapping", "write NAME: {settings}")]
        )
    return cast("dict[str, Any]", nodes)


def _checked_choices(entry: dict[Any, Any], mistakes: list[Mistake]) -> Iterator[tuple[str, str]]:
    for group, choice in entry.items():
        if group not in GROUPS:
            mistakes.append(Mistake(f"defaults.{group}", "unknown group", suggest(group, GROUPS)))
        elif choice not in choices_of(group):
            mend = suggest(str(choice), choices_of(group))
            mistakes.append(Mistake(f"defaults.{group}", f"there is no {group} {choice!r}", mend))
        else:
            yield group, choice


def _frozen(body: dict[str, Any]) -> dict[str, Any]:
    """The body with each `from` as text: text replaces where a mapping would merge."""
    stages = {
        name: {**node, "from": json.dumps(node["from"])}
        if isinstance(node, dict) and "from" in node
        else node
        for name, node in (body.get("stages") or {}).items()
    }
    short = {key: {SHORT[key]: body[key]} for key in SHORT if isinstance(body.get(key), str)}
    return {**body, **short, "stages": stages}


def _thawed(value: Any) -> Any:
    return (
        json.loads(value) if isinstance(value, str) and value.startswith(("{", "[", '"')) else value
    )


def _sort_overrides(
    overrides: list[str], written: _Written, mistakes: list[Mistake]
) -> tuple[dict[str, str], _Edits]:
    """What the command line chooses of the groups, and what it changes in the recipe."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    chosen, edits = dict(written.choices), _Edits()
    parser = OverridesParser.create()
    for text in overrides:
        try:
            parsed = parser.parse_override(text)
        except (HydraException, RecursionError) as error:
            found = f"is no override ({str(error).splitlines()[0][:LONGEST_SHOWN]})"
            mend = "write key=value, such as dedup.threshold=0.7"
            mistakes.append(Mistake(text[:LONGEST_SHOWN], found, mend))
            continue
        if parsed.is_sweep_override():
            mend = "give one value, or a list as [a,b]"
            mistakes.append(Mistake(text, "is a sweep over several values", mend))
            continue
        key = parsed.key_or_group.removeprefix("stages.")
        head, _, rest = key.partition(".")
        value = parsed.value()
        raw = None if parsed.is_delete() else text.split("=", 1)[1]
        if head in GROUPS and not rest and value in choices_of(head):
            chosen[head] = cast("str", value)
        elif head in ("shape", "launch") and not rest and not isinstance(value, dict):
            found = f"there is no {head} {value!r}"
            mistakes.append(Mistake(text, found, suggest(str(value), choices_of(head))))
        elif head in RESERVED and head not in ("stages", "defaults"):
            # A plain `store=` would be taken for the name of a file of `conf/store/`.
            is_short = key in SHORT and not isinstance(value, dict)
            edits.hydra.append(_assignment(f"{key}.{SHORT[key]}" if is_short else key, raw))
        elif head not in written.nodes:
            known = (written.nodes | set(RESERVED)) - {"stages", "defaults"}
            mistakes.append(Mistake(text, f"no node is called {head!r}", suggest(head, known)))
        elif rest == "from":
            edits.replaced_inputs[head] = value
        elif rest.startswith("from."):
            edits.inputs.append((head, rest.removeprefix("from."), value))
        else:
            edits.hydra.append(_assignment(f"stages.{key}", raw))
    return chosen, edits


def _assignment(key: str, raw: str | None) -> str:
    return f"++{key}={'null' if raw is None else raw}"


def _merge(written: _Written, chosen: dict[str, str], overrides: list[str]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    defaults: list[Any] = ["_self_"]
    defaults += [{f"/{group}@{group}": choice} for group, choice in chosen.items()]
    defaults += [f"/{PARTS}/part{index}" for index in range(len(written.bodies))]
    primary: dict[str, Any] = {"defaults": defaults, "data": None, "stages": {}}
    try:
        with _lock, _hydra(primary, written.bodies):
            merged = hydra_compose("primary", overrides=overrides)
        raw = cast("dict[str, Any]", OmegaConf.to_container(merged))
        if mistakes := check_values(raw):
            raise RecipeError(mistakes)
        if "${data}" in str(raw) and merged.data is None:
            mend = "say where the files are: data=DIR"
            raise RecipeError([Mistake("data", "the recipe reads ${data}, which is not set", mend)])
        return cast("dict[str, Any]", OmegaConf.to_container(merged, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        found = str(error).strip().splitlines()[0]
        mend = "mend the reference or the value"
        raise RecipeError([Mistake("recipe", f"cannot be composed: {found}", mend)]) from error


@contextlib.contextmanager
def _hydra(primary: dict[str, Any], bodies: list[dict[str, Any]]) -> Generator[None]:
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    # An application that embeds us may have Hydra set up for itself: put it back as it was.
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    store = ConfigStore.instance()
    store.store(name="primary", node=primary, package="_global_")
    for index, body in enumerate(bodies):
        store.store(group=PARTS, name=f"part{index}", node=body, package="_global_")
    try:
        with initialize_config_dir(str(FOLDER), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = outer


def _tidy(merged: dict[str, Any], mistakes: list[Mistake]) -> None:
    """Drop removed nodes and turn each `from` back into a mapping; note what is out of place."""
    for key in [key for key in merged if key not in RESERVED]:
        mend = suggest(key, RESERVED)
        mistakes.append(
            Mistake(key, "unknown key of a recipe", f"{mend} Nodes stand under `stages`")
        )
        del merged[key]
    stages = {name: node for name, node in merged["stages"].items() if node is not None}
    for name in list(stages):
        node = stages[name]
        if name in RESERVED:
            mend = "give the node another name and say `uses: STAGE`"
            mistakes.append(Mistake(f"stages.{name}", "is a reserved name", mend))
            del stages[name]
        elif not _is_name(name):
            mend = "use letters, digits and _, not a number alone"
            mistakes.append(Mistake(f"stages.{name}", "is no name for a node", mend))
            del stages[name]
        elif "from" in node:
            node["from"] = _thawed(node["from"])
    merged["stages"] = stages


def _is_name(key: object) -> bool:
    return isinstance(key, str) and key.isascii() and key.replace("_", "").isalnum()
