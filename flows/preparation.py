"""From what was asked to a run that may start: names become fingerprints, nothing is left to choose."""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from conf.launch import LaunchConfig
from conf.mistakes import Mistake, RecipeError
from conf.settings import Settings
from flows.execution import Execution, workers_of
from flows.graph import REFERENCE, Graph, build_graph, check_selection, load_graph
from flows.lookup import Lookup
from flows.runs import Home, RunRecord, find_artifact
from storage.record import Record
from storage.source import HashCache, resolve
from storage.store import Store
from tasks.launch import check_host

CARRIED_INPUT = "pinned"
"""Optional input of a stage: its own earlier result, whose statistics it goes on using."""


PARTS = ("corpus", "pretraining", "alignment", "evaluation")
"""The four flows; each node of a graph belongs to one."""


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    recipe: str
    overrides: list[str] = field(default_factory=list[str])
    start: str | None = None
    """--from: what is above must be there, it and all below are built anew."""
    until: str | None = None
    only: str | None = None
    force: tuple[str, ...] = ()
    is_extension: bool = False
    part: str | None = None
    """One of the four flows: its nodes and what they need; all when None."""

    @property
    def options(self) -> dict[str, Any]:
        """The options by the names that the command line has for them."""
        return {
            "from": self.start,
            "until": self.until,
            "only": self.only,
            "force": list(self.force),
            "extend": self.is_extension,
            **({"part": self.part} if self.part else {}),
        }


def prepare(
    request: Request, home: Home, *, base: Path, run_id: str | None = None, appends: bool = True
) -> Execution:
    """Check everything and fix what the run will do; nothing is started or written.

    Raises RecipeError with all that is wrong.
    """
    graph = load_graph(request.recipe, request.overrides, base=base)
    chosen = [name for name in (request.start, request.until, request.only) if name]
    check_selection(graph, {"from/--until/--only": chosen, "force": request.force})
    store = home.store(graph.composed)
    hashes = HashCache(home.path / "hashes.sqlite")
    written = copy.deepcopy(dict(graph.composed))
    frozen = _named_artifacts(graph, home, store)
    if request.is_extension:
        frozen |= _carried_on(graph, written, home, base, hashes)
    if frozen:
        graph = build_graph(graph.recipe, _with(written, frozen), base=base)
    record = RunRecord(
        run_id=run_id or home.new_run_id(),
        recipe=graph.recipe,
        recipe_path=request.recipe,
        overrides=request.overrides,
        options=request.options,
        composed=written,
        frozen=frozen,
    )
    selected = _selected(graph, request)
    must_hit, forced = _bound(graph, request)
    lookup = Lookup(graph, store, base, hashes, appends=appends)
    execution = Execution(
        graph, home, record, lookup, forced, must_hit, tuple(selected), workers_of()
    )
    if must_hit:
        _check_hits(execution, base)
    _check_surroundings(execution, base, is_run=appends)
    return execution


def _selected(graph: Graph, request: Request) -> list[str]:
    wanted = set(graph.nodes)
    if request.part:
        of_part = [name for name, node in graph.nodes.items() if node.flow == request.part]
        if not of_part:
            found = f"no node of {graph.recipe} belongs to {request.part}"
            raise RecipeError([Mistake("part", found, "choose another part, or full")])
        wanted &= graph.ancestors(of_part)
    if request.until:
        wanted &= graph.ancestors([request.until])
    if request.only:
        wanted &= graph.ancestors([request.only])
    if request.start and request.start not in wanted:
        raise RecipeError(
            [
                Mistake(
                    f"--from {request.start}",
                    f"is not among what {request.until or request.only or request.part} needs",
                    "name a node above it, or leave one of the two out",
                )
            ]
        )
    return [name for name in graph.nodes if name in wanted]


def _bound(graph: Graph, request: Request) -> tuple[frozenset[str], frozenset[str]]:
    """Nodes that have to be in the store, and nodes that are built whatever is there."""
    forced = set(request.force)
    must_hit: set[str] = set()
    if request.start:
        below = graph.descendants([request.start])
        forced |= below
        must_hit |= graph.ancestors(below) - below
    if request.only:
        must_hit |= graph.ancestors([request.only]) - {request.only}
    return frozenset(must_hit), frozenset(forced - must_hit)


def _check_hits(execution: Execution, base: Path) -> None:
    """Raises RecipeError for every node that --from or --only takes for granted and is missing."""
    lookup = Lookup(execution.graph, execution.lookup.store, base, execution.lookup.hashes, False)
    mistakes: list[Mistake] = []
    for name in execution.graph.nodes:
        if name not in execution.must_hit:
            continue
        if not find(lookup, name):
            mistakes.append(
                Mistake(name, "is not in the store", "run it first, or leave out --from and --only")
            )
    if mistakes:
        raise RecipeError(mistakes)


def _check_surroundings(execution: Execution, base: Path, *, is_run: bool) -> None:
    """Raises RecipeError for every node that is to be built and whose endpoint's key is not there or, in a
    run, for which this host lacks something: else that is told when its stage begins, hours later."""
    nodes = execution.graph.nodes
    lacking = {
        name: found
        for name in execution.selected
        if nodes[name].pin is None and (found := [*_lacks(nodes[name].settings, name, is_run)])
    }
    if not lacking:
        return
    lookup = Lookup(execution.graph, execution.lookup.store, base, execution.lookup.hashes, False)
    built = {name for name in execution.selected if not find(lookup, name)} | execution.forced
    if mistakes := [mistake for name in lacking if name in built for mistake in lacking[name]]:
        raise RecipeError(mistakes)


