"""The text that is worked on, and what a row of the table says."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.extract import ExtractConfig
from conf.settings import Settings, SourceSpec
from conf.world import WorldConfig
from storage.artifact import Artifact
from storage.corpus import Corpus
from storage.source import HashCache, resolve
from storage.store import Store
from tasks.extract import extract
from tasks.stage import execute
from tasks.world import world

WORKERS = 2


@dataclass(frozen=True)
class Row:
    """Two rates of the same work, in `unit` (larger is better), with the ratio that is aimed at."""

    work: str
    peer: str
    ours: float
    theirs: float
    unit: str
    goal: float
    floor: float


@dataclass(frozen=True)
class Work:
    """What every benchmark gets."""

    folder: Path
    """Empty at the beginning, and removed at the end."""
    data: Path | None
    """The folder of data, where one is given."""
    corpus: Corpus
    """Documents of `data`, or of the demo's world."""
    megabytes: float
    """Text to work on, in 10^6 bytes of UTF-8: that of the corpus."""
    parts: tuple[str, ...] = ()
    """Words that the rows to be measured have; all rows without one."""

    def has(self, *words: str) -> bool:
        """Whether a row of these words is to be measured."""
        return set(self.parts) <= set(words)


def run_stage(
    function: Any, settings: Settings, inputs: Mapping[str, Artifact], folder: Path
) -> Artifact:
    """Build a stage's artifact in a store below `folder`, as the graph does."""
    sources = {
        name: resolve(specs, artifacts=inputs, base=Path.cwd(), ledger=None, hashes=HashCache())
        for name, specs in settings.source_fields()
    }
    wanted = {name: item for name, item in inputs.items() if name in function.spec.inputs}
    return execute(
        function.spec,
        node=function.spec.name,
        settings=settings,
        inputs=wanted,
        sources=sources,
        store=Store(folder / "store"),
        workers=WORKERS,
    ).artifact


def corpus_of(folder: Path, data: Path | None, megabytes: float) -> tuple[Corpus, float]:
    """Documents of DATA/pretrain, file by file until there are enough, or of the demo's world; and
    how many MB (10^6 bytes of UTF-8) they are."""
    inputs: dict[str, Artifact] = {}
    if data is None:
        inputs = {"world": run_stage(world, WorldConfig(), {}, folder)}
        specs = (SourceSpec(node="world", path="crawl/*.warc.gz"),)
    else:
        files = sorted((data / "pretrain").glob("*/*"), key=lambda path: path.stat().st_size)
        budget, chosen = megabytes * 1e6 / 3, []  # zstd text is about a third of its size
        for path in files:
            if sum(p.stat().st_size for p in chosen) < budget:
                chosen.append(path)
        specs = tuple(SourceSpec(path=str(path.absolute())) for path in chosen)
    corpus = run_stage(extract, ExtractConfig(sources=specs), inputs, folder)
    assert isinstance(corpus, Corpus)
    size = sum(len(text.encode()) for text in texts_of(corpus))
    return corpus, size / 1e6


def texts_of(corpus: Corpus) -> list[str]:
    """Every kept text, in order."""
    return [text for frame in corpus.scan(["text"]) for text in frame["text"].to_list()]


def megabytes_per_second(texts: list[str], work: Callable[[], object]) -> float:
    """UTF-8 megabytes of the texts that some work gets through in a second, wall clock."""
    started = time.perf_counter()
    work()
    return sum(len(text.encode()) for text in texts) / 1e6 / (time.perf_counter() - started)


def environment(
    name: str, packages: Sequence[str], *, without_dependencies: Sequence[str] = ()
) -> Path:
    """The interpreter of a virtual environment of its own for other programs, made when it is missing.

    It lies under `.bench/` of the working directory and stays for the next time.
    """
    folder = Path(".bench").absolute() / name
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        usual = [package for package in packages if package not in without_dependencies]
        subprocess.run([*pip, *usual], check=True)
        if without_dependencies:
            subprocess.run([*pip, "--no-deps", *without_dependencies], check=True)
        (folder / "complete").touch()
    return python


def run_peer(python: Path, script: str, folder: Path, arguments: Sequence[str]) -> Any:
    """What a script of `benchmarks/peers` writes as JSON to the path given to it last."""
    answer = folder / "answer.json"
    path = Path(__file__).parent / "peers" / f"{script}.py"
    done = subprocess.run(
        [str(python), str(path), *arguments, str(answer)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{script} {arguments[0]} failed:\n{done.stderr[-3000:]}")
    return json.loads(answer.read_text("utf-8"))


def run_own(module: str, folder: Path, arguments: Sequence[str]) -> Any:
    """What `python -m benchmarks.MODULE` of this environment writes as JSON to the path given to it last."""
    answer = folder / "answer.json"
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, str(answer)]
    subprocess.run(command, check=True)
    return json.loads(answer.read_text("utf-8"))
