"""Pipeline stages behind the engine's face: each process has some blocks of the model, and the micro-batches
of a step pass through all of them. Pipelines side by side add up their gradients."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

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
from model.optimizer import LossScale, Update, UpdateRule, build_optimizers, gradient_norm
from model.ranks import Ranks
from model.tensor_files import outlines_in, read_into
from model.transformer import Transformer
from model.weights import Write


class PipelineEngine:
    """Micro-batches are held back until the last of a step, and then sent through one after another.

    Source: Narayanan et al. 2021, section 2.2.1 (one forward, one backward); Huang et al. 2019 (GPipe)
    where a step has fewer micro-batches than the pipeline has stages.
    """

    def __init__(self, model: Transformer, ranks: Ranks, rule: UpdateRule) -> None:
        self.model, self.ranks, self.rule = model, ranks, rule
        self.scale = LossScale() if rule.precision == "fp16" else None
        self._hollow = Hollow(model)
        mesh = init_device_mesh(
            ranks.device.type, (ranks.world, ranks.peers), mesh_dim_names=("data", "stage")
        )
        self._stages, self._data = mesh.get_group("stage"), mesh.get_group("data")
        # A tied embedding stands at both ends, which add up what they learn for it.
        is_tied = model.shape.is_tied and not model.is_scalar
        self._ends = _group_of_ends(ranks) if is_tied else None
        self._has_copy = is_tied and ranks.peer == ranks.peers - 1
        entry = _keep_part(model, ranks)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        optimizers = build_optimizers(model.named_parameters(), rule)
        self._update = Update(optimizers, [self._parameters], rule, self.scale, self._norm)
        objective = Objective(model, rule, ranks.device)
        self._line = _Line(_Part(model, entry, objective, ranks), self._stages)
        self._waiting: list[_Work] = []

    def backward(
        self, loss: Loss, batch: Batch, totals: Mapping[str, float], *, is_last: bool
    ) -> dict[str, Tensor]:
        self._waiting.append(_asked(loss, batch.to(self.ranks.device), totals))
        if not is_last:
            return {}
        waiting, self._waiting = self._waiting, []
        figures = self._line.run(waiting, self.scale.value if self.scale else 1.0)
        for group, parameters in (
            (self._ends, [self.model.embedding.weight] if self._ends else []),
            (self._data, self._parameters if self.ranks.world > 1 else []),
        ):
            for parameter in parameters:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=group)
        # The end of the pipeline alone knows them; a tensor on CUDA would arrive on the sender's device.
        known = [{name: value.cpu() for name, value in figures.items()}]
        dist.broadcast_object_list(
            known, group=self._stages, group_src=self.ranks.peers - 1, device=self.ranks.device
        )
        return known[0]

    def step(self, learning_rate: float, limit: float = math.inf) -> float:
        return self._update.step(learning_rate, limit)

    def discard(self) -> None:
        self._update.discard()

    def _norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        left_out = self.model.embedding.weight if self._has_copy else None
        square = gradient_norm(p for p in parameters if p is not left_out).square()
        dist.all_reduce(square, group=self._stages)
        return square.sqrt()

    def whole(self) -> Transformer:
        return self._hollow.filled(self._collected(self.model.state_dict()))

    def snapshot(self, *, is_lasting: bool) -> Write:
        """Each stage of the first pipeline writes what it has."""
        weights, states = (
            {name: value for name, value in tensors.items() if not self._is_copy(name)}
            for tensors in (
                self.model.state_dict(),
                states_of(self.model, self._update.optimizers),
            )
        )
        return snapshot_of(
            weights,
            states,
            self.ranks,
            self.scale,
            is_lasting=is_lasting,
            is_teller=self.ranks.rank == 0,
        )

    def _is_copy(self, name: str) -> bool:
        """Whether a tensor is that of the tied embedding where it stands for the second time."""
        return self._has_copy and name.startswith("embedding.")

    def load(self, folder: Path, *, has_optimizer: bool = True) -> None:
        own = dict(self.model.named_parameters())
        read_into(folder / WEIGHTS_FOLDER, own)
        if not has_optimizer:
            return
        states = {
            name: torch.empty_like(outline, device="cpu")
            for name, outline in outlines_in(folder / OPTIMIZER_FOLDER).items()
            if name.rsplit("|", 1)[0] in own
        }
        read_into(folder / OPTIMIZER_FOLDER, states)
        load_states(self.model, self._update.optimizers, by_parameter(states))
        if self.scale:
            self.scale.load(folder)

    def _collected(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all stages, on each of them."""
        held: list[dict[str, Tensor]] = [{}] * self.ranks.peers
        outlines = {name: torch.empty_like(value, device="meta") for name, value in own.items()}
        dist.all_gather_object(held, outlines, group=self._stages)
        found: dict[str, Tensor] = {}
        for peer, there in enumerate(held):
            for name, outline in there.items():
                if name in found:
                    continue
                if peer == self.ranks.peer:
                    found[name] = own[name].detach().to(self.ranks.device).contiguous()
                else:
                    found[name] = torch.empty_like(outline, device=self.ranks.device)
                dist.broadcast(found[name], group=self._stages, group_src=peer)
        return found


class _Work(NamedTuple):
    """One micro-batch, and what its loss asks of the model."""

    loss: Loss
    batch: Batch
    totals: Mapping[str, float]
    ids: Tensor
    arguments: dict[str, Any]


