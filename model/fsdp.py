"""Torch FSDP2 behind the engine's face: weights, gradients and optimizer state spread over the ranks."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model.batches import Batch
from model.engine import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    Hollow,
    Loss,
    Objective,
    optimizer_states,
)
from model.optimizer import LossScale, UpdateRule, adamw, apply_gradients
from model.ranks import Ranks
from model.transformer import Transformer
from model.weights import load_tensors, save_tensors


class FsdpEngine:
    """Every block a unit whose weights are whole only while it computes; the rest is one more unit.

    Source: Zhao et al. 2023 (PyTorch FSDP); per-parameter sharding as in torchtitan.
    """

    def __init__(self, model: Transformer, ranks: Ranks, rule: UpdateRule) -> None:
        self.model, self.ranks, self.rule = model, ranks, rule
        self.scale = LossScale() if rule.precision == "fp16" else None
        self._hollow = Hollow(model)
        self._objective = _spread(model, rule, ranks)
        self._optimizer = adamw(model, rule)
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def backward(
        self, loss: Loss, batch: Batch, totals: Mapping[str, float], *, is_last: bool
    ) -> dict[str, Tensor]:
        self._sharded.set_requires_gradient_sync(is_last)
        self._sharded.set_is_last_backward(is_last)
        figures = self._objective(loss, batch, totals)
        # Ranks are averaged; the loss is already this rank's share of the sum.
        weight = self.ranks.world * (self.scale.value if self.scale else 1)
        (figures["loss"] * weight).backward()
        return {name: value.detach() for name, value in figures.items()}

    def step(self, learning_rate: float, limit: float = math.inf) -> float:
        norm = apply_gradients(
            [self._optimizer],
            self._parameters,
            self.rule,
            self.scale,
            learning_rate=learning_rate,
            limit=limit,
            whole=_whole,
        )
        self.discard()
        return norm

    def discard(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def whole(self) -> Transformer:
        return self._hollow.filled(self._weights())

    def _weights(self) -> dict[str, Tensor]:
        return {name: _whole(value) for name, value in self.model.state_dict().items()}

    def save(self, folder: Path) -> None:
        weights = self._weights()
        states = {
            f"{name}|{key}": _whole(value)
            for name, parameter in self.model.named_parameters()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }
        if not self.ranks.is_first:
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / MODEL_FILE, weights)
        save_tensors(folder / OPTIMIZER_FILE, states)
        if self.scale:
            self.scale.save(folder)

    def load(self, folder: Path) -> None:
        weights, by_name = load_tensors(folder / MODEL_FILE), optimizer_states(folder)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                cast("DTensor", parameter).to_local().copy_(
                    _like(weights[name], parameter).to_local()
                )
                if name in by_name:
                    self._optimizer.state[parameter] = {
                        # The step count stays on the host, as AdamW itself keeps it.
                        key: value if key == "step" else _like(value, parameter)
                        for key, value in by_name[name].items()
                    }
        if self.scale:
            self.scale.load(folder)

    @property
    def _sharded(self) -> FSDPModule:
        return cast("FSDPModule", self._objective)


def _spread(model: Transformer, rule: UpdateRule, ranks: Ranks) -> Objective:
    objective = Objective(model, rule, ranks.device)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in cast("Iterable[nn.Module]", model.blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(whole: Tensor, parameter: Tensor) -> DTensor:
    """Spread a tensor that every rank holds as a parameter is."""
    example = cast("DTensor", parameter)
    return distribute_tensor(
        whole.to(example.device), example.device_mesh, example.placements, src_data_rank=None
    )
