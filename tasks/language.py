"""Which language a text is in: script shares decide where they can, a model for the rest."""

import functools
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

KANA_SHARE = 0.02
HANGUL_SHARE = 0.3
HAN_SHARE = 0.3
SAMPLE_CHARS = 600
"""The model sees the beginning, the middle and the end, so many characters of each."""

_HAN = re.compile(r"[㐀-䶿一-鿿豈-﫿\U00020000-\U0003134f]+")
_KANA = re.compile(r"[぀-ヿㇰ-ㇿｦ-ﾝ]+")
_HANGUL = re.compile(r"[가-힯ᄀ-ᇿ㄰-㆏]+")
_LATIN = re.compile(r"[A-Za-zÀ-ÖØ-öø-ɏ]+")
_LETTERS = re.compile(r"[^\W\d_]+")
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
    letters = _count(_LETTERS, text)
    if letters == 0:
        return ScriptShares(0.0, 0.0, 0.0, 0.0)
    return ScriptShares(*(_count(script, text) / letters for script in _SCRIPTS))


def language_of(text: str, shares: ScriptShares) -> str:
    """ISO 639 code, `zxx` for what is no language, `und` for a text without letters.

    Classifiers trained on words are right on half of the short Chinese texts only, so scripts go
    first: kana is Japanese, Hangul Korean, Han Chinese; what is left goes to py3langid.
    """
    if shares.kana > KANA_SHARE:
        return "ja"
    if shares.hangul >= HANGUL_SHARE:
        return "ko"
    if shares.han >= HAN_SHARE:
        return "zh"
    if not any(shares) and not _LETTERS.search(text):
        return "und"
    return str(_identifier().classify(_sample(text))[0])


def _count(script: re.Pattern[str], text: str) -> int:
    return sum(map(len, script.findall(text)))


def _sample(text: str) -> str:
    if len(text) > 3 * SAMPLE_CHARS:
        middle = (len(text) - SAMPLE_CHARS) // 2
        text = "\n".join(
            (text[:SAMPLE_CHARS], text[middle : middle + SAMPLE_CHARS], text[-SAMPLE_CHARS:])
        )
    # Addresses are mostly English words, whatever the text around them is.
    return _URL.sub(" ", text)


@functools.cache
def _identifier() -> "LanguageIdentifier":
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


_SCRIPTS = (_HAN, _LATIN, _KANA, _HANGUL)
