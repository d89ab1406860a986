"""Compiled statistics of documents for the filter rules, over the Arrow buffers of a column.

A word is one Han, kana or hangul character, or one run of letters, digits and `_`, ASCII lower-cased.
"""

# numba's decorators and arrays carry no types that pyright could follow
# pyright: basic

import numba as nb
import numpy as np
import numpy.typing as npt

from tasks.kernels.characters import (
    DIGIT,
    LETTER,
    NEWLINE,
    PUNCTUATION,
    SIGN,
    SINGLE,
    SPACE,
    char_class,
    count_words,
    words_of,
)
from tasks.kernels.repetition import (
    chars_of,
    is_known,
    mask_for,
    new_tables,
    repetition,
    slot_of,
)
from tasks.kernels.words import FNV_OFFSET, FNV_PRIME, GOLDEN, U64, code_point, is_han, mix64

COUNTS = (
    "chars", "bytes", "letters", "digits", "spaces", "punctuation", "signs", "braces", "odd",
    "supplement", "han", "rare_han", "hashes", "ellipses", "bracketed", "sentence_marks",
    "sentences", "words", "word_chars", "letter_words", "head_words", "head_unique", "stop_words",
    "gopher_stop_words", "fineweb2_stop_words", "newlines", "lines", "ended_lines", "short_lines", "bullet_lines",
    "ellipsis_lines", "wrapped_lines", "thin_lines", "more_lines", "repeated_lines",
    "repeated_line_chars", "paragraphs", "repeated_paragraphs", "repeated_paragraph_chars",
)  # fmt: skip
"""Columns of the counts, in order; `head` is the first HEAD_WORDS words."""
HEAD_WORDS = 1000
SHORT_LINE_CHARS = 30
WRAP_MIN_CHARS = 50
WRAP_MAX_CHARS = 110
THIN_LINE_WORDS = 3
STOP_MAX_CHARS = 5
STOP_SLOTS = 1024
OURS, GOPHER, FINEWEB2 = 1, 2, 4
"""Lists that a stop word is on; at most 64 are on ours, and they come first."""
LARGE_BYTES = 1 << 20
"""Words of a longer text are counted before room for them is made."""

(
    CHARS, BYTES, LETTERS, DIGITS, SPACES, PUNCTUATIONS, SIGNS, BRACES, ODD,
    SUPPLEMENT, HAN, RARE_HAN, HASHES, ELLIPSES, BRACKETED, SENTENCE_MARKS,
    SENTENCES, WORDS, WORD_CHARS, LETTER_WORDS, HEAD_COUNT, HEAD_UNIQUE, STOP_WORDS,
    GOPHER_STOPS, FINEWEB2_STOPS, NEWLINES, LINES, ENDED_LINES, SHORT_LINES, BULLET_LINES,
    ELLIPSIS_LINES, WRAPPED_LINES, THIN_LINES, MORE_LINES, REPEATED_LINES,
    REPEATED_LINE_CHARS, PARAGRAPHS, REPEATED_PARAGRAPHS, REPEATED_PARAGRAPH_CHARS,
) = range(39)  # fmt: skip

READ_MORE = U64(int.from_bytes(b"readmore", "big"))
CJK_MORE = U64(0x5C555F00), U64(0x66F4591A)
"""The last two characters of a line, as one number: to unfold, more."""


@nb.njit(inline="always")
def _ends_line(cp):
    """Terminal marks: . ! ? " ' ) : ; and ellipsis, closing quotes and their wide forms."""
    return (
        cp in (33, 34, 39, 41, 46, 58, 59, 63)
        or cp in (0x2019, 0x201D, 0x2026, 0x3002, 0x300B, 0x300D, 0x300F, 0x3011)
        or cp in (0xFF01, 0xFF09, 0xFF0E, 0xFF1A, 0xFF1B, 0xFF1F)
    )


@nb.njit(inline="always")
def _is_narrow_mark(cp):
    return cp in (33, 46, 63)  # ! . ?


@nb.njit(inline="always")
def _is_wide_mark(cp):
    return cp in (0x3002, 0xFF01, 0xFF0E, 0xFF1F)


@nb.njit(inline="always")
def _is_closing(cp):
    """Closing quotes and brackets, which may follow the mark of a sentence's end."""
    return cp in (34, 39, 41, 93, 0x2019, 0x201D, 0x300D, 0x300F, 0x3011)


