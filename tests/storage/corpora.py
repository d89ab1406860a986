"""Small corpora made by hand for tests: part folders beside the corpus, as in a store."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from storage.corpus import SHARD, Corpus, ShardEntry, ShardWriter, document_of


def corpus_of(
    root: Path, shards: Sequence[Sequence[str | Mapping[str, Any]]], *, name: str = "corpus"
) -> Corpus:
    """A corpus under `root / name`; a document is its text, or the arguments of `document_of`."""
    entries: list[ShardEntry] = []
    for index, documents in enumerate(shards):
        part = f"part-{name}-{index}"
        path = root / part / "files" / SHARD
        with ShardWriter(path) as writer:
            for document in documents:
                values = {"text": document} if isinstance(document, str) else dict(document)
                writer.append(document_of(**{"source": "test", "language": "en", **values}))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        entries.append(ShardEntry(part, digest, len(documents), 0, f"shard {index}"))
    Corpus.write_shards(root / name / "files", entries, "extract")
    return Corpus(root / name)
