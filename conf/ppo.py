"""Settings of the stage ppo."""

import re
from collections.abc import Collection
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from conf.launch import LaunchConfig
from conf.lora import LoraConfig
from conf.settings import RUNTIME, Settings, SourceSpec

JUDGE_PROMPT = (
    "Rate the answer to the last message of this conversation from 0 (useless) to 10 (could not be "
    "better). Say the number alone.\n\n{messages}\n\nAnswer:\n{answer}"
)


class RewardWeights(Settings):
    """What each source of the reward counts, in deviations of its own scores."""

    model: float = 1.0
    """Of the reward model."""
    functions: float = 1.0
    """Of the sum of the functions."""
    people: float = 1.0
    """Of people's scores."""
    judge: float = 1.0
    """Of the judge."""


class RewardJudgeConfig(Settings):
    """A model behind an OpenAI-compatible endpoint that gives an answer a number."""

    model: str
    """Name of the model, as the endpoint knows it; part of identity."""
    base_url: Annotated[str, RUNTIME, Field(pattern=r"^https?://")] = "http://127.0.0.1:8000/v1"
    """Address of the endpoint, what comes before `/chat/completions`."""
    key_variable: Annotated[str | None, RUNTIME] = None
    """Name of the environment variable that holds the endpoint's key; the key itself is kept nowhere."""
    prompt: str = JUDGE_PROMPT
    """What is asked; `{messages}` and `{answer}` are filled in. The first number of what it says counts; an
    answer without one counts as not judged."""
    is_truth: bool = False
    """Whether it is the truth that `truth_every_iterations` looks at, in place of a source of the reward."""
    max_answer_tokens: Annotated[int, Field(ge=1)] = 16
    """Tokens that the judge may say."""
    concurrency: Annotated[int, RUNTIME, Field(ge=1, le=256)] = 4
    """Answers judged at once."""
    attempts: Annotated[int, RUNTIME, Field(ge=1)] = 6
    """How often it is asked when it fails or is busy; the pauses between double from one second."""
    wait_seconds: Annotated[float, RUNTIME, Field(gt=0)] = 120.0
    """How long one answer of it may take."""

    @model_validator(mode="after")
    def _is_askable(self) -> Self:
        named = re.findall(r"{(\w*)}", self.prompt)
        if {*named} - {"messages", "answer"} or "answer" not in named:
            raise ValueError(
                f"judge.prompt has the places {sorted({*named})}; `{{answer}}` is needed, `{{messages}}` may be "
                "there, nothing else in braces"
            )
        return self


