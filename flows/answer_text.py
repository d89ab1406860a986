"""Tokens become text as they come: no character is cut, and nothing behind a stop string is shown."""

from collections.abc import Sequence

from storage.tokenizer import ChatTokenizer

UNKNOWN = "\ufffd"
HELD_BACK = 3
"""A character whose last byte is missing is at most three bytes, each of which decodes to U+FFFD."""


class TokenText:
    """Text of tokens that come one by one; a character is told when all its bytes are there."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        """The tokens before `_window`: some decoders need to know that a token is not the first."""
        self._window: list[int] = []
        self._told = 0
        """Characters of the window that were told."""

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._window.append(token)
        text = self._text()
        end = len(text)
        while end > max(self._told, len(text) - HELD_BACK) and text[end - 1] == UNKNOWN:
            end -= 1
        piece, self._told = text[self._told : end], max(self._told, end)
        if end == len(text):
            # A special token is no text; the one before it is still what the next one follows.
            self._before, self._window, self._told = self._window if text else self._before, [], 0
        return piece

    def finish(self) -> str:
        """What was held back; bytes that never became a character are U+FFFD."""
        return self._text()[self._told :] if self._window else ""

    def _text(self) -> str:
        start = len(self._tokenizer.decode(self._before))
        return self._tokenizer.decode([*self._before, *self._window])[start:]


class StopStrings:
    """Passes text on up to the first of some strings; what may be the beginning of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.is_found = False

    def add(self, text: str) -> str:
        """The text that surely stands before any stop string."""
        if not self._stops or self.is_found:
            return "" if self.is_found else text
        self._held += text
        if ends := [place for stop in self._stops if (place := self._held.find(stop)) >= 0]:
            self.is_found = True
            return self._held[: min(ends)]
        waits = max(_begun(self._held, stop) for stop in self._stops)
        told, self._held = self._held[: len(self._held) - waits], self._held[-waits:] * (waits > 0)
        return told

    def finish(self) -> str:
        """What waited, when nothing more comes."""
        return "" if self.is_found else self._held


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of the text are a beginning of the string."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
