"""From a composed recipe to a typed graph of nodes; every mistake is found before anything runs."""

import glob
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from conf.compose import compose_leniently
from conf.fanout import LOCAL, FanoutConfig
from conf.launch import DEEPSPEED_ENGINES, LaunchConfig
from conf.mistakes import Mistake, RecipeError, suggest
from conf.settings import Settings, SourceSpec
from flows.fitting import disagreements
from flows.own_files import own_file_mistakes
from storage.artifact import Artifact
from storage.fetched import SCHEME
from tasks import stage as registry
from tasks.stage import InputSpec, StageSpec

REFERENCE = "artifact:"
"""Start of an input that is an existing artifact rather than a node: `artifact:RUN:NODE`."""
NODE_KEYS = ("uses", "from", "pin")

Link = str | dict[str, str]


@dataclass(frozen=True)
class Node:
    """One stage of a recipe with its settings and what it reads."""

    name: str
    spec: StageSpec
    settings: Settings
    inputs: Mapping[str, Link]
    """Input name -> node name (or `artifact:...`), or a map of such for an input that takes several."""
    pin: str | None = None
    """An existing artifact that is taken instead of running the stage."""

    @property
    def links(self) -> Iterator[tuple[str, str]]:
        """Every (input, node name or `artifact:...`) that it reads."""
        for name, link in self.inputs.items():
            if isinstance(link, str):
                yield name, link
            else:
                yield from ((f"{name}.{key}", target) for key, target in link.items())

    @property
    def sources(self) -> Iterator[tuple[str, tuple[SourceSpec, ...]]]:
        """Every setting that names outside files."""
        return self.settings.source_fields()

    @property
    def upstream(self) -> list[str]:
        """Names of the nodes it waits for; none for a pinned one."""
        if self.pin is not None:
            return []
        linked = [target for _, target in self.links if not target.startswith(REFERENCE)]
        files = [spec.node for _, specs in self.sources for spec in specs if spec.node]
        return list(dict.fromkeys([*linked, *files]))

    @property
    def flow(self) -> str:
        """Which of the four flows it belongs to, by what it makes out of what."""
        match self.spec.output.kind:
            case "world" | "corpus" | "tokenizer" | "tokens":
                return "corpus"
            case "scores" | "export":
                return "evaluation"
            case "policy" if "tokens" in self.spec.inputs:
                return "pretraining"
            case _:
                return "alignment"


@dataclass(frozen=True)
class Graph:
    """A recipe that was found sound: nodes in an order in which each follows what it reads."""

    recipe: str
    nodes: Mapping[str, Node]
    composed: Mapping[str, Any]
    """The recipe as plain data, with nothing left to choose."""
    fanout: FanoutConfig = LOCAL
    """Who builds shards."""

    def ancestors(self, names: Iterable[str]) -> set[str]:
        """The given nodes and all that they depend on."""
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            if (name := waiting.pop()) not in found:
                found.add(name)
                waiting += self.nodes[name].upstream
        return found

    def descendants(self, names: Iterable[str]) -> set[str]:
        """The given nodes and all that depends on them."""
        found = set(names)
        for name, node in self.nodes.items():
            if found & set(node.upstream):
                found.add(name)
        return found


def load_graph(recipe: str, overrides: list[str], *, base: Path) -> Graph:
    """Compose a recipe and build its graph. Raises RecipeError with everything that is wrong.

    `base` is the folder that relative paths of sources start from.
    """
    composed, mistakes = compose_leniently(recipe, overrides)
    graph, more = _build(Path(recipe).stem, composed, base)
    # One slip may be found twice: by its text, and by what it led to.
    if found := list(dict.fromkeys([*mistakes, *more])):
        raise RecipeError(found)
    return graph


def build_graph(recipe: str, composed: Mapping[str, Any], *, base: Path) -> Graph:
    """The graph of a composed recipe. Raises RecipeError with everything that is wrong."""
    graph, mistakes = _build(recipe, composed, base)
    if mistakes:
        raise RecipeError(mistakes)
    return graph


