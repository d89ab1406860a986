"""The main text of a web page: cheap extraction and gates first, trafilatura for what passes.

Run as a module, it is the process that reads pages for an extraction worker: a page that hangs or
crashes takes this process with it and nothing else.
"""

import functools
import html
import json
import logging
import os
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from conf.extract import PageConfig
from tasks.charset import decode
from tasks.language import language_of, script_shares
from tasks.processes import die_with_parent

LANGUAGE_MIN_CHARS = 100
"""A shorter main text says too little about its language; the whole visible text is asked then."""
GLANCE_CHARS = 600
GLANCE_MIN_CHARS = 300
"""Between so many characters of text tell the language of a page before it is parsed."""
AMPLE_CHARS = 250
AMPLE_SHARE = 0.5
"""A text this long, and this share of the cheap main text, is believed without trafilatura's second
opinions: they change little then and take as long again."""
_PARAGRAPH = re.compile(r"<p(?:\s[^<>]*)?>\s*([^<{}]{40,})", re.IGNORECASE)
_RUN = re.compile(
    r"<(?:p|li|td|div|span|h[1-6]|br|a|b|strong|em|i|dd)\b[^<>]*>\s*([^<{}]{25,})", re.IGNORECASE
)
_FRAME = struct.Struct("<II")
_RETRIES = 1
_LAYOUT_ROW = re.compile(r"^\|[ \t]*([^|\n]*?)[ \t]*\|?[ \t]*$", re.MULTILINE)
"""A table row of one cell: a table that lays out the page, not one that says something."""


@dataclass(frozen=True)
class PageText:
    """The text of a page, or why it has none."""

    text: str | None
    reason: str | None = None
    is_cheap: bool = False
    """Whether trafilatura found nothing and the text is the cheap one."""


def main_text(
    page: bytes, charset: str | None, settings: PageConfig, languages: tuple[str, ...]
) -> PageText:
    """Find the main text of an HTML page.

    Reasons: large, elements, short (visible text), links, language:xx, empty (no main text).
    """
    if len(page) > settings.max_bytes:
        return PageText(None, "large")
    # Elements are counted before anything is built from them.
    if page.count(b"<") > 2 * settings.max_elements:
        return PageText(None, "elements")
    page_html = decode(page, charset)
    if languages and (foreign := _foreign_language(page_html, languages)):
        return PageText(None, f"language:{foreign}")
    cheap, reason = _gated(page_html, settings, languages)
    if reason or settings.engine == "cheap":
        return PageText(None if reason else cheap, reason)
    text = _trafilatura(page_html, len(cheap))
    if text:
        return PageText(text)
    return PageText(cheap, is_cheap=True) if cheap else PageText(None, "empty")


def _foreign_language(page_html: str, languages: tuple[str, ...]) -> str | None:
    """The language of a page that is plainly in none of `languages`, found without parsing it."""
    sample = _glance(page_html)
    if len(sample) < GLANCE_MIN_CHARS:
        return None
    language = language_of(sample, script_shares(sample))
    return None if language in languages or language in ("und", "zxx") else language


def _glance(page_html: str) -> str:
    """Text of the first paragraphs; where there are few, the page's longest runs of text."""
    sample = _first(match.group(1) for match in _PARAGRAPH.finditer(page_html))
    if len(sample) < GLANCE_MIN_CHARS:
        sample = _first(sorted(_RUN.findall(page_html), key=len, reverse=True))
    return html.unescape(sample)


def _first(runs: Iterable[str]) -> str:
    taken, size = list[str](), 0
    for run in runs:
        taken.append(run[: GLANCE_CHARS - size])
        size += len(taken[-1])
        if size >= GLANCE_CHARS:
            break
    return "\n".join(taken)


def _gated(
    page_html: str, settings: PageConfig, languages: tuple[str, ...]
) -> tuple[str, str | None]:
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    tree = HTMLTree.parse(page_html)
    visible = extract_plain_text(tree, alt_texts=False)
    if len(visible) < settings.min_chars:
        return "", "short"
    # The text of single nodes is slow to ask for (quadratic in resiliparse 2.0); this is not.
    unlinked = extract_plain_text(tree, alt_texts=False, skip_elements=["a"])
    if len(visible) - len(unlinked) > settings.max_link_share * len(visible):
        return "", "links"
    cheap = extract_plain_text(tree, main_content=True, alt_texts=False).strip()
    if languages:
        sample = cheap if len(cheap) >= LANGUAGE_MIN_CHARS else visible
        language = language_of(sample, script_shares(sample))
        if language not in languages and language != "und":
            return "", f"language:{language}"
    return cheap, None


def _trafilatura(page_html: str, cheap_chars: int) -> str | None:
    """Main text by trafilatura's own extractor; where that finds little, by its whole cascade."""
    text = _extract(page_html, is_fast=True)
    if text is None or len(text) < max(AMPLE_CHARS, AMPLE_SHARE * cheap_chars):
        text = _extract(page_html, is_fast=False)
    return None if text is None else _LAYOUT_ROW.sub(r"\1", text)


def _extract(page_html: str, *, is_fast: bool) -> str | None:
    import trafilatura

    # deduplicate keeps state between pages: the text would depend on what was read before.
    return trafilatura.extract(
        page_html,
        fast=is_fast,
        include_comments=False,
        include_tables=True,
        deduplicate=False,
        output_format="txt",
        config=_trafilatura_config(),
    )


