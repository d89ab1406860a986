"""The stage that teaches a policy to answer."""

from conf.sft import SftConfig
from storage.checkpoint import Policy
from storage.conversations import Conversations
from tasks.launch import run_worker
from tasks.stage import Job, stage


@stage(version=2, uses_torch=True)
def sft(job: Job, policy: Policy, conversations: Conversations, settings: SftConfig) -> Policy:
    """Fine-tune a policy on conversations; only what the assistant says is learnt.

    reads Policy, Conversations   writes Policy   cost 6 x parameters x tokens x epochs operations
    """
    inputs = {"policy": policy, "conversations": conversations}
    job.metrics |= run_worker(job, "model.sft", settings, inputs)
    return Policy(job.path)
