"""The stage that aligns a policy with what its answers earn."""

from conf.ppo import PpoConfig
from storage.artifact import Artifact
from storage.checkpoint import Policy, RewardModel
from storage.conversations import Conversations
from storage.world import World
from tasks.launch import run_worker
from tasks.stage import Job, stage


@stage(
    version=2,
    uses_torch=True,
    headlines={
        "held_before/reward": "reward of answers before",
        "held_after/reward": "reward of answers after",
        "held_after/truth": "true reward after",
        "held_after/kl": "KL to the reference, nats",
    },
)
def ppo(
    job: Job,
    policy: Policy,
    conversations: Conversations,
    settings: PpoConfig,
    reward: RewardModel | None = None,
    world: World | None = None,
) -> Policy:
    """Let a policy answer the prompts of conversations, and learn from the scores of its answers.

    reads Policy, Conversations, RewardModel, World (for looks at the truth)   writes Policy
    cost per iteration: one generation, two scorings, and 12 x parameters x tokens x epochs operations
    """
    inputs: dict[str, Artifact] = {"policy": policy, "conversations": conversations}
    inputs |= {} if reward is None else {"reward": reward}
    inputs |= {} if world is None else {"world": world}
    settings.refuse_inputs([*inputs, *job.sources])
    if reward is not None:
        _refuse_unfit(policy, reward, settings)
    job.metrics |= run_worker(job, "model.ppo", settings, inputs)
    return Policy(job.path)


def _refuse_unfit(policy: Policy, reward: RewardModel, settings: PpoConfig) -> None:
    """Raises ValueError for a reward model of other tokens, or one that the gate does not let through."""
    if policy.card.tokenizer_digest != reward.card.tokenizer_digest:
        raise ValueError(
            f"the policy speaks the tokens of {policy.card.tokenizer_digest[:12]}, the reward model "
            f"those of {reward.card.tokenizer_digest[:12]}; train the reward model from this policy"
        )
    if settings.on_gate == "off":
        return
    held = reward.record.metrics.get("accuracy", {}).get("held", {"value": 0.0, "n": 0})
    if not held["n"] or held["value"] < settings.gate_accuracy:
        raise ValueError(
            f"the reward model is right on {held['value']:.3f} of {held['n']} held-out pairs, on_gate=fail asks "
            f"for {settings.gate_accuracy}; train it on more or better pairs, or lower gate_accuracy"
        )
