"""Settings of the stage reward."""

from typing import Annotated, Literal

from pydantic import Field

from conf.launch import LaunchConfig
from conf.settings import RUNTIME, Settings


class RewardConfig(Settings):
    """How a reward model learns which of two answers is better."""

    start: Literal["policy", "random"] = "policy"
    """Where the weights begin: as the policy's, or drawn at random in its shape."""
    loss: Literal["last_token", "from_divergence"] = "last_token"
    """What of two answers is compared: the scores at their last tokens, or those of every token from the
    first in which they differ (an answer that has ended keeps its last score)."""
    epochs: Annotated[float, Field(gt=0)] = 2.0
    """Passes over the pairs."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Ends after so many updates, if that is earlier; 0 for no limit."""
    batch_rows: Annotated[int, Field(ge=1)] = 64
    """Pairs per update, over all processes."""
    context: Annotated[int, Field(ge=0)] = 0
    """Longest prompt and answer in tokens; the prompt is cut from the left. 0 for the model's."""
    centring: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the squared sum of both scores, which keeps scores near zero."""
    margin_weight: Annotated[float, Field(ge=0)] = 0.0
    """How much of a pair's own margin the scores must differ by; 0 ignores margins."""
    shuffle_labels: bool = False
    """Negative control: a coin decides which answer of a training pair counts as better."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the updates in which the learning rate rises."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Last learning rate as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decay of weight matrices per update, times the learning rate."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradients; 0 for no limit."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the model computes in; weights and optimizer are float32 either way."""
    on_gate: Literal["fail", "keep_best", "off"] = "off"
    """`fail` ends the stage when the accuracy on held-out pairs stays below `gate_accuracy`;
    `keep_best` keeps the weights of the best look at the held-out pairs; `off` the last ones."""
    gate_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Accuracy on held-out pairs that on_gate=fail asks for."""
    scale_answers: Annotated[int, Field(ge=2)] = 256
    """Answers of the policy to training prompts whose scores give the mean and the deviation by
    which PPO normalises."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest of those answers in tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature at which those answers are sampled."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the head, the order of the pairs, and the answers."""
    evaluate_every_steps: Annotated[int, Field(ge=0)] = 50
    """Updates between two looks at the held-out pairs; 0 for those before and behind all updates alone."""
    checkpoint_every_steps: Annotated[int, Field(ge=0), RUNTIME] = 0
    """Updates between two checkpoints, besides those by time; 0 for by time alone."""
    launch: Annotated[LaunchConfig, RUNTIME] = LaunchConfig()
    """Where and how the job runs."""
