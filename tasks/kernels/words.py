"""What the compiled loops share: reading UTF-8 and hashing what was read.

Inlined where it is called. numba notices a change of the calling file only: after a change here, remove
the `__pycache__` beside it.
"""

# numba's decorators and arrays carry no types that pyright could follow
# pyright: basic

import numba as nb
import numpy as np

U64 = np.uint64

GOLDEN = U64(0x9E3779B97F4A7C15)
FNV_OFFSET = U64(14695981039346656037)
FNV_PRIME = U64(1099511628211)
GRAM_FACTOR = U64(0x9FB21C651E98DF25)
"""Factor of the polynomial over the hashes of a run of words."""


@nb.njit(inline="always")
def mix64(x):
    """MurmurHash3's 64-bit finalizer: a bijection that spreads every bit."""
    x ^= x >> U64(33)
    x *= U64(0xFF51AFD7ED558CCD)
    x ^= x >> U64(33)
    x *= U64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> U64(33))


@nb.njit(inline="always")
def code_point(text, i):
    """Code point at byte i of valid UTF-8, and its length in bytes."""
    c = np.int64(text[i])
    if c < 0x80:
        return c, 1
    if c < 0xE0:
        return ((c & 31) << 6) | (text[i + 1] & 63), 2
    if c < 0xF0:
        return ((c & 15) << 12) | (np.int64(text[i + 1] & 63) << 6) | (text[i + 2] & 63), 3
    high = ((c & 7) << 18) | (np.int64(text[i + 1] & 63) << 12)
    return high | (np.int64(text[i + 2] & 63) << 6) | (text[i + 3] & 63), 4


@nb.njit(inline="always")
def is_han(cp):
    """Whether a code point is a Chinese character."""
    return (
        (0x4E00 <= cp <= 0x9FFF)
        or (0x3400 <= cp <= 0x4DBF)
        or (0xF900 <= cp <= 0xFAFF)
        or (0x20000 <= cp <= 0x3FFFF)
    )
