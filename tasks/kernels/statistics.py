"""Compiled statistics of documents for the filter rules, one pass over the Arrow buffers of a column.

A word is one Han, kana or hangul character, or one run of letters, digits and `_`, ASCII lower-cased.
"""

# numba's decorators and arrays carry no types that pyright could follow
# pyright: basic

import numba as nb
import numpy as np
import numpy.typing as npt

from tasks.kernels.words import (
    FNV_OFFSET,
    FNV_PRIME,
    GOLDEN,
    GRAM_FACTOR,
    U64,
    code_point,
    is_han,
    mix64,
)

LETTER, DIGIT, SPACE, NEWLINE, PUNCTUATION, SIGN, SINGLE = 0, 1, 2, 3, 4, 5, 6

COUNTS = (
    "chars", "bytes", "letters", "digits", "spaces", "signs", "braces", "odd", "supplement",
    "han", "rare_han", "hashes", "ellipses", "words", "word_chars", "letter_words", "head_words",
    "head_unique", "stop_words", "newlines", "lines", "ended_lines", "short_lines", "bullet_lines",
    "ellipsis_lines", "wrapped_lines", "repeated_lines", "repeated_line_chars", "sentence_marks",
)  # fmt: skip
"""Columns of the counts, in order; `head` is the first HEAD_WORDS words."""
HEAD_WORDS = 1000
SHORT_LINE_CHARS = 30
WRAP_MIN_CHARS = 50
WRAP_MAX_CHARS = 110
STOP_MAX_CHARS = 5
GRAMS = 9
"""Repetition columns: characters in the top 2-, 3- and 4-gram, in repeated 5- to 10-grams."""

(
    CHARS, BYTES, LETTERS, DIGITS, SPACES, SIGNS, BRACES, ODD, SUPPLEMENT,
    HAN, RARE_HAN, HASHES, ELLIPSES, WORDS, WORD_CHARS, LETTER_WORDS, HEAD_COUNT,
    HEAD_UNIQUE, STOP_WORDS, NEWLINES, LINES, ENDED_LINES, SHORT_LINES, BULLET_LINES,
    ELLIPSIS_LINES, WRAPPED_LINES, REPEATED_LINES, REPEATED_LINE_CHARS, SENTENCE_MARKS,
) = range(29)  # fmt: skip


@nb.njit(inline="always")
def _ascii_class(cp):
    if (97 <= cp <= 122) or (65 <= cp <= 90):
        return LETTER
    if 48 <= cp <= 57:
        return DIGIT
    if cp == 10:
        return NEWLINE
    if cp == 32 or cp == 9:
        return SPACE
    # ! " ' ( ) , - . : ; ?
    if cp in (33, 34, 39, 40, 41, 44, 45, 46, 58, 59, 63):
        return PUNCTUATION
    return SIGN


@nb.njit(inline="always")
def char_class(cp):
    """What a code point counts as. Ranges are written out: a Unicode table changes with Python."""
    if cp < 0x80:
        return _ascii_class(cp)
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


@nb.njit(inline="always")
def _ends_sentence(cp):
    """Terminal marks: . ! ? " ' ) : ; and ellipsis, closing quotes and their wide forms."""
    return (
        cp in (33, 34, 39, 41, 46, 58, 59, 63)
        or cp in (0x2019, 0x201D, 0x2026, 0x3002, 0x300B, 0x300D, 0x300F, 0x3011)
        or cp in (0xFF01, 0xFF09, 0xFF0E, 0xFF1A, 0xFF1B, 0xFF1F)
    )


@nb.njit(inline="always")
def _is_bullet(cp):
    # - * and the usual typographic bullets
    return cp in (42, 45, 0x2022, 0x2023, 0x25A0, 0x25A1, 0x25AA, 0x25AB, 0x25B6, 0x25E6, 0x25CF)


@nb.njit(nogil=True, cache=True)
def words_of(text, start, end, hashes, lengths, ends):
    """Write hash, characters and end byte of every word of text[start:end]; how many there are.

    Returns also how many words hold a letter.
    """
    found = 0
    letter_words = 0
    i = start
    h = FNV_OFFSET
    run = 0
    has_letter = False
    while i <= end:
        kind = SIGN
        cp, width = np.int64(0), 1
        if i < end:
            cp, width = code_point(text, i)
            kind = char_class(cp)
        if kind in (LETTER, DIGIT) or cp == 95:
            for j in range(i, i + width):
                c = U64(text[j])
                if 65 <= text[j] <= 90:
                    c = c + U64(32)
                h = (h ^ c) * FNV_PRIME
            run += 1
            has_letter = has_letter or kind == LETTER
        else:
            if run:
                hashes[found], lengths[found], ends[found] = mix64(h), run, i
                found += 1
                letter_words += has_letter
                h, run, has_letter = FNV_OFFSET, 0, False
            if kind == SINGLE:
                hashes[found], lengths[found], ends[found] = mix64(U64(cp) + GOLDEN), 1, i + width
                found += 1
                letter_words += 1
        i += width
    return found, letter_words


