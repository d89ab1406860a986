"""Addresses to refuse: millions of hosts and paths as one sorted array of hashes."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import xxhash

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_HOSTS_FILE = re.compile(r"^(?:0\.0\.0\.0|127\.0\.0\.1|::1?)\s+(\S+)")
_LOCAL = {
    "localhost",
    "localhost.localdomain",
    "local",
    "broadcasthost",
    "0.0.0.0",
    "ip6-localhost",
}
_WORD = re.compile(r"[^\W_]+")
_MAX_PATH_PARTS = 12


class UrlRules:
    """Decides by address alone, before a page is read."""

    def __init__(
        self,
        blocked: "NDArray[np.uint64] | None",
        words: Sequence[str] = (),
        expression: str | None = None,
    ) -> None:
        self._blocked = blocked
        self._words = {word.lower() for word in words}
        self._expression = expression

    @classmethod
    def open(
        cls, path: Path | None, words: Sequence[str] = (), expression: str | None = None
    ) -> "UrlRules":
        """Rules over an array that `write_blocked` wrote (it is mapped, not read into memory) and an
        expression of `one_expression`."""
        import numpy as np

        blocked = None if path is None else np.load(path, mmap_mode="r", allow_pickle=False)
        return cls(blocked if blocked is not None and len(blocked) else None, words, expression)

    def reason(self, url: str) -> str | None:
        """`blocked`, `url_word`, `url_expression` or None."""
        if self._words and any(w in self._words for w in _WORD.findall(unquote(url).lower())):
            return "url_word"
        if self._blocked is not None and self._is_listed(url):
            return "blocked"
        if self._expression is not None and _is_found(self._expression, url):
            return "url_expression"
        return None

    def _is_listed(self, url: str) -> bool:
        import numpy as np

        assert self._blocked is not None
        keys = np.fromiter(map(_key, _places(url)), dtype=np.uint64)
        if len(keys) == 0:
            return False
        found = np.searchsorted(self._blocked, keys)
        found[found == len(self._blocked)] = 0
        return bool((self._blocked[found] == keys).any())


def one_expression(lines: Iterable[str], name: str) -> str | None:
    """One expression that finds what any of a list's finds; none for an empty list.

    Raises ValueError with the line of one that is broken or would not take linear time.
    """
    from polars.exceptions import ComputeError

    expressions: list[str] = []
    for number, line in enumerate(lines, start=1):
        expression = line.strip()
        if not expression or expression.startswith("#"):
            continue
        try:
            _is_found(expression, "")
        except ComputeError as error:
            why = str(error).partition("error: ")[2].rpartition("error: ")[2].splitlines()
            raise ValueError(
                f"{name}:{number}: {expression[:80]!r} is not an expression that takes linear time "
                f"({why[0] if why else 'broken'}); mend or remove the line"
            ) from error
        expressions.append(f"(?:{expression})")
    return f"(?i){'|'.join(expressions)}" if expressions else None


def _is_found(expression: str, url: str) -> bool:
    # The engine behind polars takes time linear in the address, whatever the expression.
    import polars as pl

    return bool(pl.Series([url], dtype=pl.String).str.contains(expression)[0])


def write_blocked(lines: Iterable[str], path: Path) -> int:
    """Write the sorted hashes of a block list's entries; returns how many there are.

    Eight bytes an entry. 64-bit hashes of some million entries hit a foreign address once in about
    a million million look-ups.
    """
    import numpy as np

    keys = np.unique(np.fromiter(map(_key, _entries(lines)), dtype=np.uint64))
    with path.open("wb") as stream:
        np.save(stream, keys, allow_pickle=False)
    return len(keys)


def _entries(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        entry = line.split("#", 1)[0].strip().lower()
        if match := _HOSTS_FILE.match(entry):
            entry = match.group(1)
        entry = re.sub(r"^[a-z][a-z0-9+.\-]*://", "", entry).rstrip("/").rstrip(".")
        entry = entry.removeprefix("*.").removeprefix("||").removesuffix("^")
        host = entry.split("/", 1)[0].split(":", 1)[0]
        if "." in host and host not in _LOCAL:
            yield _without_www(host) + entry[len(entry.split("/", 1)[0]) :]


def _places(url: str) -> Iterator[str]:
    """Every entry that would block an address: its host and the domains above, and the paths above."""
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        host = _without_www((parts.hostname or "").rstrip("."))
    except ValueError:
        return
    labels = host.split(".")
    for first in range(len(labels) - 1):
        yield ".".join(labels[first:])
    path = host
    for part in parts.path.lower().strip("/").split("/")[:_MAX_PATH_PARTS]:
        path += f"/{part}"
        yield path
    if parts.query:
        yield f"{path}?{parts.query.lower()}"


def _without_www(host: str) -> str:
    return host.removeprefix("www.")


def _key(entry: str) -> Any:
    return xxhash.xxh3_64_intdigest(entry.encode("utf-8", "replace"))
