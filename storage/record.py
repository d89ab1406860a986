"""The record of an artifact: what it is, what it was made from, and how."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def inside(name: str) -> str:
    """The name, which must lead to a place below the folder that it is joined to. Raises ValueError."""
    if name.startswith("/") or not set(name.split("/")).isdisjoint(("", ".", "..")):
        raise ValueError(f"{name!r} leads out of its folder; an artifact holds only its own files")
    return name


Fingerprint = Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]+$")]
"""Names a folder of the store."""


class FileEntry(BaseModel):
    """One file of an artifact, by its name relative to `files/`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(inside)]
    size: int
    xxh3: str
    """xxh3-128 of the bytes, hexadecimal."""


class InputEntry(BaseModel):
    """One input of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    digest: str


class Record(BaseModel):
    """Everything that is known about a committed artifact; the identity part decides its fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: Fingerprint
    kind: str
    stage: str
    digest: str
    """sha256 over the sorted names, sizes and hashes of the files."""
    identity: dict[str, Any]
    """What the fingerprint is the sha256 of: stage, version, settings, input and source digests."""
    inputs: dict[str, InputEntry | dict[str, InputEntry]] = Field(default_factory=dict)
    parts: list[Fingerprint] = Field(default_factory=list)
    """Fingerprints of the artifacts (shards) that the files refer to."""
    files: list[FileEntry] = Field(default_factory=list)
    metrics: dict[str, Any] = Field(default_factory=dict)
    build: dict[str, Any] = Field(default_factory=dict)
    """Runtime settings, host facts and library versions; never identity."""
    seconds: float = 0.0
    """Time that building it took, without waiting."""
    waited_seconds: float = 0.0
    """Time that it had to wait: for the host's training slot, for another process at the same artifact."""
    created: str = ""
    """UTC, ISO 8601."""
    node: str = ""
    """Name of the node that built it first; for people."""
