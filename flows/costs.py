"""What a training stage will cost, told before it runs: steps, FLOPs, memory, time."""

import functools
import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from conf.dpo import DpoConfig
from conf.ppo import PpoConfig
from conf.pretrain import PretrainConfig, PretrainPlan
from conf.reward import RewardConfig
from conf.sft import SftConfig
from conf.shape import LARGEST_EMBEDDING_SHARE, ShapeConfig, embedding_warning
from flows.graph import Node
from flows.lookup import Lookup
from flows.memory import EVALUATION_TOKENS, Memory, Pass, training_memory
from storage.record import Record
from tasks.command import ROOT
from tasks.memory import host_memory
from tasks.processes import cores, uses_cuda

TOKENS_PER_PARAMETER = 20
"""Of a model that is trained best for its compute (Hoffmann et al. 2022, table 3)."""
USUAL_SHARE_OF_PEAK = {"cpu": 0.65, "cpu, 16 bits": 0.45, "cuda": 0.4}
"""Of the peak that a training reaches where no run has told yet: 65 % of oneDNN's matrix product on a CPU
in fp32 and 42 to 51 % in bf16 (measured), 40 % on an accelerator (PaLM: 46 %)."""

Trained = PretrainConfig | SftConfig | RewardConfig | DpoConfig | PpoConfig


@dataclass(frozen=True)
class Rate:
    """How fast all ranks together compute."""

    flops: float
    """Per second; 0 where it cannot be told."""
    source: str


@dataclass(frozen=True)
class Costs:
    """What a training stage is expected to cost; 0 where it cannot be told before its data are there."""

    parameters: int
    embedding_share: float
    steps: int = 0
    warmup_steps: int = 0
    tokens: float = 0.0
    """That pass through the model; of stages whose rows differ in length, at most."""
    flops: float = 0.0
    memory: Memory | None = None
    """Of one rank."""
    seconds: float = 0.0
    rate_source: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def tokens_per_parameter(self) -> float:
        """To be held against `TOKENS_PER_PARAMETER`."""
        return self.tokens / self.parameters

    def figures(self) -> dict[str, float]:
        """What is known, by name, for `plan --json`."""
        found: dict[str, float] = {
            "parameters": self.parameters,
            "embedding_share": self.embedding_share,
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "tokens": self.tokens,
            "tokens_per_parameter": self.tokens_per_parameter,
            "flops": self.flops,
            "seconds": self.seconds,
        }
        parts = self.memory.figures() if self.memory else {}
        return {name: value for name, value in found.items() if value} | parts


def costs_of(
    lookup: Lookup, node: Node, earlier: list[Record], *, peak_flops: float = 0.0
) -> Costs | None:
    """What a node costs; none for a stage that trains nothing, or whose model is not known yet.

    `earlier` are artifacts of the stage, the most telling first: what they reached is the measured
    rate. `peak_flops` of one device, where it is stated, goes before.
    """
    if not isinstance(node.settings, Trained):
        return None
    settings = node.settings
    shape, vocabulary = _shape(lookup, node), _vocabulary(lookup, node)
    if shape is None or not vocabulary:
        return None
    steps, warmup = _steps(lookup, node, settings)
    tokens, forward_tokens = _tokens(settings, shape, steps)
    forward_tokens += _looked_at(lookup, node, steps)
    flops = shape.training_flops(vocabulary, _row_tokens(settings, shape)) * (
        tokens + forward_tokens / 3
    )
    rate = _rate(settings, earlier, peak_flops)
    costs = Costs(
        parameters=shape.parameters(vocabulary),
        embedding_share=shape.embedding_share(vocabulary),
        steps=steps,
        warmup_steps=warmup,
        tokens=tokens,
        flops=flops,
        memory=_memory(settings, shape, vocabulary),
        seconds=flops / rate.flops if rate.flops else 0.0,
        rate_source=rate.source,
    )
    return replace(costs, warnings=tuple(_warnings(lookup, node, settings, costs)))


def _shape(lookup: Lookup, node: Node) -> ShapeConfig | None:
    """The node's own, else that of the model it goes on from."""
    own = getattr(node.settings, "shape", None)
    if isinstance(own, ShapeConfig):
        return own
    if (card := _card(lookup, node)) is not None:
        return ShapeConfig.model_validate(card["shape"])
    for target in _models_read(node):
        if target in lookup.graph.nodes and (found := _shape(lookup, lookup.graph.nodes[target])):
            return found
    return None


def _vocabulary(lookup: Lookup, node: Node) -> int:
    """Size of the vocabulary that the node's token ids come from; 0 where it cannot be told."""
    if (card := _card(lookup, node)) is not None:
        return int(card["vocabulary"])
    for name in sorted(lookup.graph.ancestors([node.name])):
        other = lookup.graph.nodes[name]
        if other.spec.output.kind == "tokenizer":
            if name in lookup.artifacts:
                return int(_json(lookup.artifacts[name].path, "tokenizer.meta.json")["vocabulary"])
            return int(getattr(other.settings, "vocabulary", 0))
    return 0


