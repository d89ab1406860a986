"""The store's steps on S3."""

from typing import Any


class RemoteLease:
    """A lease on S3."""

    def release(self) -> None:
        """Free it."""


class Remote:
    """A store on S3."""

    def __init__(self, url: str) -> None:
        raise ValueError(f"{url}: stores on S3 land with the next commit; use a folder")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)
