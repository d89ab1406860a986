"""Settings of the stage ppo."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from conf.launch import LaunchConfig
from conf.settings import RUNTIME, Settings


class PpoConfig(Settings):
    """How a policy learns from a reward model, answer by answer."""

    iterations: Annotated[int, Field(ge=1)] = 200
    """Rounds of answering and learning."""
    rollout_rows: Annotated[int, Field(ge=1)] = 64
    """Prompts answered per iteration, over all processes."""
    epochs: Annotated[int, Field(ge=1)] = 2
    """Passes over the answers of an iteration."""
    minibatch_rows: Annotated[int, Field(ge=1)] = 32
    """Answers per update; divides rollout_rows."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Longest answer in tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; the log-probabilities that are compared are at the same one."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.05
    """Reward that a nat of divergence from the reference costs, at each token."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """How the divergence of a token is estimated: k1 is unbiased, k3 is never negative."""
    kl_target: Annotated[float, Field(ge=0)] = 0.0
    """Divergence per answer in nats towards which kl_coef is moved; 0 leaves kl_coef alone."""
    kl_horizon: Annotated[float, Field(gt=0)] = 10_000.0
    """Answers over which kl_coef is moved, with a kl_target."""
    ratio_clip: Annotated[float, Field(gt=0)] = 0.2
    """Change of a token's probability ratio beyond which it gets no further gradient."""
    value_clip: Annotated[float, Field(gt=0)] = 0.2
    """Likewise for the value of a token, in deviations of the score."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Weight of longer returns in the advantages."""
    score_clip: Annotated[float, Field(gt=0)] = 5.0
    """Largest normalised score of an answer, either way."""
    unended_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Taken from the score of an answer that does not end in time."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate of the policy."""
    value_learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate of the value model."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How both learning rates fall after the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of the updates in which the learning rates rise."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Last learning rates as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decay of weight matrices per update, times the learning rate."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradients of either model; 0 for no limit."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the models compute in; weights and optimizers are float32 either way."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the order of the prompts, the sampling, and the minibatches."""
    held_prompts: Annotated[int, Field(ge=0), RUNTIME] = 128
    """Held-out prompts, spread evenly, answered before and after; 0 for none."""
    checkpoint_every_iterations: Annotated[int, Field(ge=0), RUNTIME] = 0
    """Iterations between two checkpoints, besides those by time; 0 for by time alone."""
    launch: Annotated[LaunchConfig, RUNTIME] = LaunchConfig()
    """Where and how the job runs."""

    @model_validator(mode="after")
    def _minibatches_divide(self) -> "PpoConfig":
        if self.rollout_rows % self.minibatch_rows:
            raise ValueError(
                f"rollout_rows={self.rollout_rows} is not a multiple of minibatch_rows="
                f"{self.minibatch_rows}; set minibatch_rows to a divisor"
            )
        return self