class _Asked(Exception):
    """A loss has asked for the states of these token ids."""

    def __init__(self, ids: Tensor, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.ids, self.arguments = ids, arguments


class _Listener:
    """Stands for the model until a loss asks for its states."""

    def hidden(self, ids: Tensor, **arguments: Any) -> Tensor:
        raise _Asked(ids, arguments)


class _Known:
    """Stands for the model once the states are there."""

    def __init__(self, model: Transformer, states: Tensor) -> None:
        self._model, self._states = model, states

    def hidden(self, ids: Tensor, **arguments: Any) -> Tensor:
        return self._states

    @property
    def head_weight(self) -> Tensor:
        return self._model.head_weight

    def score(self, hidden: Tensor) -> Tensor:
        return self._model.score(hidden)


def _asked(loss: Loss, batch: Batch, totals: Mapping[str, float]) -> _Work:
    """Every stage needs the ids and the mask for its blocks; only the loss knows how they are made."""
    try:
        loss(cast("Transformer", _Listener()), batch, totals)
    except _Asked as asked:
        return _Work(loss, batch, totals, asked.ids, asked.arguments)
    raise AssertionError("a loss that never looks at the model's states cannot be trained")


class _Received(nn.Module):
    """Stands for the embedding where states come from the process before."""

    def __init__(self, weight: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.states: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        assert self.states is not None
        return self.states[: ids.shape[0], : ids.shape[1]]


class _Elsewhere(nn.Module):
    """Stands for a block that another process has, so that the others keep their names."""

    is_windowed = False

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        return x


def _keep_part(model: Transformer, ranks: Ranks) -> _Received | None:
    """Take out of a model what other stages have; what stands for its embedding now, if anything."""
    own = set(torch.arange(len(model.blocks)).tensor_split(ranks.peers)[ranks.peer].tolist())
    for number in range(len(model.blocks)):
        if number not in own:
            model.blocks[number] = _Elsewhere()
    if ranks.peer < ranks.peers - 1:
        model.norm = cast("Any", nn.Identity())
        model.head = model.score_head = None
    if ranks.peer == 0:
        return None
    needs_embedding = ranks.peer == ranks.peers - 1 and model.shape.is_tied and not model.is_scalar
    weight = cast("nn.Parameter", model.embedding.weight)
    received = _Received(weight if needs_embedding else None)
    model.embedding = cast("Any", received)
    return received


class _Part(nn.Module):
    """The blocks of one stage, as torch's schedules call them."""

    def __init__(
        self, model: Transformer, entry: _Received | None, objective: Objective, ranks: Ranks
    ) -> None:
        super().__init__()
        self.model, self.entry, self.ranks = model, entry, ranks
        self.is_end = ranks.peer == ranks.peers - 1
        self.precision = objective.precision
        self.work: Sequence[_Work] = ()
        self.turn = 0
        self.weight = 1.0
        self.figures: dict[str, Tensor] = {}

    def forward(self, received: Tensor) -> Tensor:
        """States of the next micro-batch, (B, T, D), filled up to the largest where they travel on."""
        if self.entry is not None:
            self.entry.states = received
        work = self.work[self.turn]
        self.turn += 1
        with self.precision():
            states = self.model.hidden(work.ids, **work.arguments)
        if self.is_end:
            return states
        rows, tokens = self.room()
        return F.pad(states, (0, 0, 0, tokens - states.shape[1], 0, rows - states.shape[0]))

    def loss(self, states: Tensor, number: Tensor) -> Tensor:
        """The loss that a micro-batch adds; its figures are added up beside it."""
        work = self.work[int(number)]
        with self.precision():
            known = cast("Transformer", _Known(self.model, states))
            added = work.loss(known, work.batch, work.totals)
        for name, value in added.items():
            so_far = self.figures.get(name)
            self.figures[name] = value.detach() if so_far is None else so_far + value.detach()
        return added["loss"] * self.weight

    def room(self) -> tuple[int, int]:
        """Rows and tokens of the largest micro-batch."""
        sizes = [work.ids.shape for work in self.work]
        return max(size[0] for size in sizes), max(size[1] for size in sizes)


class _Line:
    """Sends the micro-batches of a step through all stages."""

    def __init__(self, part: _Part, group: dist.ProcessGroup) -> None:
        self._part, self._group = part, group

    def run(self, work: Sequence[_Work], weight: float) -> dict[str, Tensor]:
        """Add the gradients of all micro-batches; their figures, at the end of the pipeline."""
        part, ranks = self._part, self._part.ranks
        part.work, part.turn, part.weight, part.figures = work, 0, weight, {}
        states = torch.empty(
            *part.room(), part.model.shape.dim, device=ranks.device, requires_grad=True
        )
        numbers = torch.arange(len(work))
        is_first = ranks.peer == 0
        stage = PipelineStage(
            part,
            ranks.peer,
            ranks.peers,
            ranks.device,
            input_args=numbers[:1] if is_first else states,
            output_args=states,
            group=self._group,
        )
        kind = Schedule1F1B if len(work) >= ranks.peers else ScheduleGPipe
        schedule = kind(stage, len(work), loss_fn=part.loss, scale_grads=False)
        schedule.step(
            *((numbers,) if is_first else ()),
            target=numbers if part.is_end else None,
            return_outputs=False,
        )
        return part.figures


def _group_of_ends(ranks: Ranks) -> dist.ProcessGroup | None:
    """First and last stage of this pipeline; none in between. All processes make all groups."""
    own: dist.ProcessGroup | None = None
    for rank in range(ranks.world):
        ends = [rank * ranks.peers, (rank + 1) * ranks.peers - 1]
        group = dist.new_group(ends)
        if ranks.place in ends:
            own = cast("dist.ProcessGroup", group)
    return own
