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


@nb.njit(inline="always")
def narrow(cp):
    """The ASCII letter, digit or `_` of a full-width one, as NFKC has it; others as they are."""
    is_wide = (0xFF10 <= cp <= 0xFF19) or (0xFF21 <= cp <= 0xFF3A) or (0xFF41 <= cp <= 0xFF5A)
    return cp - 0xFEE0 if is_wide or cp == 0xFF3F else cp


@nb.njit(inline="always")
def lower(cp):
    """ASCII capitals as small letters; others as they are."""
    return cp + 32 if 65 <= cp <= 90 else cp


@nb.njit(inline="always")
def with_letter(h, cp, text, i, width):
    """The hash of a run with one more letter, at byte i."""
    if cp < 0x80:
        return (h ^ U64(lower(cp))) * FNV_PRIME
    if cp >= 0xFF10:
        return (h ^ U64(lower(narrow(cp)))) * FNV_PRIME
    for j in range(i, i + width):
        h = (h ^ U64(text[j])) * FNV_PRIME
    return h
