"""Compiled counts of what a document repeats, in tables that are used over and over.

Tables are open-addressing; a slot whose stamp is not that of the present use is free.
"""

# numba's decorators and arrays carry no types that pyright could follow
# pyright: basic

import numba as nb
import numpy as np

from tasks.kernels.words import GRAM_FACTOR, U64, mix64

GRAMS = 9
"""Repetition columns: characters in the top 2-, 3- and 4-gram, in repeated 5- to 10-grams."""
TOP_GRAMS = 3


@nb.njit(inline="always")
def slot_of(keys, stamps, mask, stamp, key):
    """Where a key is, or belongs."""
    slot = np.int64(key & U64(mask))
    while stamps[slot] == stamp and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@nb.njit(inline="always")
def mask_for(entries):
    """Of a table with at least twice as many slots as entries; small ones stay in the cache."""
    slots = 64
    while slots < 2 * entries:
        slots *= 2
    return slots - 1


@nb.njit(inline="always")
def new_tables(slots):
    """Keys, stamps, tallies and first places of so many slots."""
    return (
        np.empty(slots, np.uint64),
        np.zeros(slots, np.int32),
        np.empty(slots, np.int32),
        np.empty(slots, np.int32),
    )


@nb.njit(inline="always")
def is_known(tables, mask, stamp, key):
    """Whether a key was there; it is from now on."""
    keys, stamps = tables[0], tables[1]
    slot = slot_of(keys, stamps, mask, stamp, key)
    if stamps[slot] == stamp:
        return True
    stamps[slot], keys[slot] = stamp, key
    return False


@nb.njit(nogil=True, cache=True)
def _prefix_hashes(hashes, found, prefixes):
    """prefixes[i] is the polynomial hash of the first i words, from which any gram's hash follows."""
    x = U64(0)
    prefixes[0] = x
    for i in range(found):
        x = x * GRAM_FACTOR + hashes[i]
        prefixes[i + 1] = x


@nb.njit(inline="always")
def _power(width):
    x = U64(1)
    for _ in range(width):
        x *= GRAM_FACTOR
    return x


@nb.njit(inline="always")
def chars_of(lengths, first, width):
    """Characters of `width` words."""
    total = 0
    for j in range(first, first + width):
        total += lengths[j]
    return total


@nb.njit(nogil=True, cache=True)
def _top_gram_chars(prefixes, lengths, live, live_count, width, tables, slots, stamp):
    """Characters covered by the most frequent gram (the first of equals), 0 if none repeats; and how
    many positions are left.

    `live` are the first words of the grams that may repeat: of each shorter gram that does. Those that
    repeat at this width stay in it.
    """
    keys, stamps, tallies, firsts = tables
    power = _power(width)
    mask = mask_for(live_count)
    best, best_first = 1, 0
    found = prefixes.shape[0] - 1
    count = 0
    for k in range(live_count):
        i = live[k]
        if i + width > found:
            break
        key = mix64(prefixes[i + width] - prefixes[i] * power)
        slot = slot_of(keys, stamps, mask, stamp, key)
        if stamps[slot] != stamp:
            stamps[slot], keys[slot], tallies[slot], firsts[slot] = stamp, key, 0, i
        tallies[slot] += 1
        slots[k] = slot
        count = k + 1
        if tallies[slot] > best or (tallies[slot] == best > 1 and firsts[slot] < best_first):
            best, best_first = tallies[slot], firsts[slot]
    left = 0
    for k in range(count):
        if tallies[slots[k]] > 1:
            live[left] = live[k]
            left += 1
    return (chars_of(lengths, best_first, width) * best if best > 1 else 0), left


@nb.njit(nogil=True, cache=True)
def _repeated_gram_chars(prefixes, lengths, live, live_count, width, tables, stamp):
    """Characters in grams seen before, a repeated gram being skipped as a whole (Gopher).

    Grams that begin elsewhere than at a `live` word occur once: to leave them out changes nothing.
    """
    keys, stamps = tables[0], tables[1]
    power = _power(width)
    mask = mask_for(live_count)
    found = prefixes.shape[0] - 1
    repeated = 0
    free = 0
    for k in range(live_count):
        i = live[k]
        if i + width > found:
            break
        if i < free:
            continue
        key = mix64(prefixes[i + width] - prefixes[i] * power)
        slot = slot_of(keys, stamps, mask, stamp, key)
        if stamps[slot] == stamp:
            repeated += chars_of(lengths, i, width)
            free = i + width
        else:
            stamps[slot], keys[slot] = stamp, key
    return repeated


@nb.njit(nogil=True, cache=True)
def repetition(hashes, lengths, found, widths, room, tables, stamp, out):
    """Fill the nine repetition columns of a document; the last stamp used.

    Widths must rise: what repeats at one repeats at all smaller ones.
    """
    prefixes, live, slots = room
    prefixes = prefixes[: found + 1]
    _prefix_hashes(hashes, found, prefixes)
    live_count = found
    for i in range(found):
        live[i] = i
    for k in range(GRAMS):
        if live_count == 0:
            break
        stamp += 1
        if k < TOP_GRAMS:
            out[k], live_count = _top_gram_chars(
                prefixes, lengths, live, live_count, widths[k], tables, slots, stamp
            )
        else:
            out[k] = _repeated_gram_chars(
                prefixes, lengths, live, live_count, widths[k], tables, stamp
            )
    return stamp
