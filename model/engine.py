"""How gradients become an update: one process, several in step (DDP), or spread over ranks behind the
same face.

A checkpoint has one form for all of them, that of model/tensor_files.py: tensors under the names of their
parameters, whole or in the parts that ranks hold. So a job may go on with another engine and another number
of ranks.
"""

import contextlib
import copy
import math
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from conf.launch import LaunchConfig
from conf.shape import ShapeConfig
from model.batches import Batch
from model.optimizer import LossScale, Precision, Update, UpdateRule, build_optimizers
from model.ranks import Ranks
from model.tensor_files import Part, read_whole
from model.transformer import Transformer
from model.weights import Write

WEIGHTS_FOLDER, OPTIMIZER_FOLDER = "weights", "optimizer"

Loss = Callable[[Transformer, Batch, Mapping[str, float]], dict[str, Tensor]]
"""Model, micro-batch and the step's totals -> figures that this micro-batch adds to the step's, already
divided by the totals; `loss` carries the gradient, the others are logged."""


class Engine(Protocol):
    """What the loop and PPO need of whatever trains."""

    model: Transformer
    ranks: Ranks
    scale: LossScale | None
    """Of the loss, in fp16."""

    def backward(
        self, loss: Loss, batch: Batch, totals: Mapping[str, float], *, is_last: bool
    ) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch; its figures, detached. `is_last` of the step's."""
        ...

    def step(self, learning_rate: float, limit: float = math.inf) -> float:
        """Clip and apply the gradients; their norm before clipping.

        A norm that is not finite, or above the limit, means that nothing was changed.
        """
        ...

    def discard(self) -> None:
        """Forget the gradients."""
        ...

    def whole(self) -> Transformer:
        """The model as it is, to look at, answer with or write down; all ranks call it.

        Where weights are spread over ranks it is a copy, which takes their whole memory on every rank
        as long as it is held; else the model itself.
        """
        ...

    def snapshot(self, *, is_lasting: bool) -> Write:
        """What writes weights and optimizer, as they are now, into a folder; all ranks call both.

        `is_lasting` if it may be called while training goes on, which takes a copy in the host's memory.
        """
        ...

    def load(self, folder: Path, *, has_optimizer: bool = True) -> None:
        """Read what a snapshot of any engine wrote; without its optimizer's state that begins anew."""
        ...


def build_engine(
    model: Transformer, launch: LaunchConfig, ranks: Ranks, rule: UpdateRule
) -> Engine:
    """The engine that the launch settings name, around a model that every rank holds alike.

    Raises ValueError for what the engine or the machine cannot do.
    """
    refuse_impossible(launch, ranks, rule, model.shape)
    model.to(ranks.device).train()
    prepare_blocks(model, launch)
    if launch.pipeline_stages > 1:
        from model.pipeline import PipelineEngine

        return PipelineEngine(model, ranks, rule)
    match launch.engine:
        case "plain" | "ddp":
            return TorchEngine(model, ranks, rule)
        case "fsdp":
            from model.fsdp import FsdpEngine

            return FsdpEngine(model, ranks, rule, launch)
        case "zero1" | "zero2" | "zero3":
            # Late: deepspeed is needed for its own engine alone, and takes seconds to import.
            from model.zero import ZeroEngine

            return ZeroEngine(model, ranks, rule, launch)


def refuse_impossible(
    launch: LaunchConfig, ranks: Ranks, rule: UpdateRule, shape: ShapeConfig
) -> None:
    """Raises ValueError for what an engine or this machine cannot do, with the way out."""
    if launch.engine == "plain" and ranks.processes > 1:
        raise ValueError(
            f"engine plain runs in one process, {ranks.processes} are there; set "
            f"launch.engine=ddp or launch.processes=1"
        )
    launch.refuse_shape(shape)
    if launch.engine.startswith("zero") and rule.optimizer == "muon":
        raise ValueError(
            f"engine {launch.engine} cuts what Muon needs whole into pieces; use launch.engine=fsdp, or "
            f"optimizer=adamw"
        )
    is_cuda = ranks.device.type == "cuda"
    is_old = is_cuda and torch.cuda.get_device_capability()[0] < 8
    if is_old and rule.precision == "bf16":
        raise ValueError(
            f"{torch.cuda.get_device_name()} has no bfloat16; use precision=fp16 or precision=fp32"
        )
    if is_old and launch.attention == "flash":
        raise ValueError(
            f"{torch.cuda.get_device_name()} has no FlashAttention, which the A100 has; use "
            f"launch.attention=sdpa"
        )
    if launch.attention == "flash" and not (is_cuda and rule.precision != "fp32"):
        raise ValueError(
            f"launch.attention=flash runs on CUDA in 16 bits, not on {ranks.device.type} in "
            f"{rule.precision}; use launch.attention=sdpa"
        )
    has_compiler = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    if launch.compile and not is_cuda and not has_compiler:
        raise ValueError(
            "launch.compile needs a C++ compiler on CPU and none was found; install g++ or set "
            "launch.compile=false"
        )


def prepare_blocks(model: Transformer, launch: LaunchConfig) -> None:
    """Let blocks attend as asked, compute their activations again, or run compiled; names of weights
    stay as they are."""
    model.attend_by(launch.attention)
    for block in cast("Iterable[nn.Module]", model.blocks):
        if launch.checkpoint_activations:
            # Dropout is a function of the position: no generator's state has to be kept.
            again = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )
            cast("Any", block).forward = again
        if launch.compile:
            block.compile()
    if launch.compile:
        # Blocks share their code; the number of a layer, which dropout reads, must not tell them apart.
        config = cast("Any", torch._dynamo.config)  # pyright: ignore[reportPrivateUsage]
        config.allow_unspec_int_on_nn_module = True
        # Those that processes compute together do not: each is compiled for itself, in all its forms.
        config.recompile_limit = max(config.recompile_limit, 8 * len(model.blocks))


