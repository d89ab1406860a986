"""One form for every text: Unicode form, no control characters, no runs of blank lines."""

import re
import unicodedata

from conf.extract import NormaliseConfig

_LINE_ENDS = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# Controls, the byte order mark, bidirectional and zero-width marks; U+200D and U+200C stay: emoji
# and several scripts are spelt with them.
_CONTROLS = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]"
)
_ASCII_CONTROLS = bytes([*range(0x09), *range(0x0E, 0x20), 0x7F])
_SURROGATES = re.compile("[\ud800-\udfff]")
# The look-behind lets a run of spaces be tried once, not once for each of its spaces.
_SPACE_ENDS = re.compile(r"(?<![ \t\u00a0\u3000])[ \t\u00a0\u3000]+$", re.MULTILINE)
_SPACES = re.compile("[\u00a0\u2000-\u200a\u202f\u205f]")
_BLANK_LINES = re.compile(r"\n{3,}")
_HALF_WIDTH = {
    full: full - 0xFEE0
    for first, last in (("０", "９"), ("Ａ", "Ｚ"), ("ａ", "ｚ"))
    for full in range(ord(first), ord(last) + 1)
}
_CHINESE_MARKS = dict(zip(",.;:!?", "，。；：！？", strict=True))
_PLAIN_MARKS = {chinese: plain for plain, chinese in _CHINESE_MARKS.items()}
_AFTER_HAN = re.compile(r"(?<=[\u3400-\u9fff])[,.;:!?](?![A-Za-z0-9,.;:!?/])")
_AFTER_LATIN = re.compile(r"(?<=[A-Za-z0-9])[，。；：！？](?![\u3400-\u9fff，。；：！？])")
_RUNS = re.compile(r"([!?。！？，,、~～=*_#\-—…·])\1{4,}")


def normalise(text: str, settings: NormaliseConfig) -> str:
    """The text as the corpus keeps it; always valid Unicode with LF line ends, trimmed.

    Lone surrogates become U+FFFD whatever the settings: they cannot be written as UTF-8.
    """
    text = _with_plain_line_ends(without_halves(text))
    if settings.unicode_form != "none" and not text.isascii():
        text = unicodedata.normalize(settings.unicode_form, text)
    if settings.width == "half":
        text = text.translate(_HALF_WIDTH)
    if settings.punctuation == "by_script" and not text.isascii():
        text = _AFTER_HAN.sub(lambda match: _CHINESE_MARKS[match.group()], text)
        text = _AFTER_LATIN.sub(lambda match: _PLAIN_MARKS[match.group()], text)
    if settings.is_without_controls:
        text = _without_controls(text)
    if settings.max_blank_lines is not None:
        text = _with_few_blank_lines(text, settings.max_blank_lines)
    if settings.max_punctuation_run is not None:
        run = settings.max_punctuation_run
        text = _RUNS.sub(lambda match: match.group(0)[:run], text)
    return text.strip()


def without_halves(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair, as programs leave them that cut a text by
    UTF-16: no file of ours can hold one."""
    # A search for what is not there is cheap, an expression that tries every character is not.
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


def _with_plain_line_ends(text: str) -> str:
    if "\r" in text or "\x0b" in text or "\x0c" in text:
        return _LINE_ENDS.sub("\n", text)
    if "\x85" in text or "\u2028" in text or "\u2029" in text:
        return _LINE_ENDS.sub("\n", text)
    return text


def _without_controls(text: str) -> str:
    if text.isascii():
        return text.encode("ascii").translate(None, _ASCII_CONTROLS).decode("ascii")
    return _SPACES.sub(" ", _CONTROLS.sub("", text))


def _with_few_blank_lines(text: str, most: int) -> str:
    """Lines without spaces at their ends, and at most so many blank ones in a row."""
    if " \n" in text or "\t\n" in text or "\u00a0\n" in text or "\u3000\n" in text:
        text = _SPACE_ENDS.sub("", text)
    return _BLANK_LINES.sub("\n" * (most + 1), text) if "\n\n\n" in text else text
