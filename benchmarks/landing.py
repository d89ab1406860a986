"""A new landing of a tenth more text under --extend, from extract to tokenize, against the full run before it.

The text is grown from the corpus: documents of its lines drawn at random, every tenth one a copy with a
line changed. Both runs are the graph's own in one store, without Prefect. Raises RuntimeError when the
record of the extension shows that a shard of the old landing was built again.
"""

import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from benchmarks.work import WORKERS, Row, Work
from flows.execution import Execution
from flows.preparation import Request, prepare
from flows.runs import Home

SIZES = (225.0, 1000.0)
GROWTH = 20
"""The text is grown to this many times what is asked for, at most."""
FILE_MEGABYTES = 25.0
NEW_SHARE = 0.1
PAGE_CHARS = 4000
COPIES = 0.1
REMEMBERED = 20_000
"""Documents that a copy may be of."""
MAPS = ("extract", "filter", "dedup", "tokenize")
RECIPE = """
data: pages
stages:
  extract: {sources: [{path: "${data}/*.parquet"}]}
  filter: {from: {corpus: extract}}
  dedup: {from: {corpus: filter}}
  tokenizer: {from: {corpus: dedup}, vocabulary: 32000, sample_bytes: 4000000}
  tokenize: {from: {corpus: dedup, tokenizer: tokenizer}}
"""


def measure(work: Work) -> list[Row]:
    """One row for every size that the text may be grown to."""
    sizes = [size for size in SIZES if size <= GROWTH * work.megabytes] or [work.megabytes]
    lines = {language: lines_of(work, language) for language in ("zh", "en")}
    return [_row(work.folder / f"landing-{size:.0f}", lines, size) for size in sizes]


def _row(folder: Path, lines: dict[str, list[str]], size: float) -> Row:
    pages = folder / "pages"
    pages.mkdir(parents=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE, "utf-8")
    pick = random.Random(0)
    files = write_files(pages, "old", documents_of(lines, pick), size)
    _, full = _run(folder, recipe, is_extension=False)
    write_files(pages, "new", documents_of(lines, pick), size * NEW_SHARE)
    grown, extension = _run(folder, recipe, is_extension=True)
    for name in MAPS:
        shards = grown.record.stages[name].metrics["shards"]
        if shards["reused"] < files:
            raise RuntimeError(f"{name} built shards of the old landing again: {shards}")
    shutil.rmtree(folder)
    title = f"10 % new under --extend, {size:.0f} MB, {files} old shards reused"
    return Row(title, "the full run", 60 / extension, 60 / full, "/min", goal=5, floor=2)


def _run(folder: Path, recipe: Path, *, is_extension: bool) -> tuple[Execution, float]:
    """The graph's stages one after another, and the seconds from the recipe to the last of them."""
    os.environ["BESSEMER_WORKERS"] = str(WORKERS)
    started = time.perf_counter()
    request = Request(str(recipe), is_extension=is_extension)
    execution = prepare(request, Home(folder / "home"), base=folder)
    execution.start()
    while (name := execution.next_ready(execution.selected)) is not None:
        execution.run(name)
    seconds = time.perf_counter() - started
    execution.finish(seconds)
    if execution.record.status != "done":
        errors = {name: node.error for name, node in execution.record.stages.items() if node.error}
        raise RuntimeError(f"the run ended {execution.record.status}: {errors}")
    return execution, seconds


def lines_of(work: Work, language: str) -> list[str]:
    """The lines of all documents in one language, too short ones left out."""
    frames = work.corpus.scan(["text", "language"])
    texts = pl.concat([frame.filter(pl.col("language") == language) for frame in frames])["text"]
    return texts.str.split("\n").explode().str.strip_chars().unique().sort().drop_nulls().to_list()


def documents_of(lines: dict[str, list[str]], pick: random.Random) -> Iterator[str]:
    """Without end: Chinese and English in turn."""
    known = [of_language for of_language in lines.values() if of_language]
    earlier: list[str] = []
    while True:
        for of_language in known:
            if earlier and pick.random() < COPIES:
                document = pick.choice(earlier).split("\n")
                document[pick.randrange(len(document))] = pick.choice(of_language)
            else:
                document, chars = list[str](), 0
                while chars < PAGE_CHARS:
                    document.append(pick.choice(of_language))
                    chars += len(document[-1])
            text = "\n".join(document)
            if len(earlier) < REMEMBERED:
                earlier.append(text)
            else:
                earlier[pick.randrange(REMEMBERED)] = text
            yield text


def write_files(folder: Path, name: str, documents: Iterator[str], size: float) -> int:
    """Parquet files with so many MB of documents together; how many files."""
    number = 0
    while size > 0:
        texts: list[str] = []
        room = min(FILE_MEGABYTES, size)
        while room > 0:
            texts.append(next(documents))
            room -= len(texts[-1].encode()) / 1e6
        pl.DataFrame({"text": texts}).write_parquet(folder / f"{name}-{number:03d}.parquet")
        number, size = number + 1, size - FILE_MEGABYTES
    return number
