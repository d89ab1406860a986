"""The stage that aligns a policy with a reward model."""

from conf.ppo import PpoConfig
from storage.checkpoint import Policy, RewardModel
from storage.conversations import Conversations
from tasks.launch import run_worker
from tasks.stage import Job, stage


@stage(
    version=1,
    uses_torch=True,
    headlines={
        "held_before/reward": "reward model's score before",
        "held_after/reward": "reward model's score after",
        "held_after/kl": "KL to the reference, nats",
    },
)
def ppo(
    job: Job,
    policy: Policy,
    reward: RewardModel,
    conversations: Conversations,
    settings: PpoConfig,
) -> Policy:
    """Let a policy answer the prompts of conversations, and learn from the scores of its answers.

    reads Policy, RewardModel, Conversations   writes Policy
    cost per iteration: one generation, two scorings, and 12 x parameters x tokens x epochs operations
    """
    if policy.card.tokenizer_digest != reward.card.tokenizer_digest:
        raise ValueError(
            f"the policy speaks the tokens of {policy.card.tokenizer_digest[:12]}, the reward model "
            f"those of {reward.card.tokenizer_digest[:12]}; train the reward model from this policy"
        )
    inputs = {"policy": policy, "reward": reward, "conversations": conversations}
    job.metrics |= run_worker(job, "model.ppo", settings, inputs)
    return Policy(job.path)
