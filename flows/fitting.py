"""What nodes of a recipe have to agree on: tokens, shapes, what one leaves or keeps for another."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from conf.chats import ChatsConfig
from conf.dpo import DpoConfig
from conf.evaluate import EvaluateConfig
from conf.launch import LaunchConfig
from conf.mistakes import Mistake
from conf.pairs import PairsConfig
from conf.ppo import PpoConfig
from conf.pretrain import PretrainConfig
from conf.reward import RewardConfig
from conf.sft import SftConfig
from conf.shape import ShapeConfig
from conf.tokenize import MAX_UINT16_VOCABULARY

if TYPE_CHECKING:
    from flows.graph import Node

TOKENIZED = ("tokenizer", "tokens", "policy", "reward_model")
"""Kinds of artifacts that hold token ids, or weights that belong to one vocabulary."""


def disagreements(order: Mapping[str, "Node"]) -> Iterator[Mistake]:
    """All of them; `order` has every node behind those that it reads."""
    yield from _tokenizer_mistakes(order)
    yield from _shape_mistakes(order)
    yield from _vocabulary_mistakes(order)
    yield from _withheld_mistakes(order)
    yield from _curve_mistakes(order)
    yield from _batch_mistakes(order)
    yield from _held_mistakes(order)


def _tokenizer_mistakes(order: Mapping[str, "Node"]) -> Iterator[Mistake]:
    """Inputs whose token ids come from different vocabularies."""
    origins: dict[str, set[str]] = {}
    for node in order.values():
        read = {
            link: origins.get(target, set())
            for link, target in node.links
            if target in order and order[target].spec.output.kind in TOKENIZED
        }
        found = {origin for sets in read.values() for origin in sets}
        if len(found) > 1:
            parts = [f"{link} was made with {' and '.join(sorted(o))}" for link, o in read.items()]
            mend = "let all of them descend from one tokenizer"
            yield Mistake(f"stages.{node.name}.from", f"mixes tokenizers: {', '.join(parts)}", mend)
        if getattr(node.settings, "target", "") == "gguf":
            yield from _gguf_mistakes(node, [order[name] for name in found if name in order])
        is_tokenizer = node.spec.output.kind == "tokenizer"
        origins[node.name] = {node.pin or node.name} if is_tokenizer else found


def _gguf_mistakes(node: "Node", tokenizers: list["Node"]) -> Iterator[Mistake]:
    for made in tokenizers:
        algorithm = getattr(made.settings, "algorithm", "bpe")
        if algorithm != "bpe" and not getattr(made.settings, "adopt", ()):
            found = f"GGUF holds byte-level BPE, {made.name} learns {algorithm}"
            mend = f"give target: hf, or {made.name} algorithm: bpe"
            yield Mistake(f"stages.{node.name}.target", found, mend)


def _vocabulary_mistakes(order: Mapping[str, "Node"]) -> Iterator[Mistake]:
    """Vocabularies whose ids do not fit the token files that are made with them."""
    for node in order.values():
        vocabulary = getattr(node.settings, "vocabulary", 0)
        if vocabulary <= MAX_UINT16_VOCABULARY or getattr(node.settings, "adopt", ()):
            continue
        made = [
            other.name
            for other in order.values()
            if other.spec.output.kind == "tokens" and node.name in other.inputs.values()
        ]
        wide = [name for name in made if getattr(order[name].settings, "dtype", "") == "uint32"]
        if made and made == wide:
            continue
        name = next((name for name in made if name not in wide), "tokenize")
        found = (
            f"{vocabulary:,} tokens do not fit into 16 bits, which hold {MAX_UINT16_VOCABULARY:,}"
        )
        mend = f"give vocabulary: {MAX_UINT16_VOCABULARY} or less, or {name} dtype: uint32"
        yield Mistake(f"stages.{node.name}.vocabulary", found, mend)


def _shape_mistakes(order: Mapping[str, "Node"]) -> Iterator[Mistake]:
    """Sequences longer than the model was made for, and launches that cannot share it out."""
    shapes: dict[str, list[ShapeConfig]] = {}
    for node in order.values():
        own = getattr(node.settings, "shape", None)
        above = [shape for _, target in node.links for shape in shapes.get(target, [])]
        if isinstance(own, ShapeConfig) and not above:
            above = [own]
        shapes[node.name] = above
        if above:
            longest = min(shape.context for shape in above)
            yield from _context_mistakes(node, longest)
            yield from _answer_mistakes(node, longest)
        launch = getattr(node.settings, "launch", None)
        if isinstance(launch, LaunchConfig):
            yield from _sharing_mistakes(node, launch, above)


def _sharing_mistakes(
    node: "Node", launch: LaunchConfig, shapes: Iterable[ShapeConfig]
) -> Iterator[Mistake]:
    for shape in shapes:
        try:
            launch.refuse_shape(shape)
        except ValueError as error:
            found, _, mend = str(error).partition("; ")
            yield Mistake(f"stages.{node.name}.launch", found, mend)
            return


def _context_mistakes(node: "Node", longest: int) -> Iterator[Mistake]:
    asked = getattr(node.settings, "context", 0)
    if isinstance(asked, int) and asked > longest:
        found = f"{asked} tokens are more than the model's context of {longest}"
        mend = f"give {node.name}.context={longest} or less, or shape.context={asked}"
        yield Mistake(f"stages.{node.name}.context", found, mend)


def _answer_mistakes(node: "Node", longest: int) -> Iterator[Mistake]:
    settings = node.settings
    if isinstance(settings, DpoConfig) and not settings.gate_answers:
        return
    answers = isinstance(settings, DpoConfig | PairsConfig | PpoConfig | RewardConfig)
    if answers and settings.max_new_tokens >= longest:
        found = f"answers of {settings.max_new_tokens} tokens leave a prompt no room in a context of {longest}"
        mend = f"give {node.name}.max_new_tokens={longest // 2}, or a shape with a longer context"
        yield Mistake(f"stages.{node.name}.max_new_tokens", found, mend)


def _withheld_mistakes(order: Mapping[str, "Node"]) -> Iterator[Mistake]:
    """Pairs from questions that sft was to leave out, and has learnt."""
    for node in order.values():
        settings = node.settings
        if not isinstance(settings, PairsConfig) or settings.prompts != "withheld":
            continue
        for tuned in _tuned_above(order, node):
            learnt = tuned.settings
            if isinstance(learnt, SftConfig) and learnt.withheld_share < settings.withheld_share:
                found = (
                    f"asks the {settings.withheld_share:g} of the questions that {tuned.name} withholds; it "
                    f"withholds {learnt.withheld_share:g}"
                )
                mend = f"give {tuned.name} withheld_share: {settings.withheld_share:g}, or prompts: all"
                yield Mistake(f"stages.{node.name}.withheld_share", found, mend)


def _batch_mistakes(order: Mapping[str, "Node"]) -> Iterator[Mistake]:
    """Rows of an update that processes cannot share."""
    for node in order.values():
        match node.settings:
            case SftConfig() | RewardConfig() | DpoConfig() as settings:
                name, rows = "batch_rows", settings.batch_rows
            case PpoConfig() as settings:
                name, rows = "minibatch_rows", settings.minibatch_rows
            case _:
                continue
        groups = settings.launch.ranks // settings.launch.model_processes
        if rows < groups or (name == "batch_rows" and rows % groups):
            found = f"{rows} rows of an update cannot be shared by {groups} processes"
            mend = (
                f"give {node.name} {name}: {-(-rows // groups) * groups}, or other launch.processes"
            )
            yield Mistake(f"stages.{node.name}.{name}", found, mend)


def _held_mistakes(order: Mapping[str, "Node"]) -> Iterator[Mistake]:
    """Looks at held-out conversations or pairs of which none are held out."""
    for node in order.values():
        match node.settings:
            case PpoConfig(truth_every_iterations=every) if every:
                link, name = "conversations", "truth_every_iterations"
            case RewardConfig(on_gate=gate) | DpoConfig(on_gate=gate) if gate != "off":
                link, name = "preferences", "on_gate"
            case _:
                continue
        made = order.get(str(node.inputs.get(link)))
        if made is None or made.pin is not None or made.inputs:
            continue
        if isinstance(made.settings, ChatsConfig | PairsConfig) and _holds_none(made.settings):
            found = f"looks at what {made.name} holds out, which is nothing"
            mend = f"give {made.name} held_share: 0.05, or take {name} out"
            yield Mistake(f"stages.{node.name}.{name}", found, mend)


def _holds_none(settings: ChatsConfig | PairsConfig) -> bool:
    return not settings.held_share and all(spec.split != "held" for spec in settings.sources)


def _curve_mistakes(order: Mapping[str, "Node"]) -> Iterator[Mistake]:
    """Curves over weights that nothing keeps."""
    for node in order.values():
        made = order.get(str(node.inputs.get("policy")))
        if not isinstance(node.settings, EvaluateConfig) or not node.settings.has_curve:
            continue
        # What is pinned or of an earlier run may have them.
        if made is None or made.pin is not None or getattr(made.settings, "kept_looks", 0):
            continue
        found = (
            f"measures weights that pretraining kept on its way, and {made.name} keeps none of them"
        )
        mend = f"give {made.name} kept_looks: 1"
        if not isinstance(made.settings, PretrainConfig):
            mend = "name the policy of a pretrain node with kept_looks: 1"
        yield Mistake(f"stages.{node.name}.has_curve", found, f"{mend}, or has_curve: false")


def _tuned_above(order: Mapping[str, "Node"], node: "Node") -> Iterator["Node"]:
    """The nodes that a node's policy went through."""
    above = order.get(str(node.inputs.get("policy")))
    while above is not None and above.pin is None:
        yield above
        above = order.get(str(above.inputs.get("policy")))
