"""Jobs and corpora with landings for the tests of the text stages."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from storage.corpus import Corpus
from storage.store import Store
from tasks.stage import Job


def job_at(root: Path, name: str, *, workers: int = 1) -> Job:
    """A job that writes beside the corpora of `root`, with one store for all jobs of it."""
    path = root / name
    for folder in ("files", "logs", "state"):
        (path / folder).mkdir(parents=True, exist_ok=True)
    return Job(node=name, stage=name, path=path, store=Store(root / "store"), workers=workers)


def with_landings(corpus: Corpus, landings: Sequence[int]) -> Corpus:
    """The same corpus with its shards in these landings."""
    entries = [
        replace(shard.entry, landing=landing)
        for shard, landing in zip(corpus.shards, landings, strict=True)
    ]
    Corpus.write_shards(corpus.files, entries, "extract")
    return corpus


def digest_of(folder: Path) -> str:
    """sha256 over the names and bytes of every file of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(folder)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
