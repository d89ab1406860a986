"""DeepSpeed ZeRO behind the engine's face: optimizer state spread over the ranks (stage 1), gradients
too (2), weights too (3)."""

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.launch import LaunchConfig
from model.batches import Batch
from model.engine import (
    WEIGHTS_FOLDER,
    Hollow,
    Loss,
    Objective,
    optimizer_states,
    snapshot_of,
)
from model.optimizer import LossScale, UpdateRule, adamw, parameter_groups, set_learning_rate
from model.ranks import Ranks
from model.tensor_files import read_whole
from model.transformer import Transformer
from model.weights import Write

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine:
    """DeepSpeed with weights in fp32, also where it computes in fp16, with our scale of the loss.

    Source: Rajbhandari et al. 2020, section 5.
    """

    def __init__(
        self, model: Transformer, ranks: Ranks, rule: UpdateRule, launch: LaunchConfig
    ) -> None:
        stage = int(launch.engine.removeprefix("zero"))
        self.model, self.ranks, self.rule, self.stage = model, ranks, rule, stage
        self.scale = LossScale() if rule.precision == "fp16" else None
        self._is_torch = launch.adamw == "torch"
        self._hollow = Hollow(model) if stage == 3 else None
        self._objective = Objective(model, rule, ranks.device)
        _prepare(ranks)
        # Where it builds its kernels, if the launcher said so.
        if launch.adamw == "deepspeed" and (builds := os.environ.get("TORCH_EXTENSIONS_DIR")):
            if os.environ.get("LOCAL_RANK", "0") == "0":
                release_builds(Path(builds))
            ranks.wait()
        optimizer = _optimizer(model, launch, rule)
        self._decays = [group["weight_decay"] for group in optimizer.param_groups]
        self._engine = _initialise(self._objective, optimizer, zero_options(launch, rule))
        self._zero = self._engine.optimizer

    def backward(
        self, loss: Loss, batch: Batch, totals: Mapping[str, float], *, is_last: bool
    ) -> dict[str, Tensor]:
        self._engine.set_gradient_accumulation_boundary(is_last)
        if self.scale:
            # It divides the gradients by it again before it clips them.
            self._zero.override_loss_scale(self.scale.value)
        figures = self._engine(loss, batch, totals)
        # Ranks are averaged; the loss is already this rank's share of the sum.
        self._engine.backward(figures["loss"] * self.ranks.world, scale_wrt_gas=False)
        return {name: value.detach() for name, value in figures.items()}

    def step(self, learning_rate: float, limit: float = math.inf) -> float:
        if limit < math.inf and limit < (norm := self._norm()) < math.inf:
            self.discard()
        else:
            set_learning_rate(self._zero.param_groups, learning_rate)
            # A norm that is not finite is found inside, and the update left out.
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
        if self.scale:
            self.scale.note(is_finite=math.isfinite(norm))
        return norm

    def _norm(self) -> float:
        """Norm of all gradients, before the step that would tell it; -1 where it is not finite."""
        if self.stage < 3:
            return float(self._zero.scaled_global_norm()) / self._zero.loss_scale
        from deepspeed.runtime.zero.stage3 import combine_grad_norm_groups

        norm = combine_grad_norm_groups(self._zero._get_norm_groups())
        return float(norm) / self._zero.loss_scale

    def discard(self) -> None:
        self._zero.zero_grad(set_to_none=True)
        if self.stage == 3:
            self._zero.averaged_gradients = {}
            return
        # Offloaded gradients are added up from the second micro-batch of a step on.
        self._zero.micro_step_id = -1
        for group in list(self._zero.averaged_gradients):
            self._zero.averaged_gradients[group] = None
            self._zero.all_grad_tensors[group] = None

    def whole(self) -> Transformer:
        return self.model if self._hollow is None else self._hollow.filled(self._weights())

    def _weights(self) -> dict[str, Tensor]:
        from deepspeed import zero

        with zero.GatheredParameters(list(self.model.parameters())):
            return {name: value.clone() for name, value in self.model.state_dict().items()}

    def snapshot(self, *, is_lasting: bool) -> Write:
        weights = self.model.state_dict() if self.stage < 3 else self._told_weights()
        states = self._told_states()
        return snapshot_of(weights, states, self.ranks, self.scale, is_lasting=is_lasting)

    def _told_weights(self) -> dict[str, Tensor]:
        """Those of the first rank, on the host: a device holds one whole tensor at a time."""
        from deepspeed import zero

        weights: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            with zero.GatheredParameters([parameter]):
                if self.ranks.is_first:
                    weights[name] = parameter.detach().to("cpu", copy=True)
        return weights

    def load(self, folder: Path, *, has_optimizer: bool = True) -> None:
        self._load_weights(read_whole(folder / WEIGHTS_FOLDER))
        by_name = optimizer_states(folder) if has_optimizer else {}
        if by_name:
            self._allocate_states(next(iter(by_name.values()))["step"])
        for name, parameter in self._learning():
            for key in MOMENTS if name in by_name else ():
                self._set_state(parameter, key, by_name[name][key])
        if self.scale and has_optimizer:
            self.scale.load(folder)
        self._check_groups()

    def _set_state(self, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, whole, key)
            return
        # DeepSpeed's way to set the whole fails where the last rank's part is not full.
        size = cast("Any", parameter).ds_tensor.numel()
        filled = F.pad(whole.flatten(), (0, size * self.ranks.world - whole.numel()))
        safe_set_local_optimizer_state(
            parameter, filled.narrow(0, size * self.ranks.rank, size), key
        )

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        if self.stage < 3:
            self.model.load_state_dict(weights)
        else:
            from deepspeed import zero

            with (
                torch.no_grad(),
                zero.GatheredParameters(list(self.model.parameters()), modifier_rank=0),
            ):
                self.model.load_state_dict(weights)
        self._zero.refresh_fp32_params()

    def _told_states(self) -> dict[str, Tensor]:
        """Those of the first rank, on the host."""
        from deepspeed.utils import safe_get_full_optimizer_state

        base = self._zero.optimizer.state
        if not base:
            return {}
        self._link_states()
        step = float(next(iter(base.values()))["step"])
        states: dict[str, Tensor] = {}
        for name, parameter in self._learning():
            states[f"{name}|step"] = torch.tensor(step)
            for key in MOMENTS:
                # All ranks put it together.
                whole = cast("Tensor", safe_get_full_optimizer_state(parameter, key))
                if self.ranks.is_first:
                    states[f"{name}|{key}"] = whole.cpu()
        return states

    def _allocate_states(self, step: Tensor) -> None:
        parts = (
            self._zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else self._zero.single_partition_of_fp32_groups
        )
        for part in parts:
            self._zero.optimizer.state[part] = {
                # DeepSpeed's own optimizers count in plain numbers; torch's where the update runs.
                "step": step.to(part.device, copy=True) if self._is_torch else int(step),
                **{key: torch.zeros_like(part) for key in MOMENTS},
            }
        self._link_states()

    def _learning(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _link_states(self) -> None:
        if self.stage == 3:
            return
        # DeepSpeed links parameters to their state after the first group's first step, when the
        # other groups have none yet; so the second group would stay without.
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def _check_groups(self) -> None:
        """Group options are known to have changed silently on a load; a wrong decay diverges."""
        found = [group["weight_decay"] for group in self._zero.param_groups]
        assert found == self._decays, f"DeepSpeed's groups decay {found}, wanted {self._decays}"


def _prepare(ranks: Ranks) -> None:
    """What DeepSpeed reads when it is first imported."""
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _initialise(
    objective: Objective, optimizer: torch.optim.Optimizer, options: dict[str, Any]
) -> Any:
    import deepspeed

    # DeepSpeed calls torch by names that are to go; told anew at every call, that would bury the log.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    # Building the shared-memory all-reduce takes minutes at the first start; gloo does the same sum.
    cast("dict[str, bool]", deepspeed.ops.__compatible_ops__)["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=objective, optimizer=optimizer, dist_init_required=False, config=options
    )
    return engine


def release_builds(folder: Path) -> None:
    """Remove the locks of builds below a folder that died: who starts next would wait for ever.

    A build has its lock open as long as it goes on; one on another machine cannot be seen, and its lock is
    removed, too.
    """
    locks = {str(path.resolve()) for path in folder.rglob("lock")}
    for held in Path("/proc").glob("[0-9]*/fd/*") if locks else ():
        # Of processes that end meanwhile, or are others', nothing is known.
        with contextlib.suppress(OSError):
            locks.discard(str(held.readlink()))
    for lock in locks:
        sys.stderr.write(f"{lock} was left by a build that died, and is removed\n")
        Path(lock).unlink(missing_ok=True)


def _optimizer(model: Transformer, launch: LaunchConfig, rule: UpdateRule) -> torch.optim.Optimizer:
    if launch.adamw == "torch":
        return adamw(model.parameters(), rule)
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    kind = FusedAdam if launch.offload == "none" else DeepSpeedCPUAdam
    groups = parameter_groups(model.parameters(), rule.weight_decay)
    return kind(groups, lr=0.0, betas=rule.betas, eps=rule.eps)


def zero_options(launch: LaunchConfig, rule: UpdateRule) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, and beside it what the launch settings pass through."""
    own = launch.deepspeed
    stage = int(launch.engine.removeprefix("zero"))
    host = {"device": "cpu", "pin_memory": False}
    offloaded: dict[str, Any] = {} if launch.offload == "none" else {"offload_optimizer": host}
    if launch.offload == "parameters":
        offloaded["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": rule.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        **own,
        "zero_optimization": {**own.get("zero_optimization", {}), "stage": stage, **offloaded},
    }