@nb.njit(inline="always")
def _is_bullet(cp):
    # - * and the usual typographic bullets
    return cp in (42, 45, 0x2022, 0x2023, 0x25A0, 0x25A1, 0x25AA, 0x25AB, 0x25B6, 0x25E6, 0x25CF)


# Lines


@nb.njit(inline="always")
def _read_line(text, i, end, marks):
    """One line from byte i: the byte after its end, its characters, hash and words.

    White space around a line is no part of it; a run within is one space in the hash. `marks` becomes the
    first character, the last three and the last eight bytes of letters, as numbers.
    """
    chars, gap, words = 0, 0, 0
    is_in_run = False
    h = FNV_OFFSET
    marks[:] = U64(0)
    while i < end:
        cp, width = code_point(text, i)
        i += width
        kind = char_class(cp)
        if kind == NEWLINE:
            break
        is_run = kind <= DIGIT or cp == 95
        words += (is_run and not is_in_run) or kind == SINGLE
        is_in_run = is_run
        if kind == SPACE:
            gap += chars > 0
            continue
        if chars == 0:
            marks[0] = U64(cp)
        if gap:
            h = (h ^ U64(32)) * FNV_PRIME
        chars += gap + 1
        gap = 0
        h = (h ^ U64(cp)) * FNV_PRIME
        marks[1], marks[2], marks[3] = marks[2], marks[3], U64(cp)
        if cp < 0x80:
            marks[4] = (marks[4] << U64(8)) | U64(cp | 32)
        else:
            marks[4] = U64(0)
    return i, chars, h, words


@nb.njit(inline="always")
def _asks_for_more(marks):
    last_two = (marks[2] << U64(16)) | marks[3]
    return (
        marks[4] == READ_MORE
        or last_two == CJK_MORE[0]
        or last_two == CJK_MORE[1]
        or (marks[1] == marks[2] == marks[3] == U64(0x3002))
    )


@nb.njit(inline="always")
def _add_line(out, marks, chars, words, has_next):
    """Count the kinds of one line."""
    is_ended = _ends_line(marks[3])
    out[LINES] += 1
    out[ENDED_LINES] += is_ended
    out[SHORT_LINES] += chars <= SHORT_LINE_CHARS
    out[BULLET_LINES] += _is_bullet(marks[0])
    is_dots = marks[1] == marks[2] == marks[3] == U64(46)
    out[ELLIPSIS_LINES] += is_dots or marks[3] == U64(0x2026)
    out[WRAPPED_LINES] += has_next and not is_ended and WRAP_MIN_CHARS <= chars <= WRAP_MAX_CHARS
    out[THIN_LINES] += words < THIN_LINE_WORDS
    out[MORE_LINES] += _asks_for_more(marks)


@nb.njit(inline="always")
def _end_paragraph(out, chars, h, tables, mask, stamp):
    out[PARAGRAPHS] += 1
    if is_known(tables, mask, stamp, mix64(h + GOLDEN)):
        out[REPEATED_PARAGRAPHS] += 1
        out[REPEATED_PARAGRAPH_CHARS] += chars


@nb.njit(nogil=True, cache=True)
def _line_counts(text, start, end, out, marks, tables, stamp):
    """Counts of lines and of paragraphs (lines without a blank one between); blank lines do not count."""
    mask = mask_for(2 * out[NEWLINES] + 2)
    paragraph_chars = 0
    paragraph = FNV_OFFSET
    i = start
    while i < end:
        i, chars, h, words = _read_line(text, i, end, marks)
        if chars == 0:
            if paragraph_chars:
                _end_paragraph(out, paragraph_chars, paragraph, tables, mask, stamp)
            paragraph_chars, paragraph = 0, FNV_OFFSET
            continue
        _add_line(out, marks, chars, words, i < end and text[i] != 10)
        h = mix64(h)
        if is_known(tables, mask, stamp, h):
            out[REPEATED_LINES] += 1
            out[REPEATED_LINE_CHARS] += chars
        paragraph_chars += chars + (paragraph_chars > 0)
        paragraph = (paragraph ^ h) * FNV_PRIME
    if paragraph_chars:
        _end_paragraph(out, paragraph_chars, paragraph, tables, mask, stamp)


# Characters


