"""The few S3 operations that the store is built on, with their conditions.

Everything that must happen once is a conditional put (`If-None-Match: *`, `If-Match`), which S3 and
its stand-ins decide in one place; nothing here relies on a client's clock.
"""

import email.utils
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from storage.errors import BucketAway

TRANSFER_THREADS = 8
READ_BYTES = 1 << 22
REFUSED = (404, 409, 412)
"""Statuses of a put whose condition did not hold; 404 when the object to match is gone."""


@dataclass(frozen=True)
class Stored:
    """An object and what the server says of it."""

    content: bytes
    etag: str
    age_seconds: float
    """Since it was written, both ends by the server's clock."""


class Bucket:
    """The objects below one `s3://bucket/prefix`; keys are relative to it.

    Each method raises BucketAway where no server answers.
    """

    def __init__(self, url: str) -> None:
        """Raises ValueError when the optional S3 client is not installed."""
        try:
            import s3fs
        except ImportError as error:
            raise ValueError(f"{url} needs the S3 client; install bessemer[s3]") from error
        self._url = url
        core: Any = s3fs.core
        self._away = (core.botocore.exceptions.BotoCoreError, *core.S3_RETRYABLE_ERRORS)
        self._name, _, prefix = url.removeprefix("s3://").strip("/").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        # Listings change under us all the time: none is cached.
        self._fs: Any = s3fs.S3FileSystem(use_listings_cache=False)

    def get(self, key: str) -> Stored | None:
        """An object's content, None when there is none."""
        try:
            # State first: content that is newer than its etag only makes a later condition fail.
            answer = self._call("head_object", key)
            with self._reached():
                content: bytes = self._fs.cat_file(self._path(key))
        except FileNotFoundError:
            return None
        now = email.utils.parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return Stored(content, answer["ETag"], (now - answer["LastModified"]).total_seconds())

    def put(
        self, key: str, content: bytes, *, if_absent: bool = False, if_etag: str | None = None
    ) -> str | None:
        """Write a small object; its etag, or None when the condition did not hold."""
        condition: dict[str, str] = {}
        if if_absent:
            condition = {"IfNoneMatch": "*"}
        elif if_etag is not None:
            condition = {"IfMatch": if_etag}
        try:
            return self._call("put_object", key, Body=content, **condition)["ETag"]
        except OSError as error:
            if condition and _status(error) in REFUSED:
                return None
            raise

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are gone already do not matter."""
        for key in keys:
            with suppress(FileNotFoundError):
                self._call("delete_object", key)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of every object below a prefix that ends in `/`, by its name after the prefix."""
        return {name: size for name, (size, _) in self.objects(prefix).items()}

    def objects(self, prefix: str) -> dict[str, tuple[int, str]]:
        """Bytes and etag of every object below a prefix, by its name after the prefix; where the prefix
        is an object itself, that one, named ``."""
        place = self._path(prefix).rstrip("/")
        with self._reached():
            found = self._fs.find(place, detail=True)
        return {
            name.removeprefix(place).removeprefix("/"): (entry["size"], entry["ETag"])
            for name, entry in found.items()
        }

    def names(self, prefix: str) -> list[str]:
        """Names directly below a prefix that ends in `/`."""
        place = self._path(prefix).rstrip("/")
        try:
            with self._reached():
                return sorted(name.rpartition("/")[2] for name in self._fs.ls(place, detail=False))
        except FileNotFoundError:
            return []

    def upload(self, folder: Path, names: Iterable[str], prefix: str) -> None:
        """Copy files of a folder to objects below a prefix."""
        self._each(
            names, lambda name: self._fs.put_file(str(folder / name), self._path(prefix + name))
        )

    def download(self, prefix: str, names: Iterable[str], folder: Path) -> None:
        """Copy objects below a prefix into a folder. Raises FileNotFoundError when one is gone."""

        def fetch(name: str) -> None:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(self._path(prefix + name), str(target))

        self._each(names, fetch)

    def hash(self, key: str) -> str:
        """xxh3-128 of an object's bytes, streamed, hexadecimal."""
        digest = xxhash.xxh3_128()
        for chunk in self.chunks(key):
            digest.update(chunk)
        return digest.hexdigest()

    def chunks(self, key: str, *, etag: str | None = None) -> Iterator[bytes]:
        """An object's bytes. Raises FileNotFoundError when it is gone or, with `etag`, another one."""
        with (
            self._reached(),
            self._fs.open(self._path(key), "rb", block_size=READ_BYTES) as stream,
        ):
            if etag is not None and stream.details["ETag"] != etag:
                raise FileNotFoundError(
                    f"s3://{self._path(key)} was replaced while it was read; run again"
                )
            while chunk := stream.read(READ_BYTES):
                yield chunk

    def _each(self, names: Iterable[str], work: Callable[[str], None]) -> None:
        with self._reached(), ThreadPoolExecutor(TRANSFER_THREADS) as pool:
            for _ in pool.map(work, names):
                pass

    def _call(self, operation: str, key: str, **arguments: Any) -> Any:
        with self._reached():
            return self._fs.call_s3(
                operation, Bucket=self._name, Key=self._prefix + key, **arguments
            )

    @contextmanager
    def _reached(self) -> Generator[None]:
        """One error for what the client raises, of many unrelated types, when it gets no answer."""
        try:
            yield
        except self._away as error:
            raise BucketAway(
                f"{self._url} cannot be reached: {type(error).__name__}: {error}; what was built is "
                "kept: run again once its server answers, and see AWS_ENDPOINT_URL and the credentials"
            ) from error

    def _path(self, key: str) -> str:
        return f"{self._name}/{self._prefix}{key}"


def _status(error: OSError) -> int:
    """The HTTP status behind an error of the client; 404 for one that says the object is gone."""
    if isinstance(error, FileNotFoundError):
        return 404
    response: dict[str, Any] = getattr(error.__cause__, "response", {})
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