def _card(lookup: Lookup, node: Node) -> dict[str, Any] | None:
    """`config.json` of the node's model, or of one that it goes on from, where that is built."""
    for name in (node.name, *_models_read(node)):
        artifact = lookup.artifacts.get(name)
        if artifact is not None and artifact.record.kind in ("policy", "reward_model"):
            return _json(artifact.path, "config.json")
    return None


def _models_read(node: Node) -> list[str]:
    return [target for name, target in node.links if name in ("policy", "reward")]


def _json(artifact: Path, name: str) -> dict[str, Any]:
    return json.loads((artifact / "files" / name).read_text("utf-8"))


def _steps(lookup: Lookup, node: Node, settings: Trained) -> tuple[int, int]:
    """Updates, and those of the warm-up."""
    match settings:
        case PretrainConfig():
            plan = _pretrain_plan(lookup, node, settings)
            steps = plan.steps if plan else steps_of(settings.tokens, settings.batch_tokens)
        case PpoConfig():
            per_iteration = settings.epochs * settings.rollout_rows // settings.minibatch_rows
            steps = settings.iterations * per_iteration
        case _:
            rows = _train_rows(lookup, node)
            steps = steps_of(settings.epochs * rows, settings.batch_rows)
            limit = settings.max_steps
            steps = min(steps or limit, limit) if limit else steps
    return steps, round(settings.warmup * steps)


def steps_of(samples: float, batch: int, accumulation: int = 1, ranks: int = 1) -> int:
    """Updates that so many samples come to: samples / (batch x accumulation x ranks), rounded up."""
    return math.ceil(samples / (batch * accumulation * ranks) - 1e-9)


def _pretrain_plan(lookup: Lookup, node: Node, settings: PretrainConfig) -> PretrainPlan | None:
    """What the settings come to on the tokens, where these are there already."""
    domains = _domain_tokens(lookup, node, "train")
    try:
        return settings.plan(domains) if domains else None
    except ValueError:
        # What is wrong with the data is the stage's to say; the plan tells what it can.
        return None


def _looked_at(lookup: Lookup, node: Node, steps: int) -> float:
    """Held-out tokens that a pretraining reads: before its first step, every so many, behind its last."""
    settings = node.settings
    if not isinstance(settings, PretrainConfig) or not settings.evaluate_every_steps:
        return 0.0
    there = _domain_tokens(lookup, node, "held").values()
    looks = 1 + math.ceil(steps / settings.evaluate_every_steps)
    return float(looks * sum(min(tokens, settings.held_tokens) for tokens in there))


def _domain_tokens(lookup: Lookup, node: Node, split: str) -> dict[str, int]:
    """Tokens per domain, where they are there already."""
    target = next((target for name, target in node.links if name == "tokens"), None)
    if target is None or target not in lookup.artifacts:
        return {}
    domains = _json(lookup.artifacts[target].path, "meta.json")["domains"]
    return {name: int(splits[split]["tokens"]) for name, splits in domains.items()}


def _train_rows(lookup: Lookup, node: Node) -> int:
    """Conversations or pairs to train on, where they are there already."""
    for name, target in node.links:
        if name in ("conversations", "preferences") and target in lookup.artifacts:
            return int(lookup.artifacts[target].record.metrics.get("train", 0))
    return 0


def _row_tokens(settings: Trained, shape: ShapeConfig) -> int:
    match settings:
        case PretrainConfig():
            return settings.row_tokens
        case PpoConfig():
            return shape.context
        case _:
            return settings.context or shape.context


def _tokens(settings: Trained, shape: ShapeConfig, steps: int) -> tuple[float, float]:
    """Tokens that train, and tokens that are only read (rollouts, references); at most."""
    row = _row_tokens(settings, shape)
    match settings:
        case PretrainConfig():
            return float(steps * settings.batch_tokens), 0.0
        case SftConfig():
            return float(steps * settings.batch_rows * row), 0.0
        case RewardConfig():
            return float(2 * steps * settings.batch_rows * row), 0.0
        case DpoConfig():
            trained = 2 * steps * settings.batch_rows * row
            return float(trained), float(trained)
        case PpoConfig():
            # Policy and value train; policy, reference, value and reward read every answer once, and
            # the policy writes it.
            read = settings.iterations * settings.rollout_rows * row
            return float(2 * steps * settings.minibatch_rows * row), 5.0 * read