@nb.njit(inline="always")
def _slot(keys, stamps, stamp, key):
    """Where a key is, or belongs, in an open-addressing table whose stale entries bear old stamps."""
    mask = keys.shape[0] - 1
    slot = np.int64(key & U64(mask))
    while stamps[slot] == stamp and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@nb.njit(inline="always")
def _gram(hashes, first, width):
    x = U64(width)
    for j in range(width):
        x = x * GRAM_FACTOR + hashes[first + j]
    return mix64(x)


@nb.njit(nogil=True, cache=True)
def _top_gram_chars(hashes, lengths, found, width, keys, stamps, counts, stamp):
    """Characters covered by the most frequent gram (the first of equals); 0 if none repeats."""
    best = 1
    for i in range(found - width + 1):
        key = _gram(hashes, i, width)
        slot = _slot(keys, stamps, stamp, key)
        if stamps[slot] != stamp:
            stamps[slot], keys[slot], counts[slot] = stamp, key, 0
        counts[slot] += 1
        best = max(best, counts[slot])
    if best < 2:
        return 0
    for i in range(found - width + 1):
        if counts[_slot(keys, stamps, stamp, _gram(hashes, i, width))] == best:
            chars = 0
            for j in range(width):
                chars += lengths[i + j]
            return chars * best
    return 0


@nb.njit(nogil=True, cache=True)
def _repeated_gram_chars(hashes, lengths, found, width, keys, stamps, stamp):
    """Characters in grams seen before, a repeated gram being skipped as a whole (Gopher)."""
    repeated = 0
    i = 0
    while i < found - width + 1:
        key = _gram(hashes, i, width)
        slot = _slot(keys, stamps, stamp, key)
        if stamps[slot] == stamp:
            for j in range(width):
                repeated += lengths[i + j]
            i += width
        else:
            stamps[slot], keys[slot] = stamp, key
            i += 1
    return repeated


@nb.njit(nogil=True, cache=True)
def _line_counts(text, start, end, out, keys, stamps, stamp):
    """Counts of lines: blank ones do not count; white space around a line is no part of it."""
    i = start
    while i < end:
        first, last, line_chars, gap = np.int64(0), np.int64(0), 0, 0
        before_last, third_last = np.int64(0), np.int64(0)
        h = FNV_OFFSET
        while i < end:
            cp, width = code_point(text, i)
            i += width
            kind = char_class(cp)
            if kind == NEWLINE:
                break
            if kind == SPACE:
                gap += line_chars > 0
                continue
            if line_chars == 0:
                first = cp
            if gap:
                h = (h ^ U64(32)) * FNV_PRIME
            line_chars += gap + 1
            gap = 0
            h = (h ^ U64(cp)) * FNV_PRIME
            third_last, before_last, last = before_last, last, cp
        if line_chars == 0:
            continue
        out[LINES] += 1
        is_ended = _ends_sentence(last)
        out[ENDED_LINES] += is_ended
        out[SHORT_LINES] += line_chars <= SHORT_LINE_CHARS
        out[BULLET_LINES] += _is_bullet(first)
        is_dots = last == 46 and before_last == 46 and third_last == 46
        out[ELLIPSIS_LINES] += is_dots or last == 0x2026
        has_next = i < end and text[i] != 10
        out[WRAPPED_LINES] += (
            has_next and not is_ended and WRAP_MIN_CHARS <= line_chars <= WRAP_MAX_CHARS
        )
        key = mix64(h)
        slot = _slot(keys, stamps, stamp, key)
        if stamps[slot] == stamp:
            out[REPEATED_LINES] += 1
            out[REPEATED_LINE_CHARS] += line_chars
        else:
            stamps[slot], keys[slot] = stamp, key


