"""What every artifact has: a folder with its files, logs and record."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from storage.record import Record


@dataclass(frozen=True)
class Artifact:
    """A committed result in a local folder: `files/` (what the digest covers), `logs/`, `record.json`.

    Subclasses, one per kind, know how to read and write `files/`. The artifacts that it refers to
    (shards) lie beside it: `path.parent / fingerprint`.
    """

    kind: ClassVar[str]

    path: Path

    @property
    def files(self) -> Path:
        """Folder of the artifact's content."""
        return self.path / "files"

    @property
    def logs(self) -> Path:
        """Folder of logs and metrics, which are not part of the digest."""
        return self.path / "logs"

    @functools.cached_property
    def record(self) -> Record:
        """How the artifact came to be. Raises FileNotFoundError before the commit."""
        return Record.model_validate_json((self.path / "record.json").read_text("utf-8"))
