"""Settings of pretraining, and how many steps they come to on given data."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from conf.curriculum import CurriculumConfig
from conf.launch import DEEPSPEED_ENGINES, LaunchConfig
from conf.settings import RUNTIME, Settings
from conf.shape import ShapeConfig

MOST_EPOCHS = 4
"""Up to so many passes a text teaches nearly as much as a new one (Muennighoff et al. 2023, section 5)."""
MOST_NEW_SHARE = 0.15
"""Share of domains that the policy to continue has not read, above which it forgets what it has."""


class PhaseConfig(Settings):
    """A part of pretraining with a mixture of its own."""

    tokens: Annotated[float, Field(gt=0, le=1)]
    """Share of all tokens; the shares of all phases add up to 1."""
    mix: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict[str, float])
    """Domain -> share; domains that are not named are left out. Empty: each by its number of tokens."""


class PretrainConfig(Settings):
    """How a language model is trained from token files."""

    shape: ShapeConfig = ShapeConfig()
    """The model; when an existing policy is continued it must be the policy's."""
    tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens to train on, rounded up to whole steps; 0 to go by `epochs`."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training tokens of all domains that the phases use, when `tokens` is 0."""
    batch_tokens: Annotated[int, Field(ge=8)] = 16_384
    """Tokens of one step over all ranks; a multiple of `context`. Real runs take 0.5M to 4M
    (Brown et al. 2020, table 2.1)."""
    context: Annotated[int, Field(ge=0)] = 0
    """Tokens of a training row; 0 for the shape's context."""
    phases: tuple[PhaseConfig, ...] = ()
    """Phases in order; none for one phase in which each domain has the share of its tokens."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """What training begins with: easy documents, short rows, frequent tokens."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Highest learning rate (Touvron et al. 2023, table 2: 3e-4 at 7B; smaller models bear more)."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "cosine_stable_decay"] = "cosine"
    """Course of the learning rate after warm-up; model/optimizer.py defines each."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the learning rate rises from 0 to the highest."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Last learning rate as a share of the highest (Hoffmann et al. 2022, section 3.1)."""
    stable: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the steps at the middle level; for cosine_stable_decay."""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the steps of the last descent; for wsd and cosine_stable_decay (Hu et al. 2024: 0.1)."""
    cycle: Annotated[float, Field(ge=1, le=1.25)] = 1.0
    """Length of the cosine as a share of the part of the run that follows it; above 1 the run ends, or
    the stable part begins, before it has come all the way down (Hoffmann et al. 2022, appendix B)."""
    cosine_level: Annotated[float, Field(ge=0, le=1)] | None = None
    """Where the cosine of cosine_stable_decay ends, as a share of the highest; none for the stable level."""
    stable_level: Annotated[float, Field(gt=0, le=1)] | None = None
    """Stable level of cosine_stable_decay as a share of the highest, also above where the cosine ended;
    none for the middle between highest and `floor`."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` updates the matrices of the blocks by orthogonalised momentum (Jordan et al. 2024; scaled to
    AdamW's rates as in Liu et al. 2025), embeddings, head and norms by AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """AdamW's decay of matrices; norms and biases have none (Brown et al. 2020, appendix B)."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Memory of AdamW's second moment (Brown et al. 2020, appendix B)."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradients; 0 for no limit (Brown et al. 2020, appendix B)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the model computes in; weights and optimizer are fp32 either way. `fp16` scales the loss, for
    devices without bfloat16."""
    is_document_masked: bool = False
    """Whether a token is kept from seeing other documents of its row."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of initial weights, order of the data and dropout."""
    bad_steps: Annotated[int, Field(ge=1)] = 5
    """So many steps in a row whose update was left out end the job, with the names of their samples."""
    guard_sigmas: Annotated[float, Field(ge=0)] = 6.0
    """An update is left out when loss or gradient norm lies so many standard deviations above the mean of
    the last 128 good steps of its phase (from 64 of them on); 0 for only when they are not finite."""
    exclude: tuple[Annotated[str, Field(pattern=r"^.+/\d+$")], ...] = ()
    """Samples, as the guard named them (`web/812`), whose labels train nothing."""
    stop_patience: Annotated[int, Field(ge=0)] = 0
    """So many looks in a row at the held-out loss (over the tokens of all domains) without a gain end the
    training, and the policy is that of the best look; 0 for never, and the policy of the last step."""
    stop_gain: Annotated[float, Field(ge=0)] = 0.0
    """A gain lowers the held-out loss by more than so many nats per token."""
    keep_best: bool = False
    """Whether the policy is that of the look with the lowest held-out loss, as with `stop_patience`, though
    the training goes on to its last step."""
    held_tokens: Annotated[int, Field(ge=0), RUNTIME] = 65_536
    """Held-out tokens per domain, whole documents, on which the loss is followed; 0 for none."""
    evaluate_every_steps: Annotated[int, Field(ge=0), RUNTIME] = 100
    """Steps between two looks at the held-out loss; 0 for none."""
    kept_looks: Annotated[int, Field(ge=0)] = 0
    """Every so many looks the weights are kept in the policy, for curves of exam scores
    (`evaluate.has_curve`); 0 for none."""
    prompts: Annotated[tuple[str, ...], RUNTIME] = ()
    """Texts that the model continues at every look, by its likeliest tokens; `samples.jsonl` of the stage's
    logs, its page and MLflow show what it writes."""
    prompt_tokens: Annotated[int, Field(ge=1), RUNTIME] = 48
    """Longest continuation in tokens, at most half the context; of longer prompts the end is read."""
    checkpoint_every_steps: Annotated[int, Field(ge=0), RUNTIME] = 0
    """Steps between two checkpoints, besides those by `launch.checkpoint_seconds`; 0 for none."""
    launch: Annotated[LaunchConfig, RUNTIME] = LaunchConfig()
    """Where and how the job runs."""

    @model_validator(mode="after")
    def _fits(self) -> "PretrainConfig":
        if self.context > self.shape.context:
            raise ValueError(
                f"context={self.context} is longer than the model's shape.context="
                f"{self.shape.context}; lower the one or raise the other"
            )
        if self.batch_tokens % self.row_tokens:
            nearest = max(1, round(self.batch_tokens / self.row_tokens)) * self.row_tokens
            raise ValueError(
                f"batch_tokens={self.batch_tokens} is not a multiple of the row of {self.row_tokens} "
                f"tokens; use {nearest}"
            )
        if self.optimizer == "muon" and self.launch.engine in DEEPSPEED_ENGINES:
            raise ValueError(
                f"optimizer=muon needs whole matrices, which launch.engine={self.launch.engine} cuts into "
                f"pieces; use launch.engine=fsdp or optimizer=adamw"
            )
        self._refuse_unfit_curriculum()
        wanting = [
            name
            for name in ("stop_patience", "keep_best", "prompts", "kept_looks")
            if getattr(self, name)
        ]
        if wanting and not (self.held_tokens and self.evaluate_every_steps):
            raise ValueError(
                f"{wanting[0]}={getattr(self, wanting[0])} needs looks at the held-out loss, of which there "
                f"are none; set held_tokens and evaluate_every_steps above 0, or leave {wanting[0]} out"
            )
        total = sum(phase.tokens for phase in self.phases)
        if self.phases and abs(total - 1) > 1e-6:
            raise ValueError(f"the phases' shares of tokens add up to {total:g}; make it 1")
        return self

    def identity(self) -> dict[str, Any]:
        """Where looks at the held-out loss decide what is kept, when and at what they look counts, too."""
        decides = self.keeps_best or self.kept_looks
        looks = ("held_tokens", "evaluate_every_steps") if decides else ()
        return super().identity() | {name: getattr(self, name) for name in looks}

    def _refuse_unfit_curriculum(self) -> None:
        first = self.curriculum.first_row_tokens
        # A power of two has a single bit.
        if first and (self.row_tokens % first or (self.row_tokens // first).bit_count() != 1):
            halves = [self.row_tokens >> times for times in range(1, 5)]
            raise ValueError(
                f"curriculum.first_row_tokens={first} does not double to the row of {self.row_tokens} "
                f"tokens; use one of {', '.join(str(half) for half in halves if half)}"
            )
        if self.curriculum.domain_order and self.phases:
            raise ValueError(
                "curriculum.domain_order and phases both say which domain comes when; give one of them"
            )

    @property
    def keeps_best(self) -> bool:
        """Whether the policy is that of the best look."""
        return self.keep_best or self.stop_patience > 0

    @property
    def row_tokens(self) -> int:
        """Tokens of a training row."""
        return self.context or self.shape.context

    @property
    def batch_rows(self) -> int:
        """Rows of one step over all ranks."""
        return self.batch_tokens // self.row_tokens

    def plan(self, domains: Mapping[str, int]) -> "PretrainPlan":
        """What the settings come to on so many training tokens per domain.

        Raises ValueError for a mixture that names an unknown or empty domain, or too little data.
        """
        names = sorted(domains)
        if max(domains.values(), default=0) < self.row_tokens:
            raise ValueError(
                f"no domain has the {self.row_tokens} training tokens of one row (found "
                f"{dict(domains)}); give more data or a smaller context"
            )
        phases = self.phases or _one_by_one(self.curriculum.domain_order, domains)
        mixes = [_mix(phase.mix, domains) for phase in phases]
        used = {name for mix in mixes for name, share in mix.items() if share > 0}
        rows = sum(math.ceil(domains[name] / self.row_tokens) for name in used)
        wanted = self.tokens / self.row_tokens if self.tokens else self.epochs * rows
        steps = max(1, math.ceil(wanted / self.batch_rows - 1e-9))
        return PretrainPlan(
            steps=steps,
            warmup_steps=round(self.warmup * steps),
            batch_rows=self.batch_rows,
            domains=tuple(names),
            windows=tuple(math.ceil(domains[name] / self.row_tokens) for name in names),
            phases=_phases(phases, mixes, names, steps),
        )


@dataclass(frozen=True)
class PretrainPlan:
    """Steps of a pretraining."""

    steps: int
    warmup_steps: int
    domains: tuple[str, ...]
    """All domains of the data, sorted; the order of the shares."""
    phases: tuple[tuple[int, tuple[float, ...]], ...]
    """Steps of each phase, and the share of each domain in it."""
    batch_rows: int
    """Rows of a step."""
    windows: tuple[int, ...]
    """Rows that each domain has."""

    @property
    def shares(self) -> dict[str, float]:
        """Share of each domain in the whole training."""
        found = dict.fromkeys(self.domains, 0.0)
        for steps, shares in self.phases:
            for name, share in zip(self.domains, shares, strict=True):
                found[name] += steps / self.steps * share / sum(shares)
        return found

    @property
    def epochs(self) -> dict[str, float]:
        """How often the training reads each domain that it reads."""
        rows = self.steps * self.batch_rows
        return {
            name: share * rows / windows
            for (name, share), windows in zip(self.shares.items(), self.windows, strict=True)
            if share
        }

    def warnings(self, known: Collection[str] | None = None) -> list[str]:
        """What to think about before it runs, a sentence each; `known` are the domains that the policy
        to continue has read, where there is such a policy and it says so."""
        found = [
            f"domain {name} is read {epochs:.1f} times, and more than {MOST_EPOCHS} teach little: add data, "
            f"lower pretrain.tokens, or give it a smaller share of the mix"
            for name, epochs in self.epochs.items()
            # A training is rounded up to whole steps.
            if round(epochs, 1) > MOST_EPOCHS
        ]
        shares = self.shares.items() if known is not None else ()
        new = {name: share for name, share in shares if share and name not in (known or ())}
        if (total := sum(new.values())) > MOST_NEW_SHARE:
            found.append(
                f"{total:.0%} of the tokens are of domains that the policy to continue has not read "
                f"({', '.join(new)}), and above {MOST_NEW_SHARE:.0%} it forgets what it knows: mix in more "
                f"of what it has read"
            )
        return found


def _one_by_one(order: Sequence[str], domains: Mapping[str, int]) -> tuple[PhaseConfig, ...]:
    """A phase for each domain, as long as its share of their tokens; without an order a single one."""
    if not order:
        return (PhaseConfig(tokens=1),)
    _mix(dict.fromkeys(order, 1.0), domains)
    total = sum(domains[name] for name in order)
    return tuple(PhaseConfig(tokens=domains[name] / total, mix={name: 1.0}) for name in order)


def _mix(mix: Mapping[str, float], domains: Mapping[str, int]) -> dict[str, float]:
    if not mix:
        return {name: float(tokens) for name, tokens in domains.items()}
    for name, share in mix.items():
        if share > 0 and not domains.get(name):
            known = ", ".join(sorted(name for name, tokens in domains.items() if tokens))
            raise ValueError(
                f"the mix names domain {name!r}, of which there are no training tokens; the data has "
                f"{known}"
            )
    if not sum(mix.values()) > 0:
        raise ValueError("a mix gives every domain the share 0; give one of them more")
    return dict(mix)


def _phases(
    phases: tuple[PhaseConfig, ...],
    mixes: list[dict[str, float]],
    names: list[str],
    steps: int,
) -> tuple[tuple[int, tuple[float, ...]], ...]:
    shares = [phase.tokens for phase in phases]
    ends = [round(steps * sum(shares[: number + 1])) for number in range(len(shares))]
    starts = [0, *ends[:-1]]
    return tuple(
        (end - start, tuple(mix.get(name, 0.0) for name in names))
        for start, end, mix in zip(starts, ends, mixes, strict=True)
        if end > start
    )