@functools.cache
def _trafilatura_config() -> Any:
    from trafilatura.settings import use_config

    config = use_config()
    # Below this size trafilatura takes all text of the page, menus too, for its main text. Its 250
    # are too many for a short page, above all a Chinese one; on 174 pages with known snippets the
    # change costs 0.003 of F1.
    config.set("DEFAULT", "MIN_EXTRACTED_SIZE", "10")
    return config


class PageReader:
    """Sends pages to a page process of its own and starts a new one when it dies."""

    def __init__(
        self, settings: PageConfig, languages: tuple[str, ...], *, wall_seconds: float
    ) -> None:
        self._settings = settings
        self._languages = languages
        self._wall_seconds = wall_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "PageReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def read(self, page: bytes, charset: str | None = None) -> PageText:
        """The text of one page; `timeout` or `crash` when it took the process with it."""
        if len(page) > self._settings.max_bytes:
            return PageText(None, "large")
        for _ in range(_RETRIES + 1):
            process = self._running()
            answer = self._ask(process, page, charset)
            if answer is not None:
                return PageText(**answer)
            code = self._end()
            if code in (-signal.SIGPROF, -signal.SIGALRM):
                return PageText(None, "timeout")
        return PageText(None, "crash")

    def close(self) -> None:
        """End the page process."""
        if self._process is not None:
            self._end()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            root = str(Path(__file__).resolve().parents[1])
            path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tasks.main_text", json.dumps(self._options())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path},
            )
        return self._process

    def _options(self) -> dict[str, Any]:
        return {"settings": self._settings.model_dump(), "languages": self._languages}

    def _ask(
        self, process: "subprocess.Popen[bytes]", page: bytes, charset: str | None
    ) -> dict[str, Any] | None:
        head = json.dumps({"charset": charset}).encode()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(_FRAME.pack(len(head), len(page)) + head)
            process.stdin.write(page)
            process.stdin.flush()
        except BrokenPipeError:
            return None
        if not self._is_answered(process.stdout.fileno()):
            process.send_signal(signal.SIGALRM)
            return None
        answer = _receive(process.stdout)
        return None if answer is None else json.loads(answer[0])

    def _is_answered(self, descriptor: int) -> bool:
        deadline = time.monotonic() + self._wall_seconds
        poll = select.poll()
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))

    def _end(self) -> int:
        process, self._process = self._process, None
        assert process is not None
        # A closed pipe is the process' sign to end; one that hangs does not see it.
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                _close_quietly(stream)
        try:
            return process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _close_quietly(stream: Any) -> None:
    try:
        stream.close()
    except BrokenPipeError:
        return


def page_reader(
    settings: PageConfig, languages: tuple[str, ...], *, wall_seconds: float
) -> PageReader:
    """The page reader of this thread: its process serves one shard after the other.

    Threads do not share one: the kernel ends a page process with the thread that started it.
    """
    key = json.dumps([settings.model_dump(), languages, wall_seconds], sort_keys=True)
    held = cast("tuple[str, PageReader] | None", getattr(_readers, "held", None))
    if held is None or held[0] != key:
        if held is not None:
            held[1].close()
        held = (key, PageReader(settings, languages, wall_seconds=wall_seconds))
        _readers.held = held
    return held[1]


_readers = threading.local()


def _receive(stream: BinaryIO | Any) -> tuple[bytes, bytes] | None:
    frame = stream.read(_FRAME.size)
    if len(frame) < _FRAME.size:
        return None
    head, body = _FRAME.unpack(frame)
    return stream.read(head), stream.read(body)


def _serve(options: Mapping[str, Any]) -> None:
    settings = PageConfig(**options["settings"])
    resource.setrlimit(resource.RLIMIT_AS, (settings.memory_bytes, settings.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    answers = os.fdopen(os.dup(1), "wb")
    # A library that prints must not write into the answers.
    os.dup2(2, 1)
    while (request := _receive(sys.stdin.buffer)) is not None:
        # Processor time, not wall-clock time: a busy machine refuses no page that an idle one reads.
        # The signal's default action ends the process, also within C code.
        signal.setitimer(signal.ITIMER_PROF, settings.cpu_seconds)
        answer = _answer(request, settings, tuple(options["languages"]))
        signal.setitimer(signal.ITIMER_PROF, 0)
        content = json.dumps(answer.__dict__).encode()
        answers.write(_FRAME.pack(len(content), 0) + content)
        answers.flush()


def _answer(
    request: tuple[bytes, bytes], settings: PageConfig, languages: tuple[str, ...]
) -> PageText:
    head, page = request
    try:
        return main_text(page, json.loads(head)["charset"], settings, languages)
    except MemoryError:
        return PageText(None, "memory")
    # Pages are hostile: whatever a parser raises on one is that page's reason, not the run's end.
    except Exception as error:  # noqa: BLE001
        return PageText(None, f"error:{re.sub(r'[^A-Za-z]', '', type(error).__name__)}")


if __name__ == "__main__":
    die_with_parent(signal.SIGKILL)
    _serve(json.loads(sys.argv[1]))
