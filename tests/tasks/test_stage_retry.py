"""What a failed try leaves behind for the next one."""

from pathlib import Path

import pytest

from conf.settings import Settings
from storage.artifact import Artifact
from storage.store import Store
from tasks.stage import Job, Outcome, StageSpec, execute, stage


class NothingToChoose(Settings):
    """No settings."""


class Written(Artifact):
    """Whatever was written."""

    kind = "written"


def fails_first(job: Job, settings: NothingToChoose) -> Written:
    """Write one file and a checkpoint, fail; the second time write another."""
    if (job.state / "checkpoint").exists():
        (job.files / "second.txt").write_text("二")
        return Written(job.path)
    (job.files / "first.txt").write_text("一")
    (job.state / "checkpoint").write_text("step 1")
    raise RuntimeError("the first time fails")


def run(spec: StageSpec, store: Store) -> Outcome:
    return execute(
        spec,
        node="n",
        settings=NothingToChoose(),
        inputs={},
        sources={},
        store=store,
        workers=1,
    )


@pytest.mark.parametrize(
    ("uses_torch", "expected"), [(False, ["second.txt"]), (True, ["first.txt", "second.txt"])]
)
def test_only_a_torch_jobs_files_stay_for_the_next_try(
    tmp_path: Path, uses_torch: bool, expected: list[str]
) -> None:
    spec: StageSpec = stage(version=1, uses_torch=uses_torch)(fails_first).spec
    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match="first time"):
        run(spec, store)
    outcome = run(spec, store)
    assert outcome.status == "built"
    assert [entry.name for entry in outcome.record.files] == expected
    assert run(spec, store).status == "hit"
