"""Compiled classes of characters, and the words that they make.

A word is one Han, kana or hangul character, or one run of letters, digits and `_`, ASCII lower-cased,
full-width ones taken as ASCII.
"""

# numba's decorators and arrays carry no types that pyright could follow
# pyright: basic

import numba as nb
import numpy as np

from tasks.kernels.words import FNV_OFFSET, GOLDEN, U64, code_point, is_han, mix64, with_letter

LETTER, DIGIT, SPACE, NEWLINE, PUNCTUATION, SIGN, SINGLE = 0, 1, 2, 3, 4, 5, 6


def _ascii_class(cp: int) -> int:
    if (97 <= cp <= 122) or (65 <= cp <= 90):
        return LETTER
    if 48 <= cp <= 57:
        return DIGIT
    if cp == 10:
        return NEWLINE
    if cp in (32, 9):
        return SPACE
    return PUNCTUATION if chr(cp) in "!\"'(),-.:;?" else SIGN


ASCII_CLASSES = np.array([_ascii_class(cp) for cp in range(128)], np.int64)


@nb.njit(inline="always")
def char_class(cp):
    """What a code point counts as. Ranges are written out: a Unicode table changes with Python."""
    if cp < 0x80:
        return ASCII_CLASSES[cp]
    if cp < 0x2000:
        return LETTER if cp >= 0xC0 and cp != 0xD7 and cp != 0xF7 else SIGN
    if is_han(cp) or (0x3041 <= cp <= 0x30FF) or (0xAC00 <= cp <= 0xD7AF):
        return SINGLE
    if cp == 0x3000 or (0x2000 <= cp <= 0x200A):
        return SPACE
    if 0xFF10 <= cp <= 0xFF19:
        return DIGIT
    if (0xFF21 <= cp <= 0xFF3A) or (0xFF41 <= cp <= 0xFF5A):
        return LETTER
    is_mark = (0x2010 <= cp <= 0x205E) or (0x3001 <= cp <= 0x301F) or (0xFF01 <= cp <= 0xFF65)
    return PUNCTUATION if is_mark else SIGN


@nb.njit(nogil=True, cache=True)
def words_of(text, start, end, hashes, lengths, ends):
    """Write hash, characters and end byte of every word of text[start:end]; how many there are.

    Returns also how many words hold a letter. `ends` may be empty: then no ends are written.
    """
    found = 0
    letter_words = 0
    i = start
    h = FNV_OFFSET
    run = 0
    has_letter = False
    has_ends = ends.shape[0] > 0
    while i <= end:
        kind = SIGN
        cp, width = np.int64(0), 1
        if i < end:
            cp, width = code_point(text, i)
            kind = char_class(cp)
        if kind <= DIGIT or cp == 95:
            h = with_letter(h, cp, text, i, width)
            run += 1
            has_letter = has_letter or kind == LETTER
        else:
            if run:
                hashes[found], lengths[found] = mix64(h), run
                if has_ends:
                    ends[found] = i
                found += 1
                letter_words += has_letter
                h, run, has_letter = FNV_OFFSET, 0, False
            if kind == SINGLE:
                hashes[found], lengths[found] = mix64(U64(cp) + GOLDEN), 1
                if has_ends:
                    ends[found] = i + width
                found += 1
                letter_words += 1
        i += width
    return found, letter_words


@nb.njit(nogil=True, cache=True)
def count_words(text, start, end):
    """How many words `words_of` would find."""
    found = 0
    i = start
    is_in_run = False
    while i < end:
        cp, width = code_point(text, i)
        kind = char_class(cp)
        is_run = kind <= DIGIT or cp == 95
        found += (is_run and not is_in_run) or kind == SINGLE
        is_in_run = is_run
        i += width
    return found
