"""Which Han characters are common, simplified or traditional, as the national character sets say."""

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FIRST_HAN, LAST_HAN = 0x4E00, 0x9FFF


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
    import numpy as np

    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    # Below the block the difference wraps round, and is beyond it too.
    places = np.minimum(codes - np.uint32(FIRST_HAN), LAST_HAN + 1 - FIRST_HAN)
    _, simplified, traditional = np.bincount(_telling()[places], minlength=3).tolist()
    return traditional / (simplified + traditional) if simplified + traditional else 0.0


@functools.cache
def _telling() -> "npt.NDArray[np.uint8]":
    """Per character of the basic block: 1 for a simplified form, 2 for a traditional one, else 0."""
    import numpy as np

    simplified = _decoded(range(0xB0, 0xF8), [*range(0xA1, 0xFF)], "gb2312")
    trails = [*range(0x40, 0x7F), *range(0xA1, 0xFF)]
    traditional = _decoded(range(0xA4, 0xFA), trails, "big5")
    kinds = np.zeros(LAST_HAN + 2 - FIRST_HAN, np.uint8)
    kinds[[ord(character) - FIRST_HAN for character in simplified - traditional]] = 1
    kinds[[ord(character) - FIRST_HAN for character in traditional - simplified]] = 2
    return kinds


def _decoded(leads: range, trails: list[int], encoding: str) -> set[str]:
    pairs = (bytes((lead, trail)) for lead in leads for trail in trails)
    characters = (pair.decode(encoding, "ignore") for pair in pairs)
    return {c for c in characters if c and FIRST_HAN <= ord(c) <= LAST_HAN}
