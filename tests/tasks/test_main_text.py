"""Main text of pages: navigation out, text in; a hostile page costs itself and nothing else."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.extract import PageConfig
from tasks.main_text import PageReader, main_text, page_reader

LANGUAGES = ("zh", "en")
BODY = {
    "en": "The fox is red and lives in the cave. It eats honey every morning, and it sleeps at noon.",
    "zh": "狐是红色的，住在山洞里。它每天早上吃蜂蜜，中午睡觉，下午到河边去玩。",
}


def page(body: str, *, nav: bool = True) -> bytes:
    links = "".join(f'<li><a href="/{i}">Menu {i}</a></li>' for i in range(8))
    frame = f"<nav><ul>{links}</ul></nav>" if nav else ""
    foot = "<footer><p>Copyright 2020. <a href='/x'>Imprint</a></p></footer>" if nav else ""
    return f"<html><body>{frame}<main><article><h1>Title</h1><p>{body}</p></article></main>{foot}</body></html>".encode()


@pytest.fixture(scope="module")
def reader() -> Iterator[PageReader]:
    with PageReader(PageConfig(cpu_seconds=2), LANGUAGES, wall_seconds=30) as opened:
        yield opened


@pytest.mark.parametrize("language", ["zh", "en"])
def test_short_pages_keep_their_text_and_lose_their_frame(language: str) -> None:
    found = main_text(page(BODY[language]), "utf-8", PageConfig(), LANGUAGES)
    assert found.text is not None
    assert BODY[language] in found.text
    assert "Menu" not in found.text
    assert "Imprint" not in found.text


def test_gates_say_why() -> None:
    config = PageConfig()
    links = (
        b"<html><body>"
        + b'<p><a href="/a">a link and nothing else</a></p>' * 30
        + b"</body></html>"
    )
    german = page("Der Fuchs ist rot und wohnt im Wald. " * 5)
    assert main_text(b"<html><body>Hi</body></html>", None, config, LANGUAGES).reason == "short"
    assert main_text(b"", None, config, LANGUAGES).reason == "short"
    assert main_text(links, None, config, LANGUAGES).reason == "links"
    assert main_text(german, None, config, LANGUAGES).reason == "language:de"
    assert main_text(german, None, config, ()).text is not None
    assert main_text(b"<" * 300_000, None, config, LANGUAGES).reason == "elements"
    assert main_text(b"x" * 9_000_000, None, config, LANGUAGES).reason == "large"


def test_the_text_does_not_depend_on_what_was_read_before() -> None:
    first = [main_text(page(BODY["en"]), None, PageConfig(), LANGUAGES) for _ in range(4)]
    assert len(set(first)) == 1


def test_a_process_reads_pages_one_after_the_other(reader: PageReader) -> None:
    for language in ("zh", "en", "zh"):
        found = reader.read(page(BODY[language]), "utf-8")
        assert found.text is not None
        assert BODY[language] in found.text


@pytest.mark.parametrize(
    "hostile",
    [
        b"<div>" * 90_000 + b"deep text that nobody reads " * 10,
        b"<table><tr><td>" * 30_000 + b"text",
        b"<a " + b"x=1 " * 200_000 + b">text text text text</a>",
        b"\x00\xff\xfe" * 50_000,
        b"<p>" + b"&#x41;" * 300_000,
        b"<!--" * 80_000,
        ("<p>" + "\u0301" * 200_000 + "</p>").encode(),
    ],
    ids=["deep", "tables", "attributes", "bytes", "entities", "comments", "marks"],
)
def test_a_hostile_page_costs_itself_alone(reader: PageReader, hostile: bytes) -> None:
    started = time.monotonic()
    found = reader.read(hostile)
    assert time.monotonic() - started < 30
    assert (found.text is None) == (found.reason is not None)
    assert BODY["en"] in (reader.read(page(BODY["en"])).text or "")


def test_a_page_that_takes_too_long_is_refused_as_timeout() -> None:
    rows = b"<tr><td><a href='/x'>word</a> and some more English text here.</td></tr>" * 12_000
    with PageReader(PageConfig(cpu_seconds=0.05), LANGUAGES, wall_seconds=60) as reader:
        assert reader.read(b"<table>" + rows + b"</table>").reason == "timeout"


def test_a_page_process_that_was_killed_is_replaced(reader: PageReader) -> None:
    assert reader.read(page(BODY["en"])).text
    assert reader._process is not None  # pyright: ignore[reportPrivateUsage]
    os.kill(reader._process.pid, 9)  # pyright: ignore[reportPrivateUsage]
    assert reader.read(page(BODY["en"])).text


def test_a_thread_keeps_its_page_process() -> None:
    first = page_reader(PageConfig(), LANGUAGES, wall_seconds=10)
    assert page_reader(PageConfig(), LANGUAGES, wall_seconds=10) is first
    assert page_reader(PageConfig(max_bytes=2048), LANGUAGES, wall_seconds=10) is not first


def test_the_gold_of_real_chinese_pages(shared_data: Path) -> None:
    folder = shared_data / "crawl" / "zh_gold_pages"
    html = (folder / "newspaper_chinese_article.html").read_bytes()
    gold = (folder / "newspaper_chinese_article.gold.txt").read_text("utf-8")
    found = main_text(html, None, PageConfig(), LANGUAGES).text or ""
    wanted, got = set(gold), set(found)
    assert len(wanted & got) / len(wanted) > 0.95
    assert len(found) < 1.3 * len(gold)
