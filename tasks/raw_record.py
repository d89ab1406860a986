"""What is read from a raw file: a page, a text, or why there is neither."""

from collections.abc import Callable
from dataclasses import dataclass

UrlRule = Callable[[str], str | None]
"""Why an address is refused, before its record is read; none where it is not."""


@dataclass(frozen=True)
class RawRecord:
    """A page (bytes and the charset of its HTTP header) or a text."""

    url: str = ""
    page: bytes | None = None
    charset: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Refusal:
    """A record that is not read, and why."""

    url: str
    reason: str
    """`damaged_file`, `bad_record`, `no_text`, `blocked`, `url_word`, ...; detail after a colon."""
