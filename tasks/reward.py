"""The stage that learns which answers are better."""

from conf.reward import RewardConfig
from storage.checkpoint import Policy, RewardModel
from storage.preferences import Preferences
from tasks.launch import run_worker
from tasks.stage import Job, stage


@stage(
    version=2,
    uses_torch=True,
    headlines={
        "accuracy/held": "held-out pairs ordered rightly",
        "accuracy/domain *": "held-out pairs ordered rightly, *",
    },
)
def reward(
    job: Job, policy: Policy, preferences: Preferences, settings: RewardConfig
) -> RewardModel:
    """Train a reward model, from the policy's weights, on preference pairs.

    reads Policy, Preferences   writes RewardModel
    cost 12 x parameters x tokens of a pair x pairs x epochs operations
    """
    inputs = {"policy": policy, "preferences": preferences}
    job.metrics |= run_worker(job, "model.reward", settings, inputs)
    return RewardModel(job.path)
