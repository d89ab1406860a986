"""Main text of a crawl of which under 30 % is in a wanted language, against trafilatura on every page.

Both sides read the same pages in one process and are timed by processor seconds. Quality is the F1 of
the required and forbidden snippets of DATA/crawl/trafilatura_eval, over the pages that the peer's own
text puts in a wanted language.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import trafilatura

from benchmarks.work import Row, Work
from conf.extract import PageConfig
from storage.source import SourceFile
from tasks.language import language_of, script_shares
from tasks.main_text import main_text
from tasks.raw_record import RawRecord
from tasks.records import read_records

LANGUAGES = ("zh", "en")


def measure(work: Work) -> list[Row]:
    """Pages a second, and F1; no row where the data is missing."""
    data = (work.data or Path()) / "crawl"
    if work.data is None or not (data / "pages_warc").is_dir():
        return []
    pages = _pages(data / "pages_warc")
    gold = json.loads((data / "trafilatura_eval" / "evaldata.json").read_text("utf-8"))
    for read in (_ours, _theirs):
        read(pages[0])  # models and rules are loaded before the clock starts
    our_rate, ours = _timed(_ours, pages)
    their_rate, theirs = _timed(_theirs, pages)
    wanted = [i for i, text in enumerate(theirs) if _is_wanted(text) and pages[i].url in gold]
    name = f"main text, {len(wanted) / len(pages):.0%} of pages wanted"
    f1 = [_f1([(texts[i], gold[pages[i].url]) for i in wanted]) for texts in (ours, theirs)]
    return [
        Row(name, "trafilatura on every page", our_rate, their_rate, "pages/s", goal=5, floor=3),
        # A loss of at most 0.01 of F1 at about 0.93
        Row("main text, snippets of kept pages", "the same", f1[0], f1[1], "F1", 0.989, 0.989),
    ]


def _pages(folder: Path) -> list[RawRecord]:
    from conf.settings import SourceSpec

    records: list[RawRecord] = []
    for path in sorted(folder.glob("*.warc.gz")):
        spec = SourceSpec(path=str(path))
        file = SourceFile(path, path.name, path.stat().st_size, "", "warc", spec, 0)
        found = read_records(
            file,
            text_documents="file",
            url_reason=lambda url: None,
            max_page_bytes=PageConfig().max_bytes,
        )
        records += [r for r in found if isinstance(r, RawRecord) and r.page is not None]
    return records


def _timed(read: Callable[[RawRecord], str], pages: Sequence[RawRecord]) -> tuple[float, list[str]]:
    started = time.process_time()
    texts = [read(page) for page in pages]
    return len(pages) / (time.process_time() - started), texts


def _ours(record: RawRecord) -> str:
    return main_text(record.page or b"", record.charset, PageConfig(), LANGUAGES).text or ""


def _theirs(record: RawRecord) -> str:
    extract = cast("Callable[..., str | None]", trafilatura.extract)
    return extract(record.page, include_comments=False) or ""


def _is_wanted(text: str) -> bool:
    return bool(text) and language_of(text, script_shares(text)) in LANGUAGES


def _f1(pairs: Sequence[tuple[str, Mapping[str, Any]]]) -> float:
    """Of required snippets found and forbidden ones left out, white space made equal."""
    found = lost = wrong = 0
    for text, gold in pairs:
        flat = " ".join(text.split())
        hits = sum(" ".join(snippet.split()) in flat for snippet in gold["with"])
        found, lost = found + hits, lost + len(gold["with"]) - hits
        wrong += sum(" ".join(snippet.split()) in flat for snippet in gold["without"])
    return 2 * found / (2 * found + lost + wrong)
