"""How weights are updated: AdamW or Muon with decay where it belongs, learning rates as functions of the
step, and the scale that keeps float16 gradients from vanishing."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["constant", "linear", "cosine", "wsd", "cosine_stable_decay"]
SCALE_FILE = "loss_scale.json"


@dataclass(frozen=True)
class UpdateRule:
    """What one update does with the gradients of a step."""

    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float = 1.0
    """Largest norm of all gradients together; 0 leaves them as they are."""
    precision: Precision = "fp32"
    """`bf16` and `fp16` compute in 16 bits where that is safe; weights and optimizer stay in float32."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` updates the matrices of the blocks by Muon, everything else by AdamW."""


@dataclass
class LossScale:
    """Factor on the loss that keeps float16 gradients from vanishing: halved by a step whose gradients
    overflow, doubled after `interval` steps in a row that do not.

    Source: Micikevicius et al. 2018, section 3.2; constants of torch.amp.GradScaler.
    """

    value: float = 65_536.0
    good_steps: int = 0
    interval: int = 2000

    def undo(self, gradients: list[Tensor]) -> None:
        """Divide gradients of the scaled loss by the scale, in place."""
        for gradient in gradients:
            gradient.mul_(1 / self.value)

    def note(self, *, is_finite: bool) -> None:
        """Learn whether a step's gradients were finite."""
        if not is_finite:
            self.value, self.good_steps = self.value / 2, 0
            return
        self.good_steps += 1
        if self.good_steps == self.interval:
            self.value, self.good_steps = self.value * 2, 0

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        content = {"value": self.value, "good_steps": self.good_steps}
        (folder / SCALE_FILE).write_text(json.dumps(content), "utf-8")

    def load(self, folder: Path) -> None:
        """Take it from a checkpoint."""
        content = json.loads((folder / SCALE_FILE).read_text("utf-8"))
        self.value, self.good_steps = content["value"], content["good_steps"]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of all gradients together."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


@dataclass(frozen=True)
class Update:
    """One update of a model, or of this rank's part of it, by the gradients that are there."""

    optimizers: Sequence[torch.optim.Optimizer]
    meshes: Sequence[Sequence[nn.Parameter]]
    """Those that learn, apart where they are spread over other meshes of ranks."""
    rule: UpdateRule
    scale: LossScale | None
    norm_of: Callable[[Sequence[nn.Parameter]], Tensor] = gradient_norm
    """Norm of a mesh's gradients over all ranks, where no rank has them all."""

    def step(self, learning_rate: float, limit: float) -> float:
        """Clip the gradients, apply and forget them; their norm before clipping.

        Nothing is changed where the norm is not finite or above the limit.
        """
        if self.scale:
            self.scale.undo([p.grad for mesh in self.meshes for p in mesh if p.grad is not None])
        norms = [self.norm_of(parameters) for parameters in self.meshes]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        is_finite = bool(norm.isfinite())
        if is_finite and norm <= limit:
            for parameters in self.meshes if self.rule.clip_norm else ():
                torch.nn.utils.clip_grads_with_norm_(parameters, self.rule.clip_norm, norm)
            for optimizer in self.optimizers:
                set_learning_rate(optimizer.param_groups, learning_rate)
                optimizer.step()
        if self.scale:
            self.scale.note(is_finite=is_finite)
        self.discard()
        return norm.item()

    def discard(self) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)


def build_optimizers(
    named: Iterable[tuple[str, nn.Parameter]], rule: UpdateRule
) -> list[torch.optim.Optimizer]:
    """One or two optimizers that together hold those that learn; the rate is set at every step.

    Muon takes the matrices of the blocks, with the factor that lets it share AdamW's learning rate and
    decay. Source: Jordan et al. 2024; factor: Liu et al. 2025 (Moonlight), equation 4.
    """
    learning = [(name, p) for name, p in named if p.requires_grad]
    is_muon = rule.optimizer == "muon"
    hidden = [p for name, p in learning if is_muon and p.dim() == 2 and ".blocks." in f".{name}"]
    taken = {id(p) for p in hidden}
    found: list[torch.optim.Optimizer] = []
    if hidden:
        decay = rule.weight_decay
        found += [
            torch.optim.Muon(hidden, lr=0.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        ]
    if rest := [p for _, p in learning if id(p) not in taken]:
        found += [adamw(rest, rule)]
    return found


def parameter_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Weights of two and more dimensions decay; norms and biases do not."""
    learning = [p for p in parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learning if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(parameters: Iterable[nn.Parameter], rule: UpdateRule) -> torch.optim.AdamW:
    """AdamW over those that learn; the learning rate is set at every step.

    Source: Loshchilov and Hutter 2019, algorithm 2.
    """
    groups = parameter_groups(parameters, rule.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=rule.betas, eps=rule.eps, fused=True)


def set_learning_rate(groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    """Give every group of an optimizer that learning rate."""
    for group in groups:
        group["lr"] = learning_rate


def learning_rate(
    step: int,
    *,
    schedule: Schedule,
    peak: float,
    steps: int,
    warmup_steps: int = 0,
    floor: float = 0.1,
    stable_share: float = 0.5,
    decay_share: float = 0.2,
    cycle: float = 1.0,
    cosine_level: float | None = None,
    stable_level: float | None = None,
) -> float:
    """Learning rate of the update number `step`, 0 to steps - 1.

    The first `warmup_steps` updates rise linearly, the last of them to `peak`. After it:
    - constant: `peak` to the end;
    - linear: straight from `peak` to `floor` x peak;
    - cosine: half a cosine from `peak` to `floor` x peak (Loshchilov and Hutter 2017, equation 5); with
      `cycle` above 1 the run ends before the cosine does (Hoffmann et al. 2022, appendix B: up to 1.25);
    - wsd: `peak`, then the last `decay_share` of all steps straight to `floor` x peak (Hu et al. 2024,
      MiniCPM, equation 1, with a linear decay);
    - cosine_stable_decay: half a cosine to `cosine_level` x peak, `stable_share` of all steps at
      `stable_level` x peak, then the last `decay_share` straight to `floor` x peak. The stable level is
      the middle between peak and floor unless given, and the cosine ends there unless told otherwise.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    after = max(1, steps - warmup_steps)
    done = min(1.0, (step - warmup_steps) / after)
    low = floor * peak
    match schedule:
        case "constant":
            return peak
        case "linear":
            return peak + (low - peak) * done
        case "cosine":
            return low + (peak - low) * _half_cosine(done / cycle)
        case "wsd":
            return peak + (low - peak) * _decayed(step, steps, decay_share)
        case "cosine_stable_decay":
            stable = (peak + low) / 2 if stable_level is None else stable_level * peak
            end = stable if cosine_level is None else cosine_level * peak
            falling = max(1.0, steps * (1 - decay_share - stable_share) - warmup_steps)
            fallen = (step - warmup_steps) / falling
            if fallen < 1 - 1e-9:
                return end + (peak - end) * _half_cosine(fallen / cycle)
            return stable + (low - stable) * _decayed(step, steps, decay_share)


def _half_cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _decayed(step: int, steps: int, share: float) -> float:
    """How much of the final decay is behind: 0 before it starts, 1 at the end."""
    length = share * steps
    return 0.0 if length <= 0 else min(1.0, max(0.0, (step - (steps - length)) / length))