def _lacks(settings: Settings, name: str, is_run: bool) -> Iterator[Mistake]:
    yield from _unset_keys(settings, name)
    launch = getattr(settings, "launch", None)
    if is_run and isinstance(launch, LaunchConfig):
        try:
            check_host(launch)
        except ValueError as error:
            found, _, mend = str(error).rpartition("; ")
            yield Mistake(f"stages.{name}.launch", found, mend)


def _unset_keys(settings: Settings, place: str) -> Iterator[Mistake]:
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            yield from _unset_keys(value, f"{place}.{name}")
        elif name == "key_variable" and value and not os.environ.get(value):
            found = f"the environment variable {value} is not set"
            mend = "export the endpoint's key in it, or set key_variable to null for one without"
            yield Mistake(f"stages.{place}.{name}", found, mend)


def find(lookup: Lookup, name: str) -> bool:
    """Take a node's artifact from the store into the lookup; whether it is there."""
    try:
        return lookup.find(name) is not None
    except ValueError as error:
        raise RecipeError([Mistake(f"stages.{name}", str(error), "see above")]) from error


def _named_artifacts(graph: Graph, home: Home, store: Store) -> dict[str, str]:
    """Place in the recipe -> fingerprint, for each pin and each input that names an artifact."""
    frozen: dict[str, str] = {}
    mistakes: list[Mistake] = []
    for place, name, kinds in _names(graph):
        try:
            record = find_artifact(name, home, store)
        except ValueError as error:
            mistakes.append(Mistake(f"stages.{place}", str(error), "name one that is stored"))
            continue
        if record.kind not in kinds:
            found = f"{name} is a {record.kind}, a {' or '.join(kinds)} is needed"
            mistakes.append(Mistake(f"stages.{place}", found, "name another artifact"))
        frozen[place] = record.fingerprint
    if mistakes:
        raise RecipeError(mistakes)
    return frozen


def _names(graph: Graph) -> Iterator[tuple[str, str, list[str]]]:
    for node in graph.nodes.values():
        if node.pin is not None:
            yield f"{node.name}.pin", node.pin, [node.spec.output.kind]
            continue
        for link, target in node.links:
            if target.startswith(REFERENCE):
                kinds = [kind.kind for kind in node.spec.inputs[link.split(".")[0]].kinds]
                yield f"{node.name}.from.{link}", target.removeprefix(REFERENCE), kinds


def _with(written: Mapping[str, Any], frozen: Mapping[str, str]) -> dict[str, Any]:
    """The recipe with fingerprints in the places where names stood."""
    composed = copy.deepcopy(dict(written))
    for place, fingerprint in frozen.items():
        node, *path = place.split(".")
        holder = cast("dict[str, Any]", composed["stages"][node])
        for key in path[:-1]:
            holder = cast("dict[str, Any]", holder.setdefault(key, {}))
        holder[path[-1]] = fingerprint if path == ["pin"] else f"{REFERENCE}{fingerprint}"
    return composed


def _carried_on(
    graph: Graph, written: Mapping[str, Any], home: Home, base: Path, hashes: HashCache
) -> dict[str, str]:
    """--extend: the newest complete run's vocabulary and statistics, and its pretrained model.

    A second extension of the same sources is the same run: it keeps what the first one froze.
    """
    newest = home.newest(graph.recipe, is_complete=True)
    if newest is None:
        found = f"no run of {graph.recipe} is complete"
        mend = "run it once without --extend"
        raise RecipeError([Mistake("--extend", found, mend)])
    is_repeat = newest.options.get("extend") and newest.composed == written
    if is_repeat and _has_same_files(graph, newest, base, hashes):
        return {
            place: f for place, f in newest.frozen.items() if place.split(".")[0] in graph.nodes
        }
    frozen: dict[str, str] = {}
    for name, node in graph.nodes.items():
        done = newest.stages.get(name)
        if node.pin is not None or done is None or done.fingerprint is None:
            continue
        takes = node.spec.inputs
        if node.spec.output.kind == "tokenizer":
            frozen[f"{name}.pin"] = done.fingerprint
        elif CARRIED_INPUT in takes and CARRIED_INPUT not in node.inputs:
            frozen[f"{name}.from.{CARRIED_INPUT}"] = done.fingerprint
        elif node.flow == "pretraining" and "policy" in takes and "policy" not in node.inputs:
            frozen[f"{name}.from.policy"] = done.fingerprint
    return frozen


def _has_same_files(graph: Graph, newest: RunRecord, base: Path, hashes: HashCache) -> bool:
    """Whether the outside files are those that a run read; files of nodes follow from the rest."""
    for name, node in graph.nodes.items():
        for setting, specs in node.sources:
            outside = {index: spec for index, spec in enumerate(specs) if spec.node is None}
            then = newest.stages[name].sources.get(setting, []) if name in newest.stages else []
            before = [file for landing in then for file in landing if file[-1] in outside]
            found = [
                [*file.key[:-1], index]
                for index, spec in outside.items()
                for file in resolve(
                    [spec], artifacts={}, base=base, ledger=None, hashes=hashes
                ).files
            ]
            if sorted(map(str, found)) != sorted(map(str, before)):
                return False
    return True


def nearest(store: Store, stage: str, node: str) -> list[Record]:
    """Artifacts of a stage, those of the node first, newest first."""
    found = [record for record in store.records() if record.stage == stage]
    found.sort(key=lambda record: record.created, reverse=True)
    return sorted(found, key=lambda record: record.node != node)
