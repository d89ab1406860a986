"""A real browser for tests of pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium. Where there is none the test is skipped, but it fails where `CI` is set."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        told = f"no browser is here to try the page with: install one of {', '.join(NAMES)}"
        if os.environ.get("CI"):
            pytest.fail(told)
        pytest.skip(told)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, *, width: int = 1200, height: int = 900) -> Iterator[Page]:
    """A page of its own; nothing may be wrong on its console in the end."""
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda told: wrong.append(told.text) if told.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(url)
    yield page
    assert wrong == []
    context.close()


def shoot(page: Page, name: str) -> None:
    """A picture of a page, to be looked at, in the folder that SCREENSHOTS names, if any."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")