def check_selection(graph: Graph, arguments: Mapping[str, Iterable[str]]) -> None:
    """Raises RecipeError for an option that names a node which the graph does not have."""
    mistakes = [
        Mistake(f"--{option} {name}", "there is no such node", suggest(name, graph.nodes))
        for option, names in arguments.items()
        for name in names
        if name not in graph.nodes
    ]
    if mistakes:
        raise RecipeError(mistakes)


def _build(recipe: str, composed: Mapping[str, Any], base: Path) -> tuple[Graph, list[Mistake]]:
    mistakes: list[Mistake] = []
    written = cast("dict[str, dict[str, Any]]", composed.get("stages") or {})
    if not written:
        mistakes.append(Mistake("stages", "the recipe has no node", "add nodes under `stages`"))
    fanout = _fanout(composed, mistakes)
    nodes: dict[str, Node] = {}
    for name, body in written.items():
        if node := _node(name, body, composed, mistakes):
            nodes[name] = node
    for node in nodes.values():
        mistakes += _input_mistakes(node, nodes, written)
        mistakes += _source_mistakes(node, written, base)
        mistakes += own_file_mistakes(node, base)
    order = _in_order(nodes, mistakes)
    if not any("cycle" in mistake.found for mistake in mistakes):
        mistakes += disagreements(order)
    return Graph(recipe, order, composed, fanout), mistakes


def _fanout(composed: Mapping[str, Any], mistakes: list[Mistake]) -> FanoutConfig:
    try:
        return FanoutConfig.model_validate(composed.get("fanout") or {})
    except ValidationError as error:
        for found in error.errors():
            place = ".".join(["fanout", *map(str, found["loc"])])
            mend = "say local, dask or ray, and fanout.address for a cluster"
            mistakes.append(Mistake(place, f"{found['input']!r}: {found['msg']}", mend))
        return LOCAL


def _node(
    name: str, body: dict[str, Any], composed: Mapping[str, Any], mistakes: list[Mistake]
) -> Node | None:
    place = f"stages.{name}"
    stages = registry.stages()
    uses = body.get("uses", name)
    if uses not in stages:
        known = suggest(str(uses), stages)
        mend = known if "uses" in body else f"{known} (a node of another name says `uses: STAGE`)"
        mistakes.append(Mistake(place, f"there is no stage {uses!r}", mend))
        return None
    spec = stages[str(uses)]
    inputs: Any = body.get("from") or {}
    if not isinstance(inputs, dict):
        mend = f"write from: {{{', '.join(f'{key}: NODE' for key in spec.inputs)}}}"
        mistakes.append(Mistake(f"{place}.from", f"{inputs!r} is no mapping", mend))
        inputs = {}
    pin = body.get("pin")
    if pin is not None and not isinstance(pin, str):
        mistakes.append(
            Mistake(f"{place}.pin", f"{pin!r} is no artifact", "give RUN:NODE or a fingerprint")
        )
        pin = None
    settings = _settings(name, spec, body, composed, mistakes)
    if settings is None:
        return None
    return Node(name, spec, settings, _links(f"{place}.from", inputs, mistakes), pin)


def _links(place: str, inputs: dict[str, Any], mistakes: list[Mistake]) -> dict[str, Link]:
    """The inputs as written; one that is no name becomes a reference that nothing looks at."""
    links: dict[str, Link] = {}
    for name, value in inputs.items():
        targets = value.values() if isinstance(value, dict) else [value]
        wrong = [target for target in targets if not isinstance(target, str)]
        if wrong:
            mistakes.append(
                Mistake(f"{place}.{name}", f"{wrong[0]!r} is no node", "give a node's name")
            )
        is_map = isinstance(value, dict)
        refused: Link = {"": REFERENCE} if is_map else REFERENCE
        links[name] = refused if wrong else cast("Link", value)
    return links


