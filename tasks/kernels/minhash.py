"""Compiled loops of dedup: tokens, shingles, MinHash and SimHash signatures, exact Jaccard, greedy choice.

A token is one Han, kana or hangul character, or one run of letters, digits and `_` (ASCII lower-cased,
full-width ones taken as ASCII), unless `how` says otherwise. A shingle is `shingle_tokens` tokens in a row; a document with fewer is one
shingle, one without any token has none. Text comes as Arrow buffers: UTF-8 bytes and row offsets.
"""

# numba's decorators and arrays carry no types that pyright could follow
# pyright: basic

import numba as nb
import numpy as np
import numpy.typing as npt

from tasks.kernels.words import (
    FNV_OFFSET,
    GOLDEN,
    GRAM_FACTOR,
    U64,
    code_point,
    is_han,
    lower,
    mix64,
    narrow,
    with_letter,
)

U32 = np.uint32
MOST = U32(0xFFFFFFFF)

SEPARATOR, RUN, SINGLE = 0, 1, 2
HOW = ("tokens", "characters", "windows", "words")
TOKENS, CHARACTERS, WINDOWS, WORDS = range(4)
"""What is a token: see above; every letter and digit; every character; every run, Han ones too."""


@nb.njit(inline="always")
def _fmix32(h):
    """MurmurHash3's 32-bit finalizer, with which datasketch's affine32 scheme mixes its input."""
    h = U32(h ^ (h >> U32(16)))
    h = U32(h * U32(0x85EBCA6B))
    h = U32(h ^ (h >> U32(13)))
    h = U32(h * U32(0xC2B2AE35))
    return U32(h ^ (h >> U32(16)))


@nb.njit(inline="always")
def _kind(cp):
    """What a code point is. Ranges are written out: a Unicode table would change with Python."""
    if cp < 0x80:
        is_run = (97 <= cp <= 122) or (48 <= cp <= 57) or (65 <= cp <= 90) or cp == 95
        return RUN if is_run else SEPARATOR
    if cp < 0x2000:  # Latin with marks, Greek, Cyrillic, Hebrew, Arabic, Indic, Thai ...
        return RUN if cp >= 0xC0 and cp != 0xD7 and cp != 0xF7 else SEPARATOR
    # Han, kana, hangul
    if is_han(cp) or (0x3041 <= cp <= 0x30FF) or (0xAC00 <= cp <= 0xD7AF):
        return SINGLE
    return RUN if narrow(cp) < 0x80 else SEPARATOR


@nb.njit(inline="always")
def _kind_for(cp, how):
    kind = _kind(cp)
    if how == TOKENS:
        return kind
    if how == WINDOWS or (how == CHARACTERS and kind == RUN):
        return SINGLE
    return RUN if how == WORDS and kind == SINGLE else kind


@nb.njit(nogil=True, cache=True)
def _token_hashes(text, start, end, how, out):
    """Write one 64-bit hash per token of text[start:end]; how many there are."""
    found = 0
    i = start
    is_in_run = False
    h = FNV_OFFSET
    while i < end:
        cp, width = code_point(text, i)
        kind = _kind_for(cp, how)
        if kind == RUN:
            if not is_in_run:
                h = FNV_OFFSET
                is_in_run = True
            h = with_letter(h, cp, text, i, width)
        else:
            if is_in_run:
                out[found] = mix64(h)
                found += 1
                is_in_run = False
            if kind == SINGLE:
                if how == CHARACTERS:
                    cp = lower(narrow(cp))
                out[found] = mix64(U64(cp) + GOLDEN)
                found += 1
        i += width
    if is_in_run:
        out[found] = mix64(h)
        found += 1
    return found


@nb.njit(nogil=True, cache=True)
def shingle_hashes(text, start, end, shingle_tokens, how, tokens):
    """Overwrite `tokens` with one 64-bit hash per shingle, repeats included; how many there are."""
    found = _token_hashes(text, start, end, how, tokens)
    if found == 0:
        return 0
    width = min(shingle_tokens, found)
    shingles = found - width + 1
    for i in range(shingles):
        x = U64(width)
        for j in range(width):
            x = x * GRAM_FACTOR + tokens[i + j]
        tokens[i] = mix64(x)
    return shingles