@nb.njit(nogil=True, cache=True)
def _char_counts(text, start, end, common, out):
    i = start
    dots = 0
    out[BYTES] = end - start
    while i < end:
        cp, width = code_point(text, i)
        i += width
        kind = char_class(cp)
        out[CHARS] += 1
        dots = dots + 1 if cp == 46 else 0
        if kind in (LETTER, SINGLE):
            out[LETTERS] += 1
            if is_han(cp):
                out[HAN] += 1
                is_common = 0x4E00 <= cp <= 0x9FFF and common[cp - 0x4E00]
                out[RARE_HAN] += not is_common
        elif kind == DIGIT:
            out[DIGITS] += 1
        elif kind == SPACE:
            out[SPACES] += 1
        elif kind == NEWLINE:
            out[NEWLINES] += 1
        elif kind == SIGN:
            out[SIGNS] += 1
        # . ! ? and their wide forms
        out[SENTENCE_MARKS] += cp in (33, 46, 63, 0x3002, 0xFF01, 0xFF0E, 0xFF1F)
        out[BRACES] += cp == 123 or cp == 125
        out[HASHES] += cp == 35
        out[ELLIPSES] += cp == 0x2026 or dots == 3
        out[ODD] += (0x80 <= cp <= 0x9F) or (0xE000 <= cp <= 0xF8FF) or cp == 0xFFFD
        out[SUPPLEMENT] += 0xA0 <= cp <= 0xFF


@nb.njit(nogil=True, cache=True)
def _head_counts(hashes, lengths, found, stops, out, keys, stamps, counts, stamp):
    """Distinct words and entropy (nats) of the first words; distinct stop words of all."""
    head = min(found, HEAD_WORDS)
    unique = 0
    for i in range(head):
        slot = _slot(keys, stamps, stamp, hashes[i])
        if stamps[slot] != stamp:
            stamps[slot], keys[slot], counts[slot] = stamp, hashes[i], 0
            unique += 1
        counts[slot] += 1
    entropy = 0.0
    for i in range(head):
        entropy -= np.log(counts[_slot(keys, stamps, stamp, hashes[i])] / head) / head
    seen = U64(0)
    for i in range(found):
        if lengths[i] > STOP_MAX_CHARS:
            continue
        for k in range(stops.shape[0]):
            if hashes[i] == stops[k]:
                seen |= U64(1) << U64(k)
    while seen:
        out[STOP_WORDS] += 1
        seen &= seen - U64(1)
    out[HEAD_COUNT], out[HEAD_UNIQUE] = head, unique
    return entropy


@nb.njit(nogil=True, cache=True)
def measure(
    text: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    widths: npt.NDArray[np.int64],
    stops: npt.NDArray[np.uint64],
    common: npt.NDArray[np.bool_],
    counts_out: npt.NDArray[np.int64],
    grams_out: npt.NDArray[np.int64],
    entropy_out: npt.NDArray[np.float32],
) -> None:
    """Fill the statistics of every row.

    `widths` (rows, 9): words in the grams of the columns, top ones first. `stops`: at most 64 word
    hashes. `common`: for each character of U+4E00..U+9FFF whether it is common. The outputs are
    (rows, 29), (rows, 9) and (rows,), zeroed.
    """
    room = 1024
    hashes, lengths = np.empty(room, np.uint64), np.empty(room, np.int64)
    ends = np.empty(room, np.int64)
    keys, stamps = np.empty(2 * room, np.uint64), np.zeros(2 * room, np.int64)
    tallies = np.empty(2 * room, np.int64)
    stamp = 0
    for row in range(offsets.shape[0] - 1):
        start, end = offsets[row], offsets[row + 1]
        if end - start + 1 > room:
            while room < end - start + 1:
                room *= 2
            hashes, lengths = np.empty(room, np.uint64), np.empty(room, np.int64)
            ends = np.empty(room, np.int64)
            keys, stamps = np.empty(2 * room, np.uint64), np.zeros(2 * room, np.int64)
            tallies = np.empty(2 * room, np.int64)
        out = counts_out[row]
        _char_counts(text, start, end, common, out)
        found, out[LETTER_WORDS] = words_of(text, start, end, hashes, lengths, ends)
        out[WORDS] = found
        for i in range(found):
            out[WORD_CHARS] += lengths[i]
        stamp += 1
        _line_counts(text, start, end, out, keys, stamps, stamp)
        stamp += 1
        entropy_out[row] = _head_counts(
            hashes, lengths, found, stops, out, keys, stamps, tallies, stamp
        )
        for k in range(GRAMS):
            stamp += 1
            width = widths[row, k]
            if k < 3:
                grams_out[row, k] = _top_gram_chars(
                    hashes, lengths, found, width, keys, stamps, tallies, stamp
                )
            else:
                grams_out[row, k] = _repeated_gram_chars(
                    hashes, lengths, found, width, keys, stamps, stamp
                )
