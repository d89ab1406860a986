"""The stage that aligns a policy with preferences directly."""

from conf.dpo import DpoConfig
from storage.checkpoint import Policy
from storage.preferences import Preferences
from tasks.launch import run_worker
from tasks.stage import Job, stage


@stage(
    version=2,
    uses_torch=True,
    headlines={
        "accuracy": "held-out pairs preferred rightly",
    },
)
def dpo(job: Job, policy: Policy, preferences: Preferences, settings: DpoConfig) -> Policy:
    """Train a policy on preference pairs against itself as the reference.

    reads Policy, Preferences   writes Policy
    cost 12 x parameters x tokens of a pair x pairs x epochs operations, and one pass for the reference
    """
    inputs = {"policy": policy, "preferences": preferences}
    job.metrics |= run_worker(job, "model.dpo", settings, inputs)
    return Policy(job.path)
