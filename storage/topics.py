"""Topics of a corpus: per shard the topic of every row, and what each topic is about."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from storage.artifact import Artifact

if TYPE_CHECKING:
    import polars as pl

TOPICS = "topics.json"


@dataclass(frozen=True)
class Topics(Artifact):
    """`files/topics.json`: one entry per topic; `files/topics-00000.parquet`: `topic` of every row of a
    shard of the corpus, null where a document was dropped or holds no term."""

    kind: ClassVar[str] = "topics"

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Per topic: `topic`, `terms`, `documents`, `by` (language/source -> documents)."""
        return json.loads((self.files / TOPICS).read_text("utf-8"))

    def of_shard(self, index: int) -> "pl.Series":
        """Topic of every row of a shard."""
        import polars as pl

        return pl.read_parquet(topics_path(self.files, index))["topic"]


def topics_path(files: Path, index: int) -> Path:
    """Where the topics of a shard lie."""
    return files / f"topics-{index:05d}.parquet"