class PpoConfig(Settings):
    """How a policy learns from scores, answer by answer."""

    method: Literal["ppo", "grpo", "rloo"] = "ppo"
    """`ppo` learns a value model to say what an answer is worth from its beginning; `grpo` and `rloo` have
    none and compare several answers to the same prompt."""
    samples_per_prompt: Annotated[int, Field(ge=1)] = 1
    """Answers to each prompt; at least 2 for grpo and rloo; divides rollout_rows."""
    iterations: Annotated[int, Field(ge=1)] = 200
    """Rounds of answering and learning."""
    rollout_rows: Annotated[int, Field(ge=1)] = 64
    """Answers per iteration, over all processes."""
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
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """How the divergence of a token is estimated: k1 is unbiased, k2 and k3 are never negative."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether divergence lowers the reward of a token, or is added to the loss (k2 or k3)."""
    kl_target: Annotated[float, Field(ge=0)] = 0.0
    """Divergence per answer in nats towards which kl_coef is moved; 0 leaves kl_coef alone."""
    kl_horizon: Annotated[float, Field(gt=0)] = 10_000.0
    """Answers over which kl_coef is moved, with a kl_target."""
    ratio_clip: Annotated[float, Field(gt=0)] = 0.2
    """Change of a token's probability ratio beyond which it gets no further gradient."""
    stop_kl: Annotated[float, Field(ge=0)] = 0.0
    """Mean divergence per token, in nats, from the policy that answered, at which an iteration's updates
    end; 0 for never."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy of the tokens' distributions, in nats, which is taken from the loss."""
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
    weights: RewardWeights = RewardWeights()
    """How the sources of the reward are added up."""
    functions: tuple[SourceSpec, ...] = ()
    """Python files with `score(answer) -> float`, sources of the reward. Given a dict: `text`, `is_ended`,
    `messages` (before the answer), `reference` (the conversation's own answer), `id`, `domain`, `language`."""
    people: tuple[SourceSpec, ...] = ()
    """People's scores, a source of the reward: JSON lines with `messages` (or `prompt`), `answer`, `score`.
    Answers without one count as average, and are written to `logs/unscored.jsonl` to be scored."""
    judge: RewardJudgeConfig | None = None
    """A judge, a source of the reward or the truth."""
    truth_functions: tuple[SourceSpec, ...] = ()
    """Files such as `functions`, whose sum is the truth that `truth_every_iterations` looks at."""
    truth_every_iterations: Annotated[int, Field(ge=0)] = 0
    """Iterations between two looks at the truth of answers to held-out prompts, beside their reward; the
    weights with the best truth are kept. The truth is that of the input `world`, of `truth_functions`, or
    of a judge with `is_truth`. 0 for never, and the last weights."""
    truth_prompts: Annotated[int, Field(ge=1)] = 64
    """Held-out prompts, spread evenly, answered at each look."""
    truth_patience: Annotated[int, Field(ge=0)] = 3
    """So many looks in a row without a better truth end the training; 0 for never."""
    on_gate: Literal["fail", "off"] = "off"
    """`fail` ends the stage before it starts if the reward model's accuracy is below `gate_accuracy`."""
    gate_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Accuracy on held-out pairs that on_gate=fail asks of the reward model."""
    lora: LoraConfig = LoraConfig()
    """A low-rank correction that the policy learns in place of all its weights, merged into them at the end;
    without it the policy is its own reference."""
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

    @property
    def has_own_reward(self) -> bool:
        """Whether anything but a reward model gives a reward."""
        has_judge = self.judge is not None and not self.judge.is_truth
        return bool(self.functions or self.people) or has_judge

    @model_validator(mode="after")
    def _rows_divide(self) -> Self:
        if self.rollout_rows % self.minibatch_rows:
            raise ValueError(
                f"rollout_rows={self.rollout_rows} is not a multiple of minibatch_rows="
                f"{self.minibatch_rows}; set minibatch_rows to a divisor"
            )
        if self.rollout_rows % self.samples_per_prompt:
            raise ValueError(
                f"rollout_rows={self.rollout_rows} is not a multiple of samples_per_prompt="
                f"{self.samples_per_prompt}; set samples_per_prompt to a divisor"
            )
        if self.method != "ppo" and self.samples_per_prompt < 2:
            raise ValueError(
                f"method={self.method} compares answers to the same prompt, samples_per_prompt="
                f"{self.samples_per_prompt} leaves none; set it to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        self.lora.refuse_engine(self.launch)
        is_judged = self.judge is not None and self.judge.is_truth
        truth = "truth_functions" if self.truth_functions else "judge" if is_judged else ""
        if truth and not self.truth_every_iterations:
            raise ValueError(
                f"the truth of {truth} is never looked at with truth_every_iterations=0; set that to 5, say"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator=k1 has no effect with kl_in=loss: its gradient is zero on average; use k2 or k3"
            )
        return self

    def refuse_inputs(self, given: Collection[str]) -> None:
        """Raises ValueError where nothing gives a reward, and where `truth` does."""
        if "reward" not in given and not self.has_own_reward:
            raise ValueError(
                "ppo has nothing that gives a reward; name the input reward in `from`, or set functions, people "
                "or judge"
            )
        self.truth(given)

    def truth(self, given: Collection[str]) -> str | None:
        """What is looked at as the truth, by its name among inputs and files that are given, or `judge`; None
        for nothing.

        Raises ValueError where it is to be looked at and there is none, or more than one.
        """
        if not self.truth_every_iterations:
            return None
        found = [name for name in ("truth_functions", "world") if name in given]
        found += ["judge"] if self.judge is not None and self.judge.is_truth else []
        if len(found) != 1:
            raise ValueError(
                f"truth_every_iterations={self.truth_every_iterations} looks at one truth, the node has "
                f"{found or 'none'}; name exactly one of the input world, truth_functions, and a judge with "
                "is_truth, or set truth_every_iterations=0"
            )
        return found[0]
