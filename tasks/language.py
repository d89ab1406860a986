"""Which language a text is in: script shares decide where they can, a model for the rest."""

import functools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

KANA_SHARE = 0.02
HANGUL_SHARE = 0.3
HAN_SHARE = 0.3
SAMPLE_CHARS = 600
"""The model sees the beginning, the middle and the end, so many characters of each."""
TABLED = 0x10000
"""Characters from here on, mostly emoji, are so few that they are looked at one by one."""
KINDS = 32

_HAN = re.compile(r"[㐀-䶿一-鿿豈-﫿\U00020000-\U0003134f]+")
_KANA = re.compile(r"[぀-ヿㇰ-ㇿｦ-ﾝ]+")
_HANGUL = re.compile(r"[가-힯ᄀ-ᇿ㄰-㆏]+")
_LATIN = re.compile(r"[A-Za-zÀ-ÖØ-öø-ɏ]+")
_LETTERS = re.compile(r"[^\W\d_]+")
_SCRIPTS = (_HAN, _LATIN, _KANA, _HANGUL)
_URL = re.compile(r"(?:https?://|www\.)\S+")


class ScriptShares(NamedTuple):
    """Shares of a text's letters (digits, punctuation and spaces are no letters), 0 without any."""

    han: float
    latin: float
    kana: float
    hangul: float


def script_shares(text: str) -> ScriptShares:
    """How many of the letters belong to each script."""
    if text.isascii():
        return ScriptShares(0.0, 1.0 if _LATIN.search(text) else 0.0, 0.0, 0.0)
    letters, *counts = _tally(text)
    return ScriptShares(*(count / letters if letters else 0.0 for count in counts))


def language_of(text: str, shares: ScriptShares) -> str:
    """ISO 639 code, `zxx` for what is no language, `und` for a text without letters.

    Classifiers trained on words are right on half of the short Chinese texts only, so scripts go
    first: kana is Japanese, Hangul Korean, Han Chinese; what is left goes to py3langid.
    """
    return languages_of([text], [shares])[0]


def languages_of(texts: Sequence[str], shares: Sequence[ScriptShares]) -> list[str]:
    """`language_of` of each text; many at once take half of the time."""
    found = [_by_script(text, of_text) for text, of_text in zip(texts, shares, strict=True)]
    unsure = [place for place, language in enumerate(found) if language is None]
    told = identifier().tell([_sample(texts[place]) for place in unsure]) if unsure else []
    languages = dict(zip(unsure, told, strict=True))
    return [language or languages[place] for place, language in enumerate(found)]


def _by_script(text: str, shares: ScriptShares) -> str | None:
    """The language where the script says it."""
    if shares.kana > KANA_SHARE:
        return "ja"
    if shares.hangul >= HANGUL_SHARE:
        return "ko"
    if shares.han >= HAN_SHARE:
        return "zh"
    return None if any(shares) or _LETTERS.search(text) else "und"


def _tally(text: str) -> "list[int]":
    """Letters, and characters of each script."""
    import numpy as np

    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    counts = np.bincount(_kinds()[np.minimum(codes, TABLED)], minlength=KINDS)
    if len(rare := codes[codes >= TABLED]):
        counts += np.bincount(_kinds_of("".join(map(chr, rare))), minlength=KINDS)
    has_bit = np.arange(KINDS) >> np.arange(1 + len(_SCRIPTS))[:, None] & 1
    return (has_bit @ counts).tolist()


@functools.cache
def _kinds() -> "npt.NDArray[np.uint8]":
    return _kinds_of("".join(map(chr, range(TABLED))) + " ")


def _kinds_of(characters: str) -> "npt.NDArray[np.uint8]":
    """Per character a bit for a letter and one for each script."""
    import numpy as np

    kinds = np.zeros(len(characters), np.uint8)
    for bit, pattern in enumerate((_LETTERS, *_SCRIPTS)):
        for match in pattern.finditer(characters):
            kinds[match.start() : match.end()] |= 1 << bit
    return kinds


def _sample(text: str) -> str:
    if len(text) > 3 * SAMPLE_CHARS:
        middle = (len(text) - SAMPLE_CHARS) // 2
        text = "\n".join(
            (text[:SAMPLE_CHARS], text[middle : middle + SAMPLE_CHARS], text[-SAMPLE_CHARS:])
        )
    # Addresses are mostly English words, whatever the text around them is.
    return _URL.sub(" ", text)


@functools.cache
def identifier() -> Any:
    """py3langid's model, its loop over bytes compiled: the same features in the same order, and so the same
    sums. Its method `tell` is `classify` of many texts, without the probability."""
    import numpy as np
    from py3langid import langid

    from tasks.kernels import automaton
    from tasks.kernels.compiling import alone

    class Compiled(langid.LanguageIdentifier):
        """Of the loops only the one over bytes is another."""

        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            self.rows = np.array(self.tk_row).astype(np.int64) << 8
            self.moves, self.features = np.asarray(self.tk_nextmove), np.array(self.tk_output, "i4")
            # Widened once, not for every text; the narrow ones are not kept beside them.
            self.nb_ptc = self.nb_ptc.astype(np.float32)
            self._full_model = self.nb_ptc, self.nb_pc, self.nb_classes
            self.met: dict[bytes, Any] = {}

        def tell(self, texts: Sequence[str]) -> list[str]:
            encoded = [self._encode(text) for text in texts]
            self.met = dict(zip(encoded, self._visit(encoded), strict=True))
            return [str(self.classify(text)[0]) for text in texts]

        def _visit(self, texts: Sequence[bytes]) -> Iterator[tuple[Any, Any]]:
            """Features met in each text, and how often."""
            ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
            visited, counts = np.empty(ends[-1], np.int32), np.empty(ends[-1], np.float32)
            content = np.frombuffer(b"".join(texts), np.uint8)
            found = automaton.visit(
                content, ends, self.moves, self.rows, self.features, visited, counts
            )
            for text, end, number in zip(texts, ends, found, strict=True):
                place = slice(end - len(text), end - len(text) + number)
                yield visited[place], counts[place]

        def _raw_score(self, text: bytes) -> "npt.NDArray[np.float32]":
            visited, counts = self.met.get(text) or next(self._visit([text]))
            if len(visited) == 0:
                return np.zeros(len(self.nb_classes), np.float32)
            return np.log1p(counts) @ self.nb_ptc[visited] + self.nb_pc

    model = Compiled.from_model_file(langid.MODEL_FILE, norm_probs=True)
    with alone():
        model.classify("a")
    return model
