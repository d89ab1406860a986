"""Export of a policy for other programs as a stage; the work is in model/convert.py."""

from conf.export import ExportConfig
from storage.checkpoint import Export, Policy
from tasks.launch import run_worker
from tasks.stage import Job, stage


@stage(version=1, uses_torch=True)
def export(job: Job, policy: Policy, settings: ExportConfig) -> Export:
    """Write the policy as a Hugging Face folder, and compare the logits of what was written.

    reads Policy   writes Export   cost one read and one write of the weights
    """
    job.metrics.update(run_worker(job, "model.convert", settings, {"policy": policy}))
    return Export(job.path)
