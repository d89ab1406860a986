"""A model that others trained as a stage; the work is in model/adopt.py."""

from conf.adopt import AdoptConfig
from storage.checkpoint import Policy
from storage.tokenizer import Tokenizer
from tasks.launch import run_worker
from tasks.stage import Job, stage


@stage(version=1, uses_torch=True)
def adopt(job: Job, tokenizer: Tokenizer, settings: AdoptConfig) -> Policy:
    """Take a model from a Hugging Face folder, its embeddings resized to the tokenizer.

    reads sources, Tokenizer   writes Policy   cost one read and one write of the weights

    Raises ValueError, through its job, for what the model of this project cannot be.
    """
    job.metrics.update(run_worker(job, "model.adopt", settings, {"tokenizer": tokenizer}))
    return Policy(job.path)