@nb.njit(inline="always")
def _add_wide_char(cp, kind, common, out):
    """Counts of a character beyond ASCII."""
    if kind == SINGLE and is_han(cp):
        out[HAN] += 1
        is_common = 0x4E00 <= cp <= 0x9FFF and common[cp - 0x4E00]
        out[RARE_HAN] += not is_common
    out[ODD] += (0x80 <= cp <= 0x9F) or (0xE000 <= cp <= 0xF8FF) or cp == 0xFFFD
    out[SUPPLEMENT] += 0xA0 <= cp <= 0xFF
    out[SENTENCE_MARKS] += _is_wide_mark(cp)
    out[ELLIPSES] += cp == 0x2026


@nb.njit(inline="always")
def _add_ascii_char(cp, dots, out):
    out[SENTENCE_MARKS] += _is_narrow_mark(cp)
    out[BRACES] += cp == 123 or cp == 125
    out[HASHES] += cp == 35
    out[ELLIPSES] += dots == 3


@nb.njit(nogil=True, cache=True)
def _char_counts(text, start, end, common, kinds, out):
    kinds[:] = 0
    i = start
    dots = 0
    while i < end:
        cp, width = code_point(text, i)
        i += width
        kind = char_class(cp)
        kinds[kind] += 1
        dots = dots + 1 if cp == 46 else 0
        if cp >= 0x80:
            _add_wide_char(cp, kind, common, out)
        elif kind >= PUNCTUATION:
            _add_ascii_char(cp, dots, out)
    out[BYTES] = end - start
    out[CHARS] = kinds.sum()
    out[LETTERS] = kinds[LETTER] + kinds[SINGLE]
    out[DIGITS], out[SPACES], out[NEWLINES] = kinds[DIGIT], kinds[SPACE], kinds[NEWLINE]
    out[PUNCTUATIONS], out[SIGNS] = kinds[PUNCTUATION], kinds[SIGN]


@nb.njit(nogil=True, cache=True)
def _sentences(text, start, end):
    """Pieces with a word in them, ended by a mark; . ! ? end one only before a space or a closing, or
    behind a Han character (kana, hangul): Chinese puts no space between sentences."""
    found = 0
    is_open, is_after_mark, is_after_single = False, False, False
    i = start
    while i < end:
        cp, width = code_point(text, i)
        i += width
        kind = char_class(cp)
        if kind <= DIGIT or kind == SINGLE:
            is_open, is_after_mark, is_after_single = True, False, kind == SINGLE
            continue
        is_gap = kind in (SPACE, NEWLINE) or _is_closing(cp)
        is_mark = _is_narrow_mark(cp)
        is_end = _is_wide_mark(cp) or cp == 0x2026 or (is_after_mark and is_gap)
        if is_open and (is_end or (is_mark and is_after_single)):
            found += 1
            is_open = False
        is_after_mark, is_after_single = is_mark, False
    return found + is_open


@nb.njit(nogil=True, cache=True)
def _bracketed(text, start, end):
    """Characters between the brackets U+3010 and U+3011 of one line, from the first that opens."""
    total, inside = 0, 0
    is_open = False
    i = start
    while i < end:
        cp, width = code_point(text, i)
        i += width
        if cp == 0x3011:
            total += inside if is_open else 0
            is_open = False
        elif cp == 10:
            is_open = False
        elif is_open:
            inside += 1
        elif cp == 0x3010:
            is_open, inside = True, 0
    return total


# Words


@nb.njit(nogil=True, cache=True)
def _head_counts(hashes, found, logs, tables, stamp, out):
    """Distinct words and entropy (nats) of the first words. `logs` are n ln n."""
    keys, stamps, tallies, _ = tables
    head = min(found, HEAD_WORDS)
    mask = mask_for(head)
    unique = 0
    total = 0.0
    for i in range(head):
        slot = slot_of(keys, stamps, mask, stamp, hashes[i])
        if stamps[slot] != stamp:
            stamps[slot], keys[slot], tallies[slot] = stamp, hashes[i], 0
            unique += 1
        tallies[slot] += 1
        total += logs[tallies[slot]] - logs[tallies[slot] - 1]
    out[HEAD_COUNT], out[HEAD_UNIQUE] = head, unique
    return max(0.0, np.log(head) - total / head) if head else 0.0


