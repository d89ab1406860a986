"""Pretraining as a stage; how it computes is in model/pretrain.py."""

from conf.contract import SAMPLES
from conf.pretrain import PretrainConfig
from conf.shape import LARGEST_EMBEDDING_SHARE, embedding_warning
from storage.artifact import Artifact
from storage.checkpoint import Policy, ReadWindows
from storage.jsonl import read_jsonl
from storage.tokens import Tokens
from tasks.launch import run_worker
from tasks.stage import Job, stage


@stage(version=2, uses_torch=True)
def pretrain(
    job: Job, tokens: Tokens, settings: PretrainConfig, policy: Policy | None = None
) -> Policy:
    """Train a language model on the tokens, from nothing or from a policy.

    reads Tokens, Policy   writes Policy   cost 6 x parameters x tokens FLOPs; resumes from checkpoints

    Raises ValueError when the data does not suffice for the settings, or another tokenizer or shape
    made the policy to continue.
    """
    plan = settings.plan(
        {name: tokens.reader.count(name, "train").tokens for name in tokens.reader.domains}
    )
    inputs: dict[str, Artifact] = {"tokens": tokens}
    if policy is not None:
        _refuse_foreign(policy, tokens, settings)
        inputs["policy"] = policy
    job.log.info(
        "%d steps of %d tokens, %d parameters",
        plan.steps,
        settings.batch_tokens,
        settings.shape.parameters(tokens.reader.meta.vocabulary),
    )
    warnings = plan.warnings(None if policy is None else _domains_read(policy))
    share = settings.shape.embedding_share(tokens.reader.meta.vocabulary)
    if share > LARGEST_EMBEDDING_SHARE:
        warnings.append(embedding_warning(share))
    for warning in warnings:
        job.log.warning("%s", warning)
    job.metrics.update(run_worker(job, "model.pretrain", settings, inputs))
    samples = job.logs / SAMPLES
    if samples.is_file():
        job.tables["samples"] = [*read_jsonl(samples)]
    return Policy(job.path)


def _domains_read(policy: Policy) -> list[str] | None:
    """Domains of which pretraining has read something; none where the policy does not say."""
    read = ReadWindows.read(policy.files)
    return None if read is None else [name for name in read.domains if any(read.bits(name))]


def _refuse_foreign(policy: Policy, tokens: Tokens, settings: PretrainConfig) -> None:
    if policy.card.tokenizer_digest != tokens.reader.meta.tokenizer_digest:
        raise ValueError(
            f"the policy to continue speaks tokenizer {policy.card.tokenizer_digest[:12]}, the tokens "
            f"are of {tokens.reader.meta.tokenizer_digest[:12]}; tokenize with the policy's tokenizer"
        )
    # Dropout is no part of the weights.
    wanted = settings.shape.model_copy(update={"dropout": policy.card.shape.dropout})
    if wanted != policy.card.shape:
        raise ValueError(
            f"the policy to continue has shape {policy.card.shape}, the settings say "
            f"{settings.shape}; give the settings the policy's shape"
        )