def _settings(
    name: str,
    spec: StageSpec,
    body: Mapping[str, Any],
    composed: Mapping[str, Any],
    mistakes: list[Mistake],
) -> Settings | None:
    values = {key: value for key, value in body.items() if key not in NODE_KEYS}
    fields = spec.settings.model_fields
    if "seed" in fields and composed.get("seed") is not None:
        values.setdefault("seed", composed["seed"])
    for group in ("shape", "launch"):
        shared = composed.get(group)
        own = values.get(group)
        if group in fields and isinstance(shared, dict) and isinstance(own, dict | None):
            values[group] = {**cast("dict[str, Any]", shared), **(own or {})}
    try:
        settings = spec.settings.model_validate(values)
    except ValidationError as error:
        mistakes += [_settings_mistake(name, spec.settings, dict(e)) for e in error.errors()]
        return None
    mistakes += _value_mistakes(name, settings)
    return settings


def _settings_mistake(node: str, settings: type[Settings], error: dict[str, Any]) -> Mistake:
    """One error of the settings class, in words."""
    location = [str(part) for part in error["loc"]]
    place = ".".join(["stages", node, *location])
    value = error["input"]
    match error["type"]:
        case "extra_forbidden":
            owner = _owner(settings, location[:-1])
            known = [*owner.model_fields, *(NODE_KEYS if owner is settings else ())]
            return Mistake(place, "unknown key", suggest(location[-1], known))
        case "missing":
            return Mistake(place, "is missing", "give it a value; it has no default")
        case "value_error" if isinstance(value, dict):
            return Mistake(place, str(error["ctx"]["error"]), "change one of them")
        case "value_error":
            return Mistake(place, f"{value!r}: {error['ctx']['error']}", "change the value")
        case _:
            message = str(error["msg"])
            return Mistake(place, f"{value!r} is refused", message[0].lower() + message[1:])


def _owner(settings: type[Settings], location: list[str]) -> type[Settings]:
    """The settings class that holds the key at a place, as far as it can be told."""
    owner = settings
    for part in location:
        field = owner.model_fields.get(part)
        kinds = _settings_in(field.annotation) if field else []
        owner = kinds[0] if kinds else owner
    return owner


