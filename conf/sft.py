"""Settings of the stage sft."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from conf.launch import LaunchConfig
from conf.lora import LoraConfig
from conf.settings import RUNTIME, Settings


class SftConfig(Settings):
    """How a policy learns to answer from conversations."""

    epochs: Annotated[float, Field(gt=0)] = 2.0
    """Passes over the conversations."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Ends after so many updates, if that is earlier; 0 for no limit."""
    batch_rows: Annotated[int, Field(ge=1)] = 32
    """Conversations per update, over all processes."""
    context: Annotated[int, Field(ge=0)] = 0
    """Longest conversation in tokens; older exchanges of a longer one are left out. 0 for the
    model's context."""
    learn_from: Literal["every_answer", "last_answer", "each_answer_alone"] = "every_answer"
    """Which answers of a conversation are learnt: all in one pass, the last one, or all, each as the last
    one of a shorter conversation (as many rows as answers)."""
    prompt_attention: Literal["causal", "both_ways"] = "causal"
    """`both_ways`: what stands before the first learnt answer sees itself forwards too (prefix LM). For
    comparisons: whatever reads or exports the policy afterwards reads prompts causally."""
    withheld_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the questions that is not learnt here, so that `pairs` (prompts: withheld) can ask what the
    policy has not seen."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the updates in which the learning rate rises."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Last learning rate as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decay of weight matrices per update, times the learning rate."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradients; 0 for no limit."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the model computes in; weights and optimizer are float32 either way."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the order of the conversations."""
    lora: LoraConfig = LoraConfig()
    """A low-rank correction that is learnt in place of all weights, and merged into them at the end."""
    held_rows: Annotated[int, Field(ge=0), RUNTIME] = 512
    """Held-out conversations, spread evenly, on which the loss is followed; 0 for all."""
    evaluate_every_steps: Annotated[int, Field(ge=0), RUNTIME] = 100
    """Updates between two looks at the held-out loss; 0 for those before and behind all updates alone."""
    checkpoint_every_steps: Annotated[int, Field(ge=0), RUNTIME] = 0
    """Updates between two checkpoints, besides those by time; 0 for by time alone."""
    launch: Annotated[LaunchConfig, RUNTIME] = LaunchConfig()
    """Where and how the job runs."""

    @model_validator(mode="after")
    def _engine_fits(self) -> "SftConfig":
        self.lora.refuse_engine(self.launch)
        return self
