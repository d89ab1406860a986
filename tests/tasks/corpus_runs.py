"""Runs data stages in a store, as the graph does, for tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.fanout import LOCAL, FanoutConfig
from conf.settings import Settings, SourceSpec
from storage.artifact import Artifact
from storage.corpus import Corpus
from storage.source import HashCache, Source, resolve
from storage.store import Store
from tasks.stage import Outcome, execute


def run_stage(
    function: Any,
    settings: Settings,
    inputs: Mapping[str, Artifact],
    root: Path,
    *,
    workers: int = 1,
    fanout: FanoutConfig = LOCAL,
) -> Outcome:
    """Build a stage's artifact in the store under `root / store`; sources have a ledger there."""
    sources: dict[str, Source] = {}
    for name, specs in settings.source_fields():
        sources[name] = resolve(
            specs,
            artifacts={},
            base=root,
            ledger=root / "ledgers" / f"{function.spec.name}-{name}.json",
            hashes=HashCache(root / "hashes.sqlite"),
        )
    (root / "ledgers").mkdir(exist_ok=True, parents=True)
    return execute(
        function.spec,
        node=function.spec.name,
        settings=settings,
        inputs=inputs,
        sources=sources,
        store=Store(root / "store"),
        workers=workers,
        fanout=fanout,
    )


def texts(corpus: Artifact) -> list[str]:
    """The kept texts of a corpus, in order."""
    assert isinstance(corpus, Corpus)
    return [document["text"] for document in corpus.documents()]


def spec(path: Path | str, **fields: Any) -> SourceSpec:
    """A source."""
    return SourceSpec(path=str(path), **fields)


def reasons(corpus: Artifact) -> Sequence[tuple[str, str]]:
    """Text and reason of what the corpus' stage dropped."""
    assert isinstance(corpus, Corpus)
    return [(document["text"], document["reason"]) for document in corpus.dropped()]
