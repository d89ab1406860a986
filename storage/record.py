"""The record of an artifact: what it is, what it was made from, and how."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class FileEntry(BaseModel):
    """One file of an artifact, by its name relative to `files/`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
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

    fingerprint: str
    kind: str
    stage: str
    digest: str
    """sha256 over the sorted names, sizes and hashes of the files."""
    identity: dict[str, Any]
    """What the fingerprint is the sha256 of: stage, version, settings, input and source digests."""
    inputs: dict[str, InputEntry | dict[str, InputEntry]] = Field(default_factory=dict)
    parts: list[str] = Field(default_factory=list)
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
