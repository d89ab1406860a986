"""Small stages with which the flows are tested: every one leaves a line in a log when it really runs."""

import os
import time
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from conf.settings import RUNTIME, Settings, SourceSpec
from storage.artifact import Artifact
from storage.tokenizer import Tokenizer
from tasks.fanout import PartItem, fan_out
from tasks.stage import Job, StageSpec, stage

LOG = "BESSEMER_TEST_LOG"


class Ore(Artifact):
    """Lines of text."""

    kind: ClassVar[str] = "ore"

    @property
    def text(self) -> str:
        return (self.files / "ore.txt").read_text("utf-8")


class Steel(Artifact):
    """Another kind."""

    kind: ClassVar[str] = "steel"


class MineConfig(Settings):
    sources: tuple[SourceSpec, ...]


class SmeltConfig(Settings):
    heat: Annotated[float, Field(gt=0, le=1)] = 0.5
    seed: int = 0
    threads: Annotated[int, RUNTIME] = 1
    seconds: Annotated[float, RUNTIME] = 0.0
    """How long it takes."""
    fails: Annotated[str, RUNTIME] = ""
    """File that, while it exists, makes the stage fail."""
    key_variable: Annotated[str | None, RUNTIME] = None
    """As of an endpoint."""


class PourConfig(Settings):
    vocabulary: int = 300


def note(job: Job, text: str = "") -> None:
    if path := os.environ.get(LOG):
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(f"{job.node}{text}\n")


@stage(version=1)
def mine(job: Job, settings: MineConfig) -> Ore:
    """All source files after one another, a part for each."""
    note(job)
    items = [
        PartItem({"file": file.digest}, (str(file.path),), file.name)
        for file in job.sources["sources"].files
    ]
    parts = fan_out(job, dig, items)
    texts = [(part.path / "files" / "part.txt").read_text("utf-8") for part in parts]
    (job.files / "ore.txt").write_text("".join(texts), "utf-8")
    job.metrics["lines"] = sum(len(text.splitlines()) for text in texts)
    job.tables["files"] = [{"file": item.label} for item in items]
    return Ore(job.path)


def dig(files: Path, source: str) -> dict[str, Any]:
    (files / "part.txt").write_text(Path(source).read_text("utf-8"), "utf-8")
    return {}


@stage(version=1)
def smelt(
    job: Job, ore: Ore, settings: SmeltConfig, pinned: Ore | None = None, more: Ore | None = None
) -> Ore:
    """The lines whose share of letters is high enough; only the first `heat` of them."""
    note(job)
    if settings.fails and Path(settings.fails).exists():
        raise RuntimeError("the furnace is cold")
    deadline = time.monotonic() + settings.seconds
    while time.monotonic() < deadline:
        job.report_progress(settings.seconds - (deadline - time.monotonic()), settings.seconds, "s")
        time.sleep(0.05)
    lines = ore.text.splitlines(keepends=True)
    if pinned:
        lines.append(f"pinned {len(pinned.text)}\n")
    (job.files / "ore.txt").write_text("".join(lines[: int(len(lines) * settings.heat)]), "utf-8")
    return Ore(job.path)


@stage(version=1)
def blend(job: Job, ores: dict[str, Ore], settings: SmeltConfig) -> Steel:
    """Several under their names."""
    note(job)
    for name, ore in ores.items():
        (job.files / f"{name}.txt").write_text(ore.text, "utf-8")
    return Steel(job.path)


@stage(version=1)
def tokenizer(job: Job, ore: Ore, settings: PourConfig) -> Tokenizer:
    """Looks like a tokenizer."""
    note(job)
    (job.files / "words.txt").write_text(ore.text, "utf-8")
    return Tokenizer(job.path)


def tiny_stages() -> dict[str, StageSpec]:
    functions: list[Any] = [mine, smelt, blend, tokenizer]
    return {function.__name__: function.spec for function in functions}