@nb.njit(nogil=True, cache=True)
def _stop_counts(hashes, lengths, found, stop_table, stop_lists, out):
    """How many of our stop words occur, and how often those of the other lists do."""
    stop_keys, stop_numbers = stop_table
    seen = U64(0)
    for i in range(found):
        if lengths[i] > STOP_MAX_CHARS:
            continue
        slot = np.int64(hashes[i] & U64(STOP_SLOTS - 1))
        while stop_numbers[slot] >= 0 and stop_keys[slot] != hashes[i]:
            slot = (slot + 1) & (STOP_SLOTS - 1)
        number = stop_numbers[slot]
        if number >= 0:
            lists = stop_lists[number]
            seen |= U64(lists & OURS) << U64(number & 63)
            out[GOPHER_STOPS] += (lists & GOPHER) > 0
            out[FINEWEB2_STOPS] += (lists & FINEWEB2) > 0
    while seen:
        out[STOP_WORDS] += 1
        seen &= seen - U64(1)


@nb.njit(nogil=True, cache=True)
def _stop_table(stops):
    keys = np.zeros(STOP_SLOTS, np.uint64)
    numbers = np.full(STOP_SLOTS, -1, np.int32)
    for number in range(stops.shape[0]):
        slot = np.int64(stops[number] & U64(STOP_SLOTS - 1))
        while numbers[slot] >= 0:
            slot = (slot + 1) & (STOP_SLOTS - 1)
        keys[slot], numbers[slot] = stops[number], number
    return keys, numbers


@nb.njit(nogil=True, cache=True)
def _n_log_n():
    logs = np.zeros(HEAD_WORDS + 1, np.float64)
    for n in range(2, HEAD_WORDS + 1):
        logs[n] = n * np.log(n)
    return logs


@nb.njit(nogil=True, cache=True)
def room_for(words):
    """Working memory for documents of so many words: hashes, lengths, what repetition needs, tables."""
    size = 1024
    while size < words + 1:
        size *= 2
    return (
        np.empty(size, np.uint64),
        np.empty(size, np.int32),
        (np.empty(size + 1, np.uint64), np.empty(size, np.int32), np.empty(size, np.int32)),
        new_tables(2 * size),
    )


@nb.njit(nogil=True, cache=True)
def measure(
    text: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    widths: npt.NDArray[np.int64],
    stops: npt.NDArray[np.uint64],
    stop_lists: npt.NDArray[np.uint8],
    common: npt.NDArray[np.bool_],
    counts_out: npt.NDArray[np.int64],
    grams_out: npt.NDArray[np.int64],
    entropy_out: npt.NDArray[np.float32],
) -> None:
    """Fill the statistics of every row.

    `widths` (rows, 9): words in the grams of the columns, rising. `stops`: distinct word
    hashes, `stop_lists`: the lists that each is on. `common`: for each character of U+4E00..U+9FFF
    whether it is common. The outputs are (rows, 39), (rows, 9) and (rows,), zeroed. Memory: 60 to 120 bytes per word of the longest row.
    """
    hashes, lengths, room, tables = room_for(1024)
    no_ends = np.empty(0, np.int64)
    stop_table = _stop_table(stops)
    logs = _n_log_n()
    marks, kinds = np.zeros(5, np.uint64), np.zeros(7, np.int64)
    stamp = 0
    for row in range(offsets.shape[0] - 1):
        start, end = offsets[row], offsets[row + 1]
        words = end - start
        if words > LARGE_BYTES:
            words = count_words(text, start, end)
        if words >= hashes.shape[0]:
            hashes, lengths, room, tables = room_for(words)
            stamp = 0
        out = counts_out[row]
        _char_counts(text, start, end, common, kinds, out)
        out[SENTENCES] = _sentences(text, start, end)
        if out[HAN]:
            out[BRACKETED] = _bracketed(text, start, end)
        found, out[LETTER_WORDS] = words_of(text, start, end, hashes, lengths, no_ends)
        out[WORDS] = found
        out[WORD_CHARS] = chars_of(lengths, 0, found)
        stamp += 1
        _line_counts(text, start, end, out, marks, tables, stamp)
        stamp += 1
        entropy_out[row] = _head_counts(hashes, found, logs, tables, stamp, out)
        _stop_counts(hashes, lengths, found, stop_table, stop_lists, out)
        stamp = repetition(hashes, lengths, found, widths[row], room, tables, stamp, grams_out[row])
