"""How gradients become an update: one process, several in step (DDP), or DeepSpeed behind the same face.

A checkpoint has one form for all of them: every tensor whole, under the name of its parameter. So a
job may go on with another engine and another number of ranks.
"""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from conf.launch import LaunchConfig
from model.batches import Batch
from model.optimizer import UpdateRule, adamw, set_learning_rate
from model.ranks import Ranks
from model.transformer import Transformer
from model.weights import load_tensors, save_tensors

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"

Loss = Callable[[Transformer, Batch, Mapping[str, float]], dict[str, Tensor]]
"""Model, micro-batch and the step's totals -> figures that this micro-batch adds to the step's, already
divided by the totals; `loss` carries the gradient, the others are logged."""


class Engine(Protocol):
    """What the loop and PPO need of whatever trains."""

    model: Transformer
    ranks: Ranks

    def backward(
        self, loss: Loss, batch: Batch, totals: Mapping[str, float], *, is_last: bool
    ) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch; its figures, detached. `is_last` of the step's."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip and apply the gradients; their norm before clipping.

        A norm that is not finite means that nothing was changed.
        """
        ...

    def discard(self) -> None:
        """Forget the gradients."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimizer; all ranks call it."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on any engine."""
        ...


def build_engine(
    model: Transformer, launch: LaunchConfig, ranks: Ranks, rule: UpdateRule
) -> Engine:
    """The engine that the launch settings name, around a model that every rank holds alike."""
    model.to(ranks.device).train()
    match launch.engine:
        case "plain":
            if ranks.world > 1:
                raise ValueError(
                    f"engine plain runs in one process, launch.processes is {ranks.world}; set "
                    f"launch.engine=ddp or launch.processes=1"
                )
            return TorchEngine(model, ranks, rule)
        case "ddp":
            return TorchEngine(model, ranks, rule)
        case "zero2":
            # Late: deepspeed is needed for its own engine alone, and takes seconds to import.
            from model.zero import ZeroEngine

            return ZeroEngine(model, ranks, rule)


class Objective(nn.Module):
    """A loss seen as a module, since wrappers that exchange gradients do so around `forward`."""

    def __init__(self, model: Transformer, rule: UpdateRule, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self._is_bf16, self._device = rule.precision == "bf16", device

    def forward(self, loss: Loss, batch: Batch, totals: Mapping[str, float]) -> dict[str, Tensor]:
        with self.precision():
            return loss(self.model, batch.to(self._device), totals)

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """The context in which the model computes."""
        if not self._is_bf16:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)


class TorchEngine:
    """One process, or several whose gradients are averaged (torch DDP)."""

    def __init__(self, model: Transformer, ranks: Ranks, rule: UpdateRule) -> None:
        self.model, self.ranks, self.rule = model, ranks, rule
        self.optimizer = adamw(model, rule)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        objective = Objective(model, rule, ranks.device)
        self._objective: nn.Module = objective
        if ranks.world > 1:
            self._objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)

    def backward(
        self, loss: Loss, batch: Batch, totals: Mapping[str, float], *, is_last: bool
    ) -> dict[str, Tensor]:
        with self._exchange(is_last):
            figures = self._objective(loss, batch, totals)
            # DDP averages over the ranks; the loss is already this rank's share of the sum.
            (figures["loss"] * self.ranks.world).backward()
        return {name: value.detach() for name, value in figures.items()}

    def step(self, learning_rate: float) -> float:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if bool(norm.isfinite()):
            if self.rule.clip_norm:
                torch.nn.utils.clip_grads_with_norm_(self._parameters, self.rule.clip_norm, norm)
            set_learning_rate(self.optimizer.param_groups, learning_rate)
            self.optimizer.step()
        self.discard()
        return norm.item()

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, folder: Path) -> None:
        if not self.ranks.is_first:
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / MODEL_FILE, self.model.state_dict())
        states = {
            f"{name}|{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        save_tensors(folder / OPTIMIZER_FILE, states)

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(load_tensors(folder / MODEL_FILE))
        by_name = optimizer_states(folder)
        for name, parameter in self.model.named_parameters():
            if name in by_name:
                # The step count stays on the host, as AdamW itself keeps it.
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in by_name[name].items()
                }

    def _exchange(self, is_last: bool) -> contextlib.AbstractContextManager[object]:
        if is_last or self.ranks.world == 1:
            return contextlib.nullcontext()
        return cast("DistributedDataParallel", self._objective).no_sync()


def optimizer_states(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Optimizer state of each parameter in a checkpoint: name -> key -> tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_tensors(folder / OPTIMIZER_FILE).items():
        parameter, key = name.rsplit("|", 1)
        found.setdefault(parameter, {})[key] = tensor
    return found
