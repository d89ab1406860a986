"""Settings of the stage dpo."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from conf.launch import LaunchConfig
from conf.lora import LoraConfig
from conf.settings import RUNTIME, Settings


class DpoConfig(Settings):
    """How a policy learns from preferences directly."""

    loss: Literal[
        "sigmoid", "ipo", "ipo_sum", "hinge", "robust", "apo_zero", "simpo", "orpo", "kto"
    ] = "sigmoid"
    """What of the difference to the reference is minimised. `ipo` takes means per token, `ipo_sum` sums;
    `simpo` and `orpo` take means of the policy alone; `kto` weighs each answer by itself, against how far
    the policy strays on answers to other prompts of the step (one more forward pass); it alone learns from
    single answers with a label, too (`pairs.labelled`)."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the pull to the reference, per nat; for `simpo` the scale of rewards (2 is usual), for
    `orpo` the weight of the odds."""
    gamma: Annotated[float, Field(ge=0)] = 0.5
    """Margin that `simpo` asks for, in rewards."""
    rpo_alpha: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the chosen answers' mean negative log-likelihood per token, which keeps the policy
    from making both answers unlikely; 0 for plain DPO."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs taken to be labelled the wrong way round (sigmoid, robust and simpo)."""
    order: Literal["mixed", "easy_first"] = "mixed"
    """`easy_first`: the first epoch goes from the pairs that the reference tells apart best to those that
    it takes the wrong way round."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the pairs."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Ends after so many updates, if that is earlier; 0 for no limit."""
    batch_rows: Annotated[int, Field(ge=1)] = 32
    """Pairs per update, over all processes."""
    context: Annotated[int, Field(ge=0)] = 0
    """Longest prompt and answer in tokens; the prompt is cut from the left. 0 for the model's."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the updates in which the learning rate rises."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Last learning rate as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decay of weight matrices per update, times the learning rate."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradients; 0 for no limit."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the model computes in; weights and optimizer are float32 either way."""
    on_gate: Literal["fail", "keep_best", "off"] = "off"
    """What happens when a look at the held-out pairs finds that the policy fell apart: `fail` ends the
    stage, `keep_best` ends the training; it also keeps the weights of the look with the best accuracy."""
    gate_chosen_reward: float = -10.0
    """Least mean reward (beta times the log-ratio to the reference) of held-out chosen answers that is no
    falling apart; chosen answers that become unlikely are how DPO degenerates."""
    gate_sound_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Least share of sampled answers that end and do not repeat themselves; needs `gate_answers`."""
    gate_answers: Annotated[int, Field(ge=0)] = 0
    """Held-out prompts that are answered at each look; 0 for none."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest of those answers in tokens."""
    lora: LoraConfig = LoraConfig()
    """A low-rank correction that is learnt in place of all weights, and merged into them at the end."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the order of the pairs."""
    evaluate_every_steps: Annotated[int, Field(ge=0)] = 50
    """Updates between two looks at the held-out pairs; 0 for those before and behind all updates alone."""
    checkpoint_every_steps: Annotated[int, Field(ge=0), RUNTIME] = 0
    """Updates between two checkpoints, besides those by time; 0 for by time alone."""
    launch: Annotated[LaunchConfig, RUNTIME] = LaunchConfig()
    """Where and how the job runs."""

    @model_validator(mode="after")
    def _engine_fits(self) -> "DpoConfig":
        self.lora.refuse_engine(self.launch)
        return self

    @model_validator(mode="after")
    def _smoothing_has_a_meaning(self) -> "DpoConfig":
        if self.label_smoothing and self.loss not in ("sigmoid", "robust", "simpo"):
            raise ValueError(
                f"label_smoothing={self.label_smoothing} has no meaning for loss={self.loss}; "
                "set it to 0, or use the loss sigmoid, robust or simpo"
            )
        return self

    @model_validator(mode="after")
    def _kto_has_other_prompts(self) -> "DpoConfig":
        if self.loss == "kto" and self.batch_rows < 2:
            raise ValueError(
                f"batch_rows={self.batch_rows} leaves loss=kto no other prompt to compare with; "
                "use 2 or more, or another loss"
            )
        return self