def _memory(settings: Trained, shape: ShapeConfig, vocabulary: int) -> Memory:
    launch = settings.launch
    match settings:
        case PretrainConfig() | SftConfig():
            step_rows, sides = settings.batch_rows, 1
        case PpoConfig():
            step_rows, sides = settings.minibatch_rows, 1
        case _:
            step_rows, sides = settings.batch_rows, 2
    own = max(1, step_rows * launch.model_processes // launch.ranks)
    rows = min(launch.micro_batch or own, own)
    is_cuda = uses_cuda(launch.device)
    is_pretraining = isinstance(settings, PretrainConfig)
    has_held = isinstance(settings, PretrainConfig) and settings.held_tokens > 0
    work = Pass(
        rows=rows * sides,
        row_tokens=_row_tokens(settings, shape),
        precision=settings.precision,
        has_head=not isinstance(settings, RewardConfig),
        is_masked=isinstance(settings, PretrainConfig) and settings.is_document_masked,
        is_recomputed=launch.checkpoint_activations,
        is_fused=is_pretraining and launch.fused_head and settings.precision != "fp16",
        has_noise=is_pretraining and shape.dropout > 0,
    )
    trained, frozen = 1, 0
    if isinstance(settings, PpoConfig):
        trained = 2 if settings.method == "ppo" else 1
        frozen = 1 if settings.lora.rank else 2
    return training_memory(
        shape,
        vocabulary,
        work,
        engine=launch.engine,
        processes=launch.ranks,
        stages=launch.pipeline_stages,
        offload=launch.offload,
        optimizer=settings.optimizer if isinstance(settings, PretrainConfig) else "adamw",
        is_accumulated=rows < own,
        learning_share=_learning_share(settings, shape, vocabulary),
        trained=trained,
        frozen=frozen,
        evaluated_tokens=EVALUATION_TOKENS if has_held else 0,
        is_cuda=is_cuda,
    )


def _learning_share(settings: Trained, shape: ShapeConfig, vocabulary: int) -> float:
    """Of the parameters: all, or the corrections of low rank."""
    rank = settings.lora.rank if isinstance(settings, SftConfig | DpoConfig) else 0
    if not rank:
        return 1.0
    query, key = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    ends = 2 * (shape.dim + query) + 2 * (shape.dim + key) + 3 * (shape.dim + shape.ffn_width)
    return shape.layers * rank * ends / shape.parameters(vocabulary)


def _rate(settings: Trained, earlier: list[Record], stated_flops: float) -> Rate:
    launch = settings.launch
    is_cuda = uses_cuda(launch.device)
    on_cpu = "cpu" if settings.precision == "fp32" else "cpu, 16 bits"
    share = USUAL_SHARE_OF_PEAK["cuda" if is_cuda else on_cpu]
    stated = stated_flops or launch.peak_tflops * 1e12
    if stated:
        flops = stated * share * launch.ranks
        return Rate(flops, f"{share:.0%} of the stated {stated:.3g} FLOP/s a device")
    for record in earlier:
        if found := _reached(record, settings):
            return Rate(found, f"what {record.node} reached on {record.created[:10]}")
    if is_cuda:
        return Rate(0.0, "no peak: state one with --peak, or launch.peak_tflops")
    peak = measured_peak(settings.precision)
    return Rate(peak * share, f"{share:.0%} of a {settings.precision} matrix product measured now")


def _reached(record: Record, settings: Trained) -> float:
    """FLOP/s of an earlier pretraining that was launched alike; 0 where it does not tell."""
    speed = record.metrics.get("tokens_per_second")
    written = cast("dict[str, Any]", record.build.get("settings") or {})
    if not isinstance(settings, PretrainConfig) or not isinstance(speed, int | float):
        return 0.0
    try:
        then = PretrainConfig.model_validate(written)
    except ValueError:
        # Written by a version whose settings were others.
        return 0.0
    launches = [
        (x.precision, x.launch.device, x.launch.ranks, x.launch.model_processes)
        for x in (then, settings)
    ]
    if launches[0] != launches[1]:
        return 0.0
    parameters = int(record.metrics.get("parameters", 0))
    tables = 1 if then.shape.is_tied else 2
    vocabulary = (parameters - then.shape.parameters(0)) // (then.shape.dim * tables)
    return float(speed) * then.shape.training_flops(vocabulary, then.row_tokens)


@functools.cache
def measured_peak(precision: str) -> float:
    """FLOP/s of torch's matrix product on this machine's cores; torch stays out of this process."""
    probe = [sys.executable, "-m", "model.speed", precision]
    told = subprocess.run(probe, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    return float(told)


def device_memory() -> int:
    """Bytes of the smallest CUDA device, as its driver's tool says; 0 where it does not."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout
    return min((int(line) << 20 for line in told.split() if line.isdigit()), default=0)


def _warnings(lookup: Lookup, node: Node, settings: Trained, costs: Costs) -> list[str]:
    found: list[str] = []
    if isinstance(settings, PretrainConfig) and costs.embedding_share > LARGEST_EMBEDDING_SHARE:
        found.append(embedding_warning(costs.embedding_share))
    if isinstance(settings, PretrainConfig) and (plan := _pretrain_plan(lookup, node, settings)):
        found += plan.warnings()
    ranks, is_cuda = settings.launch.processes, uses_cuda(settings.launch.device)
    needed = costs.memory.total * (1 if is_cuda else ranks) if costs.memory else 0.0
    there = device_memory() if is_cuda else host_memory()
    if there and needed > there:
        found.append(
            f"needs {needed / 1e9:.1f} GB of the {there / 1e9:.1f} GB {'of a device' if is_cuda else 'here'}: "
            f"lower {node.name}.launch.micro_batch, or set "
            f"{node.name}.launch.checkpoint_activations=true"
        )
    if ranks > cores() and not is_cuda:
        found.append(f"{ranks} processes share {cores()} cores")
    return found
