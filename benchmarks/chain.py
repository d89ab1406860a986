"""Parquet text to uint16 .bin: rules, near-duplicates, tokens; against datatrove's own pipelines for the three.

Both read the same files, use two processes and the same tokenizer. Ours also finds every document's language.
Rules differ, as the two presets do: the row says how many tokens are left on either side.
"""

import time
from pathlib import Path

import polars as pl

from benchmarks.near_duplicates import pages_of, peers, with_copies
from benchmarks.work import Row, Work, run_peer, run_stage, texts_of
from conf.dedup import DedupConfig
from conf.extract import ExtractConfig
from conf.filter import FilterConfig
from conf.settings import SourceSpec
from conf.tokenize import TokenizeConfig
from conf.tokenizer import TokenizerConfig
from storage.artifact import Artifact
from storage.tokenizer import Tokenizer
from storage.tokens import Tokens
from tasks.dedup import dedup
from tasks.extract import extract
from tasks.filter import filter as filter_stage
from tasks.tokenize import tokenize
from tasks.tokenizer import tokenizer

FILES = 8


def measure(work: Work) -> list[Row]:
    """One row."""
    python = peers()
    texts = with_copies([page for text in texts_of(work.corpus) for page in pages_of(text)])
    size = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    settings = TokenizerConfig(vocabulary=32_000, sample_bytes=4_000_000)
    model = run_stage(tokenizer, settings, {"corpus": work.corpus}, work.folder)
    assert isinstance(model, Tokenizer)
    few = texts[:: len(texts) // 100 + 1]
    _ours(_written(work.folder / "few", few), model, work)  # compiles what is compiled
    source = _written(work.folder / "all", texts)
    started = time.perf_counter()
    counts = _ours(source, model, work).reader.meta.domains.values()
    ours = time.perf_counter() - started
    arguments = ["chain", str(source), str(model.files / "tokenizer.json")]
    theirs = run_peer(python, "datatrove_steps", work.folder, arguments)
    left = sum(count.tokens for splits in counts for count in splits.values()) / 1e6
    title = (
        f"Parquet to .bin, {size:.0f} MB, rules + near-duplicates + tokens "
        f"({left:.1f} M tokens left, datatrove {theirs['tokens'] / 1e6:.1f} M)"
    )
    return [
        Row(title, "datatrove", size / ours, size / theirs["seconds"], "MB/s", goal=15, floor=6)
    ]


def _written(folder: Path, texts: list[str]) -> Path:
    """Some Parquet files of the texts, of about the same size."""
    folder.mkdir()
    for number in range(FILES):
        part = texts[len(texts) * number // FILES : len(texts) * (number + 1) // FILES]
        ids = [f"{number}/{place}" for place in range(len(part))]
        pl.DataFrame({"text": part, "id": ids}).write_parquet(folder / f"{number}.parquet")
    return folder


def _ours(source: Path, model: Tokenizer, work: Work) -> Tokens:
    """The stages as the graph runs them."""
    folder = work.folder
    specs = (SourceSpec(path=str(source / "*.parquet")),)
    found: Artifact = run_stage(extract, ExtractConfig(sources=specs), {}, folder)
    found = run_stage(filter_stage, FilterConfig(), {"corpus": found}, folder)
    found = run_stage(dedup, DedupConfig(), {"corpus": found}, folder)
    tokens = run_stage(tokenize, TokenizeConfig(), {"corpus": found, "tokenizer": model}, folder)
    assert isinstance(tokens, Tokens)
    return tokens
