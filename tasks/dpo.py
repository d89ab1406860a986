"""The stage that aligns a policy with preferences directly."""

import shutil
from pathlib import Path
from typing import Any

from conf.dpo import DpoConfig
from storage.checkpoint import Policy
from storage.errors import PartsFailed
from storage.identity import fingerprint as fingerprint_of
from storage.preferences import Preferences
from storage.record import Record
from tasks.fanout_part import Task, build_part, note_part
from tasks.launch import run_worker
from tasks.stage import Job, stage

REFERENCE = "reference.safetensors"
"""In `state/`: log-probabilities under the reference, which the worker writes where it finds none."""
DECIDE_REFERENCE = ("seed", "batch_rows", "epochs", "max_steps", "order", "context", "precision")
"""Settings that decide of which pairs they are needed, and what they come out as."""


@stage(
    version=2,
    uses_torch=True,
    headlines={
        "accuracy": "held-out pairs preferred rightly",
    },
)
def dpo(job: Job, policy: Policy, preferences: Preferences, settings: DpoConfig) -> Policy:
    """Train a policy on preference pairs against itself as the reference.

    reads Policy, Preferences   writes Policy, and a part with what the reference says of the pairs, which
    nodes with another loss or beta share
    cost 12 x parameters x tokens of a pair x pairs x epochs operations, and one pass for the reference
    """
    record = _reference_record(job, policy, preferences, settings)
    known = job.store.find(record.fingerprint)
    kept = job.state / REFERENCE
    if known is not None and not kept.exists():
        job.state.mkdir(parents=True, exist_ok=True)
        draft = kept.with_suffix(".draft")
        shutil.copyfile(known / "files" / REFERENCE, draft)
        draft.replace(kept)
    inputs = {"policy": policy, "preferences": preferences}
    job.metrics |= run_worker(job, "model.dpo", settings, inputs)
    if known is None:
        _keep(job, kept, record)
    note_part(job, record.fingerprint)
    job.parts.append(record.fingerprint)
    job.metrics["is_reference_reused"] = known is not None
    return Policy(job.path)


def _reference_record(
    job: Job, policy: Policy, preferences: Preferences, settings: DpoConfig
) -> Record:
    identity = {
        "part": "dpo reference",
        "version": 1,
        "policy": policy.record.digest,
        "preferences": preferences.record.digest,
        "has_single_answers": settings.loss == "kto",  # only then they are asked for, too
        **{name: getattr(settings, name) for name in DECIDE_REFERENCE},
    }
    return Record(
        fingerprint=fingerprint_of(identity),
        kind="part",
        stage="dpo/part",
        digest="",
        identity=identity,
        node=job.node,
    )


def _keep(job: Job, kept: Path, record: Record) -> None:
    """Make what the worker wrote a part. Raises PartsFailed."""
    task = Task(job.store.url, job.store.cache, _copied, (kept,), record, "reference", 0.0)
    if failure := build_part(task):
        raise PartsFailed(f"the reference's log-probabilities cannot be kept: {failure}")


def _copied(files: Path, kept: Path) -> dict[str, Any]:
    shutil.copyfile(kept, files / REFERENCE)
    return {}
