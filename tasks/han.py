"""Which Han characters are common, simplified or traditional, as the national character sets say."""

import functools
import re


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


def traditional_share(text: str) -> float:
    """Share of the traditional characters among those that tell the two ways of writing apart.

    0 for simplified text, 1 for traditional text, 0 where no character tells. GB 2312 has the
    simplified forms, Big5 the traditional ones; what is in both tells nothing.
    """
    simplified, traditional = _telling()
    counts = sum(map(len, simplified.findall(text))), sum(map(len, traditional.findall(text)))
    return counts[1] / sum(counts) if any(counts) else 0.0


@functools.cache
def _telling() -> tuple[re.Pattern[str], re.Pattern[str]]:
    simplified = _decoded(range(0xB0, 0xF8), [*range(0xA1, 0xFF)], "gb2312")
    trails = [*range(0x40, 0x7F), *range(0xA1, 0xFF)]
    traditional = _decoded(range(0xA4, 0xFA), trails, "big5")
    return _any_of(simplified - traditional), _any_of(traditional - simplified)


def _any_of(characters: set[str]) -> re.Pattern[str]:
    return re.compile(f"[{''.join(sorted(characters))}]+")


def _decoded(leads: range, trails: list[int], encoding: str) -> set[str]:
    pairs = (bytes((lead, trail)) for lead in leads for trail in trails)
    characters = (pair.decode(encoding, "ignore") for pair in pairs)
    return {character for character in characters if "\u4e00" <= character <= "\u9fff"}
