"""What is done when a run has ended: its report."""

from collections.abc import Callable
from pathlib import Path

from flows.execution import Execution
from flows.runs import RunRecord

Say = Callable[[str], None]
"""Tells whoever looks on, one line."""


def attach_report(execution: Execution, say: Say) -> Path | None:
    """The page of the run; the one that another run wrote of the very same artifacts is taken again."""
    if path := _earlier_report(execution):
        execution.record.report = str(path)
        execution.record.write(execution.folder)
        return path
    from flows.report import write_report

    try:
        path = write_report(execution.folder, execution.lookup.store)
    except Exception as error:  # noqa: BLE001 - the artifacts are there, whatever the page lacks
        say(f"the report could not be written: {type(error).__name__}: {error}")
        return None
    execution.record.report = str(path)
    execution.record.write(execution.folder)
    return path


def _earlier_report(execution: Execution) -> Path | None:
    """Where nothing was built there is nothing new to draw, and drawing costs seconds."""
    ours = _results(execution.record)
    if any(status in ("built", "failed") for status, _ in ours.values()):
        return None
    for record in execution.home.records():
        theirs = {name: fingerprint for name, (_, fingerprint) in _results(record).items()}
        is_same = theirs == {name: fingerprint for name, (_, fingerprint) in ours.items()}
        if is_same and record.status == "done" and record.report and Path(record.report).is_file():
            return Path(record.report)
    return None


def _results(record: RunRecord) -> dict[str, tuple[str, str | None]]:
    return {name: (stage.status, stage.fingerprint) for name, stage in record.stages.items()}
