"""Which Han characters are common: the frequent halves of the two national character sets."""

import functools


@functools.cache
def common_han() -> frozenset[str]:
    """GB 2312 level 1 (3,755 simplified) and Big5 level 1 (5,401 traditional) characters.

    Both standards put the frequent characters first; together they are about a third of the basic
    Han block, and nearly all of any real modern text.
    """
    simplified = _decoded(range(0xB0, 0xD8), [*range(0xA1, 0xFF)], "gb2312")
    trails = [*range(0x40, 0x7F), *range(0xA1, 0xFF)]
    traditional = _decoded(range(0xA4, 0xC7), trails, "big5")
    return frozenset(simplified | traditional)


def _decoded(leads: range, trails: list[int], encoding: str) -> set[str]:
    pairs = (bytes((lead, trail)) for lead in leads for trail in trails)
    characters = (pair.decode(encoding, "ignore") for pair in pairs)
    return {character for character in characters if "\u4e00" <= character <= "\u9fff"}