class Objective(nn.Module):
    """A loss seen as a module, since wrappers that exchange gradients do so around `forward`."""

    def __init__(self, model: Transformer, rule: UpdateRule, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self._precision: Precision = rule.precision
        self._device = device

    def forward(self, loss: Loss, batch: Batch, totals: Mapping[str, float]) -> dict[str, Tensor]:
        with self.precision():
            return loss(self.model, batch.to(self._device), totals)

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """The context in which the model computes."""
        match self._precision:
            case "fp32":
                return contextlib.nullcontext()
            case "bf16":
                return torch.autocast(self._device.type, dtype=torch.bfloat16)
            case "fp16":
                return torch.autocast(self._device.type, dtype=torch.float16)


class TorchEngine:
    """One process, or several whose gradients are averaged (torch DDP)."""

    def __init__(self, model: Transformer, ranks: Ranks, rule: UpdateRule) -> None:
        self.model, self.ranks, self.rule = model, ranks, rule
        self.scale = LossScale() if rule.precision == "fp16" else None
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizers = build_optimizers(model.named_parameters(), rule)
        self._update = Update(optimizers, [learning], rule, self.scale)
        objective = Objective(model, rule, ranks.device)
        self._objective: nn.Module = objective
        self._is_settled = ranks.world == 1
        if ranks.world > 1:
            # Buffers are the tables of rotations, the same everywhere. Sending them before every step is
            # a one-way exchange that, over gloo, does not always end when a rank has died.
            # The newer name of this option, which torch wants to see, is not in torch 2.9.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is", FutureWarning)
            self._objective = DistributedDataParallel(
                objective, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def backward(
        self, loss: Loss, batch: Batch, totals: Mapping[str, float], *, is_last: bool
    ) -> dict[str, Tensor]:
        if not self._is_settled:
            # DDP orders its buckets anew after the first exchange, and with them the sums over more than
            # two ranks: the last bit of a step would tell whether the job was started just before it.
            self._is_settled = True
            self.backward(loss, batch, totals, is_last=True)
            self.discard()
        with self._exchange(is_last):
            figures = self._objective(loss, batch, totals)
            # DDP averages over the ranks; the loss is already this rank's share of the sum.
            weight = self.ranks.world * (self.scale.value if self.scale else 1)
            (figures["loss"] * weight).backward()
        return {name: value.detach() for name, value in figures.items()}

    def step(self, learning_rate: float, limit: float = math.inf) -> float:
        return self._update.step(learning_rate, limit)

    def discard(self) -> None:
        self._update.discard()

    def whole(self) -> Transformer:
        return self.model

    def snapshot(self, *, is_lasting: bool) -> Write:
        states = states_of(self.model, self._update.optimizers)
        return snapshot_of(
            self.model.state_dict(), states, self.ranks, self.scale, is_lasting=is_lasting
        )

    def load(self, folder: Path, *, has_optimizer: bool = True) -> None:
        self.model.load_state_dict(read_whole(folder / WEIGHTS_FOLDER))
        if not has_optimizer:
            return
        load_states(self.model, self._update.optimizers, optimizer_states(folder))
        if self.scale:
            self.scale.load(folder)

    def _exchange(self, is_last: bool) -> contextlib.AbstractContextManager[object]:
        if is_last or self.ranks.world == 1:
            return contextlib.nullcontext()
        return cast("DistributedDataParallel", self._objective).no_sync()


class Hollow:
    """What a model is besides its weights: engines that spread these make whole copies of it."""

    def __init__(self, model: Transformer) -> None:
        empty: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
            for p in model.parameters()
        }
        self._model = copy.deepcopy(model, empty)

    def filled(self, weights: Mapping[str, Tensor]) -> Transformer:
        """A model with these weights, which are not copied."""
        model = copy.deepcopy(self._model)
        model.load_state_dict(weights, assign=True)
        return model


def snapshot_of(
    weights: Mapping[str, Tensor],
    states: Mapping[str, Tensor],
    ranks: Ranks,
    scale: LossScale | None,
    *,
    is_lasting: bool,
    is_teller: bool | None = None,
) -> Write:
    """What writes them into a folder, as `Engine.snapshot` says; tensors are DTensors, or whole ones, which
    the first process alone writes unless it is told who does."""
    teller = ranks.is_first if is_teller is None else is_teller
    parts = {
        name: Part.of(tensors, ranks, is_copied=is_lasting, is_teller=teller)
        for name, tensors in ((WEIGHTS_FOLDER, weights), (OPTIMIZER_FOLDER, states))
    }
    scale_now = replace(scale) if scale and ranks.is_first else None

    def write(folder: Path) -> None:
        for name, part in parts.items():
            part.write(folder / name, ranks.place)
        if scale_now:
            scale_now.save(folder)

    return write


def states_of(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Optimizer state of each parameter as a checkpoint holds it: `name|key` -> tensor."""
    return {
        f"{name}|{key}": value
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_states(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    by_name: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Give optimizers the state of a checkpoint, as far as they hold the parameter."""
    for optimizer in optimizers:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            if name in by_name and id(parameter) in own:
                # The fused update reads the count of steps where it runs.
                optimizer.state[parameter] = {
                    key: value.to(parameter.device) for key, value in by_name[name].items()
                }


def optimizer_states(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Optimizer state of each parameter in a checkpoint: name -> key -> tensor."""
    return by_parameter(read_whole(folder / OPTIMIZER_FOLDER))


def by_parameter(states: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`name|key` -> tensor as name -> key -> tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in states.items():
        parameter, key = name.rsplit("|", 1)
        found.setdefault(parameter, {})[key] = tensor
    return found