@nb.njit(nogil=True, cache=True)
def sort_hashes(values, count, spare):
    """Sort the first `count` evenly spread 64-bit hashes in place; `spare` is as large.

    Hashes fall into as many slots as there are of them, by their upper bits, so what is left for the second
    pass is nearly in order: three times as fast as a general sort.
    """
    if count < 2:
        return
    bits = 1
    while (1 << bits) < count and bits < 20:
        bits += 1
    shift = U64(64 - bits)
    places = np.zeros((1 << bits) + 1, np.int32)
    for i in range(count):
        places[np.int64(values[i] >> shift) + 1] += 1
    for slot in range(1, places.shape[0]):
        places[slot] += places[slot - 1]
    for i in range(count):
        slot = np.int64(values[i] >> shift)
        spare[places[slot]] = values[i]
        places[slot] += 1
    for i in range(count):
        value, j = spare[i], i - 1
        while j >= 0 and values[j] > value:
            values[j + 1] = values[j]
            j -= 1
        values[j + 1] = value


@nb.njit(nogil=True, cache=True)
def token_counts(
    text: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Number of tokens of every row."""
    counts = np.empty(offsets.shape[0] - 1, np.int64)
    for row in range(counts.shape[0]):
        tokens = np.empty(offsets[row + 1] - offsets[row], np.uint64)
        counts[row] = _token_hashes(text, offsets[row], offsets[row + 1], TOKENS, tokens)
    return counts


@nb.njit(nogil=True, cache=True)
def sign(
    text: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    shingle_tokens: int,
    how: int,
    a: npt.NDArray[np.uint32],
    b: npt.NDArray[np.uint32],
    signatures: npt.NDArray[np.uint32],
    shingles: npt.NDArray[np.uint32],
) -> None:
    """Write the MinHash signature (documents, permutations) and the number of shingles of every row.

    The value of permutation k is the minimum over shingles of `a[k] * fmix32(h) + b[k]` modulo 2^32,
    h the upper half of the shingle's hash: datasketch 2.0's scheme "affine32". Rows without a shingle
    are all ones.
    """
    tokens = np.empty(1024, np.uint64)
    mixed = np.empty(1024, np.uint32)
    for row in range(offsets.shape[0] - 1):
        start, end = offsets[row], offsets[row + 1]
        if end - start > tokens.shape[0]:
            tokens = np.empty(2 * (end - start), np.uint64)
            mixed = np.empty(2 * (end - start), np.uint32)
        found = shingle_hashes(text, start, end, shingle_tokens, how, tokens)
        shingles[row] = found
        for i in range(found):
            mixed[i] = _fmix32(U32(tokens[i] >> U64(32)))
        # Four at a time: a hash is loaded once for all of them.
        whole = a.shape[0] // 4 * 4
        for k in range(0, whole, 4):
            a_0, a_1, a_2, a_3 = a[k], a[k + 1], a[k + 2], a[k + 3]
            b_0, b_1, b_2, b_3 = b[k], b[k + 1], b[k + 2], b[k + 3]
            least_0, least_1, least_2, least_3 = MOST, MOST, MOST, MOST
            for i in range(found):
                h = mixed[i]
                least_0 = min(least_0, U32(h * a_0 + b_0))
                least_1 = min(least_1, U32(h * a_1 + b_1))
                least_2 = min(least_2, U32(h * a_2 + b_2))
                least_3 = min(least_3, U32(h * a_3 + b_3))
            signatures[row, k], signatures[row, k + 1] = least_0, least_1
            signatures[row, k + 2], signatures[row, k + 3] = least_2, least_3
        for k in range(whole, a.shape[0]):
            least = MOST
            for i in range(found):
                least = min(least, U32(mixed[i] * a[k] + b[k]))
            signatures[row, k] = least


@nb.njit(nogil=True, cache=True)
def band_keys(
    signatures: npt.NDArray[np.uint32], bands: int, rows: int, keys: npt.NDArray[np.uint64]
) -> None:
    """Write (bands, documents): a 64-bit hash of each band's `rows` signature values."""
    for document in range(signatures.shape[0]):
        for band in range(bands):
            x = U64(band) + GOLDEN
            for j in range(rows):
                x = mix64(x ^ U64(signatures[document, band * rows + j])) + GOLDEN * U64(j + 1)
            keys[band, document] = x


@nb.njit(nogil=True, cache=True)
def shingle_sets(
    text: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    shingle_tokens: int,
    how: int,
    out: npt.NDArray[np.uint64],
    at: int,
    ends: npt.NDArray[np.int64],
) -> int:
    """Write the sorted distinct shingle hashes of every row from `out[at]` on, one row after another.

    Also where each row ends in `out`, which has room for all shingles; returns where the last one ends.
    """
    tokens, spare = np.empty(1024, np.uint64), np.empty(1024, np.uint64)
    for row in range(offsets.shape[0] - 1):
        start, end = offsets[row], offsets[row + 1]
        if end - start > tokens.shape[0]:
            tokens = np.empty(2 * (end - start), np.uint64)
            spare = np.empty(2 * (end - start), np.uint64)
        found = shingle_hashes(text, start, end, shingle_tokens, how, tokens)
        sort_hashes(tokens, found, spare)
        for i in range(found):
            if i == 0 or tokens[i] != tokens[i - 1]:
                out[at] = tokens[i]
                at += 1
        ends[row] = at
    return at


@nb.njit(nogil=True, cache=True)
def jaccard(
    values: npt.NDArray[np.uint64],
    begins: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    x: int,
    y: int,
) -> float:
    """Exact Jaccard similarity of two rows of `shingle_sets`; 0 if either is empty."""
    i, j = begins[x], begins[y]
    size = ends[x] - i + ends[y] - j
    shared = 0
    while i < ends[x] and j < ends[y]:
        if values[i] == values[j]:
            shared += 1
            i += 1
            j += 1
        elif values[i] < values[j]:
            i += 1
        else:
            j += 1
    return shared / (size - shared) if size else 0.0


@nb.njit(nogil=True, cache=True)
def bits_between(x, y):
    """Hamming distance of two 64-bit numbers."""
    x = x ^ y
    count = 0
    while x:
        x &= x - U64(1)
        count += 1
    return count


@nb.njit(nogil=True, cache=True)
def simhash(
    text: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    shingle_tokens: int,
    how: int,
    known: npt.NDArray[np.uint64],
    rarity: npt.NDArray[np.float64],
    rarest: float,
    hashes: npt.NDArray[np.uint64],
    shingles: npt.NDArray[np.uint32],
) -> None:
    """Write the 64-bit SimHash and the number of shingles of every row.

    Bit k is set if the weights of the distinct shingles whose hash has bit k outweigh the others. A weight
    is the shingle's count in the row times its `rarity` (of the sorted hashes `known`, else `rarest`);
    all weights are 1 if `rarest` is 0. Source: Charikar 2002, section 3.
    """
    tokens = np.empty(1024, np.uint64)
    sums = np.zeros(64, np.float64)
    for row in range(offsets.shape[0] - 1):
        start, end = offsets[row], offsets[row + 1]
        if end - start > tokens.shape[0]:
            tokens = np.empty(2 * (end - start), np.uint64)
        found = shingle_hashes(text, start, end, shingle_tokens, how, tokens)
        shingles[row] = found
        ordered = np.sort(tokens[:found])
        sums[:] = 0.0
        i = 0
        while i < found:
            value, first = ordered[i], i
            while i < found and ordered[i] == value:
                i += 1
            weight = 1.0
            if rarest > 0:
                weight = (i - first) * rarity_of(value, known, rarity, rarest)
            for k in range(64):
                sums[k] += weight if (value >> U64(k)) & U64(1) else -weight
        bits = U64(0)
        for k in range(64):
            if sums[k] > 0:
                bits |= U64(1) << U64(k)
        hashes[row] = bits


@nb.njit(nogil=True, cache=True)
def rarity_of(value, known, rarity, rarest):
    """The rarity of a shingle; `rarest` for one that is not among the known."""
    place = np.searchsorted(known, value)
    return rarity[place] if place < known.shape[0] and known[place] == value else rarest


@nb.njit(nogil=True, cache=True)
def _candidates(p, buckets, head, seen_by, out):
    """Write every kept document that shares a bucket with p, in order, each once; how many."""
    found = 0
    for band in range(buckets.shape[0]):
        bucket = buckets[band, p]
        other = head[bucket] if bucket >= 0 else -1
        while other >= 0:
            if seen_by[other] != p:
                seen_by[other] = p
                out[found] = other
                found += 1
            other = buckets[band, other]
    out[:found].sort()
    return found


@nb.njit(nogil=True, cache=True)
def _keep(p, buckets, head):
    """Enter p into the chains of its buckets; the one before it takes the place of the bucket's number."""
    for band in range(buckets.shape[0]):
        bucket = buckets[band, p]
        if bucket >= 0:
            buckets[band, p] = head[bucket]
            head[bucket] = p


@nb.njit(nogil=True, cache=True)
def choose(
    buckets: npt.NDArray[np.int64],
    bucket_count: int,
    is_old: npt.NDArray[np.bool_],
    owners: npt.NDArray[np.int64],
    signatures: npt.NDArray[np.uint32],
    values: npt.NDArray[np.uint64],
    begins: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    threshold: float,
    least_agreeing: float,
    is_dropped: npt.NDArray[np.bool_],
    nearest: npt.NDArray[np.int64],
    similarity: npt.NDArray[np.float64],
) -> int:
    """Go through documents in order; drop one if an earlier kept one is as close as the threshold.

    `buckets` is (bands, documents): the number of the bucket a document is in, -1 if it is alone.
    It is used up.
    Documents with `is_old` were kept by an earlier landing and stay; those of one owner are not
    compared. Writes, per document, whether it is dropped, and a kept document with its similarity: the
    earliest within the threshold for a dropped one, else the nearest that was compared (-1 for none).
    Returns how many pairs were compared exactly.

    Only kept documents are candidates, so a bucket of ten thousand copies costs ten thousand
    comparisons, not their square. Pairs whose signatures agree in fewer than `least_agreeing` places
    are not compared.
    """
    head = np.full(bucket_count, -1, np.int64)
    seen_by = np.full(buckets.shape[1], -1, np.int64)
    out = np.empty(buckets.shape[1], np.int64)
    compared = 0
    for p in range(buckets.shape[1]):
        is_dropped[p], nearest[p], similarity[p] = False, -1, 0.0
        found = 0 if is_old[p] else _candidates(p, buckets, head, seen_by, out)
        for i in range(found):
            if owners[out[i]] == owners[p]:
                continue
            if np.sum(signatures[p] == signatures[out[i]]) < least_agreeing:
                continue
            compared += 1
            measured = jaccard(values, begins, ends, out[i], p)
            is_dropped[p] = measured >= threshold
            if is_dropped[p] or measured > similarity[p]:
                nearest[p], similarity[p] = out[i], measured
            if is_dropped[p]:
                break
        if not is_dropped[p]:
            _keep(p, buckets, head)
    return compared


@nb.njit(nogil=True, cache=True)
def choose_by_bits(
    buckets: npt.NDArray[np.int64],
    bucket_count: int,
    is_old: npt.NDArray[np.bool_],
    owners: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.uint64],
    distance_bits: int,
    is_dropped: npt.NDArray[np.bool_],
    nearest: npt.NDArray[np.int64],
) -> int:
    """As `choose`, by SimHashes: dropped if an earlier kept one differs in at most `distance_bits` bits."""
    head = np.full(bucket_count, -1, np.int64)
    seen_by = np.full(buckets.shape[1], -1, np.int64)
    out = np.empty(buckets.shape[1], np.int64)
    compared = 0
    for p in range(buckets.shape[1]):
        is_dropped[p], nearest[p] = False, -1
        found = 0 if is_old[p] else _candidates(p, buckets, head, seen_by, out)
        for i in range(found):
            if owners[out[i]] == owners[p]:
                continue
            compared += 1
            if bits_between(hashes[p], hashes[out[i]]) <= distance_bits:
                is_dropped[p], nearest[p] = True, out[i]
                break
        if not is_dropped[p]:
            _keep(p, buckets, head)
    return compared
