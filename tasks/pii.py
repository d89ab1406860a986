"""Personal data in text, replaced by what kind it was: mail, IP addresses, phone and identity numbers.

Phone and identity numbers are those of China. A kind is looked for only in a text that holds what all
of its forms hold, so that most texts cost a scan or two.
"""

import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from conf.extract import PersonalData

_ALL: tuple[PersonalData, ...] = ("email", "ip", "phone", "identity")
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_])?"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])"
)
# A version of four numbers that stands alone cannot be told from an address.
_IPV4 = re.compile(r"(?<![0-9A-Za-z.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9A-Za-z]|\.[0-9])")
# Global unicast addresses all begin with 2 or 3 (RFC 4291).
_IPV6 = re.compile(r"(?<![0-9A-Za-z:])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?![0-9A-Za-z:])")
_BEFORE_NUMBER = r"(?<![0-9A-Za-z_])(?<![0-9][-.])"
_AFTER_NUMBER = r"(?![0-9A-Za-z_]|[-.][0-9])"
_MOBILE = (
    r"(?:(?:\+|00)?86[- ]?)?"
    r"1(?:3[0-9]|4[5-9]|5[0-35-9]|6[2567]|7[0-8]|8[0-9]|9[0-35-9])([- ]?)[0-9]{4}\1[0-9]{4}"
)
_AREA = r"(?:10|2[0-9]|[3-9][0-9]{2})"
_LANDLINE = (
    rf"(?:(?:\+|00)86[- ]?(?:\(0?{_AREA}\)|0?{_AREA})|\(0{_AREA}\)|0{_AREA}(?=[- ]))[- ]?"
    r"[2-8][0-9]{2,3}[- ]?[0-9]{4}"
)
_PHONE = re.compile(rf"{_BEFORE_NUMBER}(?:{_MOBILE}|{_LANDLINE}){_AFTER_NUMBER}")
_IDENTITY = re.compile(
    r"(?<![0-9A-Za-z])"
    r"(?:1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3])[0-9]{4}"
    r"(?:18|19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])[0-9]{3}[0-9Xx](?![0-9A-Za-z])"
)
# What every form of a kind holds; they begin with a set of characters, which `re` scans for fast.
_LIKE_PHONE = re.compile(r"[0-9]{3}[- ]?[0-9]{4}")
_LIKE_IDENTITY = re.compile(r"[0-9]{17}")
_LIKE_IPV4 = re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")
_LIKE_IPV6 = re.compile(r"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]")
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_CHECK_DIGITS = "10X98765432"


def _always(_: str) -> bool:
    return True


def _is_public(address: str) -> bool:
    """Whether an address may be a person's: private, loopback and broken ones are nobody's."""
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def has_check_digit(number: str) -> bool:
    """Whether an identity number of 18 places ends in its check digit (GB 11643-1999, ISO 7064)."""
    total = sum(weight * int(digit) for weight, digit in zip(_WEIGHTS, number, strict=False))
    return number[17].upper() == _CHECK_DIGITS[total % 11]


@dataclass(frozen=True)
class _Form:
    """One way to write a kind of personal data."""

    kind: PersonalData
    mask: str
    pattern: re.Pattern[str]
    is_valid: Callable[[str], bool]
    may_be_in: Callable[[str], object]


# Identity numbers come before phone numbers: eleven of their digits may look like one.
_FORMS = (
    _Form("email", "[EMAIL]", _EMAIL, _always, lambda text: "@" in text),
    _Form("identity", "[IDENTITY]", _IDENTITY, has_check_digit, _LIKE_IDENTITY.search),
    _Form("ip", "[IP]", _IPV4, _is_public, _LIKE_IPV4.search),
    _Form("ip", "[IP]", _IPV6, _is_public, _LIKE_IPV6.search),
    _Form("phone", "[PHONE]", _PHONE, _always, _LIKE_PHONE.search),
)


def mask(text: str, kinds: Sequence[PersonalData] = _ALL) -> tuple[str, dict[str, int]]:
    """The text with every piece of personal data replaced by its kind in brackets, and how many of
    each kind there were (kinds without any are absent)."""
    counts: dict[str, int] = {}
    for form in _FORMS:
        if form.kind in kinds and form.may_be_in(text):
            text = _masked(text, form, counts)
    return text, counts


def _masked(text: str, form: _Form, counts: dict[str, int]) -> str:
    def replaced(found: re.Match[str]) -> str:
        if not form.is_valid(found.group()):
            return found.group()
        counts[form.kind] = counts.get(form.kind, 0) + 1
        return form.mask

    return form.pattern.sub(replaced, text)