def _settings_in(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    parts = getattr(annotation, "__args__", ())
    return [found for part in parts for found in _settings_in(part)]


def _value_mistakes(name: str, settings: Settings) -> Iterator[Mistake]:
    """What one settings class cannot see by itself, or where the mend can be named better."""
    launch = getattr(settings, "launch", None)
    if isinstance(launch, LaunchConfig):
        yield from _launch_mistakes(f"stages.{name}.launch", launch)


def _launch_mistakes(place: str, launch: LaunchConfig) -> Iterator[Mistake]:
    if launch.engine == "plain" and launch.ranks > 1:
        found = f"engine plain runs one process, {launch.ranks} are asked for"
        yield Mistake(place, found, "choose engine: ddp, or processes: 1")
    if launch.launcher == "deepspeed" and launch.engine not in DEEPSPEED_ENGINES:
        found = f"engine {launch.engine} does not run under the {launch.launcher} launcher"
        mend = "choose launcher: torchrun, or engine: zero1, zero2 or zero3"
        yield Mistake(place, found, mend)


def _input_mistakes(
    node: Node, nodes: Mapping[str, Node], written: Mapping[str, Any]
) -> Iterator[Mistake]:
    place = f"stages.{node.name}.from"
    if node.pin is not None:
        return
    for name in node.inputs:
        if name not in node.spec.inputs:
            mend = suggest(name, node.spec.inputs)
            yield Mistake(f"{place}.{name}", f"{node.spec.name} has no such input", mend)
    for name, takes in node.spec.inputs.items():
        link = node.inputs.get(name)
        if link is None:
            if not takes.is_optional:
                yield _missing_input(f"{place}.{name}", node, takes, nodes)
        elif takes.is_map != isinstance(link, dict):
            mend = f"write {name}: {{KEY: NODE, ...}}" if takes.is_map else f"write {name}: NODE"
            yield Mistake(f"{place}.{name}", f"{link!r} has the wrong form", mend)
        else:
            for key, target in link.items() if isinstance(link, dict) else [("", link)]:
                where = f"{place}.{name}.{key}" if key else f"{place}.{name}"
                yield from _link_mistakes(where, target, takes, nodes, written)
    try:
        node.settings.refuse_inputs([*node.inputs, *(setting for setting, _ in node.sources)])
    except ValueError as error:
        found, _, mend = str(error).partition("; ")
        yield Mistake(place, found, mend)


def _missing_input(place: str, node: Node, takes: InputSpec, nodes: Mapping[str, Node]) -> Mistake:
    fitting = [
        name
        for name, other in nodes.items()
        if other is not node and issubclass(other.spec.output, takes.kinds)
    ]
    found = f"{node.spec.name} needs this input, {_kinds(takes.kinds)}"
    mend = f"name a node that makes one: {', '.join(fitting)}" if fitting else "add a node for it"
    return Mistake(place, found, mend)


def _link_mistakes(
    place: str,
    target: str,
    takes: InputSpec,
    nodes: Mapping[str, Node],
    written: Mapping[str, Any],
) -> Iterator[Mistake]:
    if target.startswith(REFERENCE) or (target in written and target not in nodes):
        return  # checked when it is looked up; or the node itself has been refused already
    elif target not in nodes:
        yield Mistake(place, f"there is no node {target!r}", suggest(target, nodes))
    elif not issubclass(made := nodes[target].spec.output, takes.kinds):
        fitting = [n for n, node in nodes.items() if issubclass(node.spec.output, takes.kinds)]
        found = f"node {target!r} makes {_kinds((made,))}, {_kinds(takes.kinds)} is read here"
        if made.kind == "reward_model" and "policy" in {kind.kind for kind in takes.kinds}:
            found += " (a reward model scores answers and cannot write them)"
        mend = f"name one of: {', '.join(fitting)}" if fitting else "add a node that makes one"
        yield Mistake(place, found, mend)


def _kinds(kinds: tuple[type[Artifact], ...]) -> str:
    names = [kind.__name__ for kind in kinds]
    return " or ".join(f"{'an' if name[0] in 'AEIOU' else 'a'} {name}" for name in names)


def _source_mistakes(node: Node, written: Mapping[str, Any], base: Path) -> Iterator[Mistake]:
    for field, specs in node.sources:
        for index, spec in enumerate(specs):
            place = f"stages.{node.name}.{field}[{index}]"
            if spec.node is not None:
                if spec.node not in written:
                    found = f"there is no node {spec.node!r}"
                    yield Mistake(f"{place}.node", found, suggest(spec.node, written))
            elif spec.is_optional or spec.path.startswith(SCHEME):
                continue  # what is on S3 is listed when it is looked up
            elif not _matches(spec.path, base):
                mend = "correct the path, or set is_optional: true"
                found = f"no file matches {spec.path!r} (from {base})"
                yield Mistake(f"{place}.path", found, mend)


def _matches(pattern: str, base: Path) -> bool:
    whole = base.absolute() / Path(pattern).expanduser()
    if whole.is_file():
        return True
    if whole.is_dir():
        return any(path.is_file() for path in whole.rglob("*"))
    # Path.glob refuses absolute patterns.
    return any(True for _ in glob.iglob(str(whole), recursive=True))  # noqa: PTH207


def _in_order(nodes: Mapping[str, Node], mistakes: list[Mistake]) -> dict[str, Node]:
    """Nodes after all they wait for, else in the recipe's order; a cycle is noted and left out."""
    order: dict[str, Node] = {}
    waiting = dict(nodes)
    while waiting:
        ready = [
            name
            for name, node in waiting.items()
            if not any(other in waiting for other in node.upstream)
        ]
        if not ready:
            cycle = _cycle(waiting)
            found = f"is part of a cycle: {' <- '.join([*cycle, cycle[0]])}"
            mistakes.append(
                Mistake(f"stages.{cycle[0]}.from", found, "let one of them read another node")
            )
            break
        order[ready[0]] = waiting.pop(ready[0])
    return order


def _cycle(nodes: Mapping[str, Node]) -> list[str]:
    trail = [next(iter(nodes))]
    while True:
        following = next(name for name in nodes[trail[-1]].upstream if name in nodes)
        if following in trail:
            return trail[trail.index(following) :]
        trail.append(following)
