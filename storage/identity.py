"""Identity is content: canonical JSON, its sha256, and the difference of two identities."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HASH_CHUNK_BYTES = 1 << 22


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value: sorted keys, no spaces, UTF-8, shortest floats.

    Raises ValueError for what has no stable form: NaN, infinities, keys that are not text, objects.
    """
    _refuse_unstable(value, "$")
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode("utf-8")


def fingerprint(identity: dict[str, Any]) -> str:
    """sha256 of the canonical JSON of an identity, hexadecimal."""
    return hashlib.sha256(canonical_json(identity)).hexdigest()


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's bytes, hexadecimal."""
    # Late: a training process explains differences between identities, and must do without xxhash.
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def differences(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """Every field in which two identities differ, one line each: `settings.threshold: 0.8 -> 0.7`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(
                old.get(key, "absent"), new.get(key, "absent"), f"{place}.{key}" if place else key
            )
    elif old != new:
        yield f"{place}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_unstable(value: Any, place: str) -> None:
    match value:
        case None | bool() | int() | str():
            return
        case float():
            if not math.isfinite(value):
                raise ValueError(f"{place}: {value} has no stable form; use a finite number")
        case list() | tuple():
            for index, item in enumerate(value):
                _refuse_unstable(item, f"{place}[{index}]")
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"{place}: key {key!r} is not text")
                _refuse_unstable(item, f"{place}.{key}")
        case _:
            raise ValueError(f"{place}: {type(value).__name__} has no stable form; use JSON values")
