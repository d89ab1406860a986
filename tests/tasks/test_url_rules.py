"""Addresses are refused by host, domain, path or word, before anything is parsed."""

import time
from pathlib import Path

import pytest

from tasks.url_rules import UrlRules, one_expression, write_blocked

LIST = """
# comment
0.0.0.0 bad.example
127.0.0.1 localhost
casino.test   # trailing comment
*.ads.example.org
http://www.mixed.example/only/this/
plain.example/sub
||adblock.example^
"""


@pytest.fixture
def rules(tmp_path: Path) -> UrlRules:
    assert write_blocked(LIST.splitlines(), tmp_path / "blocked.npy") == 6
    return UrlRules.open(tmp_path / "blocked.npy", words=("Poker",))


@pytest.mark.parametrize(
    "url",
    [
        "http://bad.example/",
        "https://www.bad.example/page?x=1",
        "https://a.b.bad.example:8080/x",
        "HTTP://BAD.EXAMPLE",
        "http://casino.test.",
        "http://x.ads.example.org/",
        "https://mixed.example/only/this/page.html",
        "https://mixed.example/only/this?q",
        "http://plain.example/sub/deeper",
        "http://adblock.example/",
    ],
)
def test_blocked(rules: UrlRules, url: str) -> None:
    assert rules.reason(url) == "blocked"


@pytest.mark.parametrize(
    "url",
    [
        "http://notbad.example/",
        "http://bad.example.com/",
        "https://mixed.example/",
        "https://mixed.example/only/thisother",
        "http://plain.example/subway",
        "http://example.org/",
        "http://localhost/",
        "no url at all",
        "http://[broken",
        "",
    ],
)
def test_not_blocked(rules: UrlRules, url: str) -> None:
    assert rules.reason(url) is None


def test_words_match_whole_and_in_any_case(rules: UrlRules) -> None:
    assert rules.reason("http://x.example/online-POKER/1") == "url_word"
    assert rules.reason("http://x.example/%50oker") == "url_word"
    assert rules.reason("http://x.example/pokerface") is None


EXPRESSIONS = r"""
# a comment
(adultsight|cyberlust)
(^|[-\?+=/_])(big|cyber)?(babe|teen|topp?les)s?([-\.\?+=/_]|$)
"""


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://www.ADULTSIGHT.test/", "url_expression"),
        ("http://x.test/cyberteens", "url_expression"),
        ("http://x.test/a?q=toples.jpg", "url_expression"),
        ("http://x.test/teenager", None),
        ("http://x.test/中文/big-bang", None),
        ("", None),
    ],
)
def test_expressions_are_found_anywhere_in_any_case(url: str, reason: str | None) -> None:
    rules = UrlRules(None, expression=one_expression(EXPRESSIONS.splitlines(), "list"))
    assert rules.reason(url) == reason


@pytest.mark.parametrize("expression", ["(ab", r"(a)\1", "(?=a)b", "a{2,1}"])
def test_an_expression_that_could_take_for_ever_names_its_line(expression: str) -> None:
    with pytest.raises(ValueError, match=r"list:2: .* linear time .*; mend or remove the line"):
        one_expression(["fine", expression], "list")


def test_hostile_expressions_and_addresses_take_linear_time() -> None:
    rules = UrlRules(None, expression=one_expression(["(a+)+$", "(a|aa)+b", "(.*a){20}c"], "list"))
    started = time.process_time()
    assert rules.reason("http://x.test/" + "a" * 100_000 + "!") is None
    assert time.process_time() - started < 5


def test_no_rules_refuse_nothing(tmp_path: Path) -> None:
    write_blocked([], tmp_path / "none.npy")
    assert UrlRules.open(tmp_path / "none.npy").reason("http://bad.example/") is None
    assert UrlRules.open(None).reason("http://bad.example/") is None


def test_real_lists(shared_data: Path, tmp_path: Path) -> None:
    import zstandard

    lines: list[str] = []
    for path in sorted((shared_data / "lists").glob("*/**/*.zst")):
        text = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()
        lines += text.decode("utf-8", "replace").splitlines()
    count = write_blocked(lines, tmp_path / "b.npy")
    assert count > 100_000
    assert (tmp_path / "b.npy").stat().st_size == pytest.approx(8 * count, abs=1000)
    rules = UrlRules.open(tmp_path / "b.npy")
    assert rules.reason("http://www.10bet.com/home") == "blocked"
    assert rules.reason("https://www.wikipedia.org/") is None


@pytest.mark.soak
def test_three_million_entries_cost_eight_bytes_each(tmp_path: Path) -> None:
    count = 3_000_000
    lines = (
        f"0.0.0.0 host{i}.example{i % 97}.com" if i % 3 else f"site{i}.net/path/{i}"
        for i in range(count)
    )
    assert write_blocked(lines, tmp_path / "b.npy") == count
    assert (tmp_path / "b.npy").stat().st_size < 8 * count + 1000
    rules = UrlRules.open(tmp_path / "b.npy")
    for i in range(1, 30_000, 3):
        assert rules.reason(f"https://www.sub.host{i}.example{i % 97}.com/a?b") == "blocked"
        assert rules.reason(f"https://nothost{i}.example{i % 97}.com/a?b") is None
        assert rules.reason(f"http://site{i + 2}.net/path/{i + 2}/deeper") == "blocked"
        assert rules.reason(f"http://site{i + 2}.net/path/{i + 2}0") is None
