"""Exact overlap of texts: Jaccard similarity of their sets of 5-token shingles.

Written apart from the deduplication stage on purpose: it is the truth that the stage is judged by.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

SHINGLE_TOKENS = 5
TOKEN = re.compile(r"[A-Za-z0-9_]+|[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")

Shingles = frozenset[tuple[str, ...]]


def tokens_of(text: str) -> list[str]:
    """A token is one Chinese character or one run of [A-Za-z0-9_], lower-cased."""
    return [token.lower() for token in TOKEN.findall(text)]


def shingles_of(text: str) -> Shingles:
    """Every run of 5 tokens; a shorter text is its own single shingle, an empty one has none."""
    tokens = tokens_of(text)
    if len(tokens) < SHINGLE_TOKENS:
        return frozenset({tuple(tokens)} if tokens else ())
    last = len(tokens) - SHINGLE_TOKENS + 1
    return frozenset(tuple(tokens[start : start + SHINGLE_TOKENS]) for start in range(last))


def jaccard(left: Shingles, right: Shingles) -> float:
    """Shared shingles over all shingles; 0 when both are empty."""
    shared = len(left & right)
    union = len(left) + len(right) - shared
    return shared / union if union else 0.0


class OverlapIndex:
    """Texts by shingle, to find the most similar one exactly."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, name: str, shingles: Shingles) -> None:
        """Take a text in."""
        number = len(self._names)
        self._names.append(name)
        self._sizes.append(len(shingles))
        for shingle in shingles:
            self._holders[shingle].append(number)

    def nearest(self, shingles: Shingles, ignore: Sequence[str] = ()) -> tuple[float, str | None]:
        """Greatest Jaccard similarity to a text taken in, and that text's name; (0, None) if alone."""
        shared: Counter[int] = Counter()
        for shingle in shingles:
            shared.update(self._holders.get(shingle, ()))
        best, name = 0.0, None
        for number, count in shared.items():
            similarity = count / (len(shingles) + self._sizes[number] - count)
            if similarity > best and self._names[number] not in ignore:
                best, name = similarity, self._names[number]
        return best, name
