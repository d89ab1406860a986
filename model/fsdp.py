"""Torch FSDP2 behind the engine's face: weights, gradients and optimizer state spread over the ranks; and
tensor parallelism beneath it, where several processes compute each block together."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from conf.launch import LaunchConfig
from model.batches import Batch
from model.engine import (
    OPTIMIZER_FOLDER,
    WEIGHTS_FOLDER,
    Hollow,
    Loss,
    Objective,
    by_parameter,
    load_states,
    snapshot_of,
    states_of,
)
from model.optimizer import (
    LossScale,
    Update,
    UpdateRule,
    build_optimizers,
    gradient_norm,
)
from model.ranks import Ranks
from model.tensor_files import outlines_in, read_into
from model.transformer import Block, Transformer
from model.weights import Write


class FsdpEngine:
    """Every block a unit whose weights are whole only while it computes; the rest is one more unit.

    Source: Zhao et al. 2023 (PyTorch FSDP); per-parameter sharding as in torchtitan.
    """

    def __init__(
        self, model: Transformer, ranks: Ranks, rule: UpdateRule, launch: LaunchConfig
    ) -> None:
        self.model, self.ranks, self.rule = model, ranks, rule
        self.scale = LossScale() if rule.precision == "fp16" else None
        self._hollow = Hollow(model)
        self._objective = _spread(model, rule, ranks, launch)
        meshes = _by_mesh((name, p) for name, p in model.named_parameters() if p.requires_grad)
        self._update = Update(
            [o for named in meshes for o in build_optimizers(named, rule)],
            [[p for _, p in named] for named in meshes],
            rule,
            self.scale,
            norm_of=lambda parameters: _whole(gradient_norm(parameters)),
        )

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
        return self._update.step(learning_rate, limit)

    def discard(self) -> None:
        self._update.discard()

    def whole(self) -> Transformer:
        return self._hollow.filled(
            {name: value.to(self.ranks.device) for name, value in self._weights().items()}
        )

    def _weights(self) -> dict[str, Tensor]:
        return {name: _whole(value) for name, value in self.model.state_dict().items()}

    def snapshot(self, *, is_lasting: bool) -> Write:
        states = states_of(self.model, self._update.optimizers)
        return snapshot_of(
            self.model.state_dict(), states, self.ranks, self.scale, is_lasting=is_lasting
        )

    def load(self, folder: Path, *, has_optimizer: bool = True) -> None:
        parameters = dict(self.model.named_parameters())
        read_into(folder / WEIGHTS_FOLDER, parameters)
        if not has_optimizer:
            return
        states = {
            name: torch.empty_like(parameters[name.rsplit("|", 1)[0]])
            if outline.dim()
            else torch.empty_like(outline, device="cpu")
            for name, outline in outlines_in(folder / OPTIMIZER_FOLDER).items()
        }
        read_into(folder / OPTIMIZER_FOLDER, states)
        load_states(self.model, self._update.optimizers, by_parameter(states))
        if self.scale:
            self.scale.load(folder)

    @property
    def _sharded(self) -> FSDPModule:
        return cast("FSDPModule", self._objective)


def _spread(model: Transformer, rule: UpdateRule, ranks: Ranks, launch: LaunchConfig) -> Objective:
    objective = Objective(model, rule, ranks.device)
    is_cuda = ranks.device.type == "cuda"
    offload = (
        CPUOffloadPolicy(pin_memory=is_cuda) if launch.offload == "parameters" else OffloadPolicy()
    )
    mesh = init_device_mesh(
        ranks.device.type, (ranks.world, ranks.peers), mesh_dim_names=("data", "tensor")
    )
    for block in cast("Iterable[Block]", model.blocks):
        if ranks.peers > 1:
            parallelize_module(block, mesh["tensor"], _parts_of(block))
        fully_shard(block, mesh=mesh["data"], offload_policy=offload)
    fully_shard(objective, mesh=mesh["data"], offload_policy=offload)
    return objective


def _parts_of(block: Block) -> dict[str, ParallelStyle]:
    """Each process has some heads and some of the feed-forward width; two sums a block join them.

    Source: Shoeybi et al. 2019 (Megatron-LM), section 3.
    """
    plan: dict[str, ParallelStyle] = dict.fromkeys(
        ("query", "key", "value", "gate", "up"), ColwiseParallel()
    )
    plan |= dict.fromkeys(("attention_out", "ffn_out"), RowwiseParallel())
    if block.query_norm is not None:
        # Its weight is the same for all heads, of which each process has some: gradients are summed.
        of_heads = SequenceParallel(sequence_dim=1, use_local_output=True)
        plan |= dict.fromkeys(("query_norm", "key_norm"), of_heads)
    return plan


Named = tuple[str, nn.Parameter]


def _by_mesh(parameters: Iterable[Named]) -> list[list[Named]]:
    """Parameters that are spread alike: what torch does to many tensors at once wants one mesh."""
    found: dict[DeviceMesh, list[Named]] = {}
    for name, parameter in parameters:
        found.setdefault(cast("DTensor", parameter).device_mesh, []).append((name, parameter))
    return list(found.values())


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
