"""What dedup, tokenizer and tokenize compute is held by digests: a change needs a new stage version.

After a change on purpose: raise `version` of the stage, then take over the digests that the test shows.
"""

import hashlib
import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from conf.dedup import DedupConfig
from conf.tokenize import TokenizeConfig
from conf.tokenizer import TokenizerConfig
from storage.corpus import Corpus
from tasks.dedup import dedup
from tasks.signatures import keys_of, sign_texts
from tasks.tokenize import tokenize
from tasks.tokenizer import tokenizer
from tests.storage.corpora import corpus_of
from tests.tasks.text_jobs import job_at


def short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def documents() -> list[dict[str, str]]:
    """Sixty short documents in two languages, every third a variation of an earlier one."""
    pick = random.Random(0)
    words = [f"{a}{b}" for a in ("ba", "lo", "mi", "tur") for b in ("n", "ki", "sta", "9")]
    texts: list[str] = []
    for i in range(60):
        if i % 3 == 2:
            texts.append(texts[-2] + pick.choice(["!", " end", "。尾"]))
        elif i % 2:
            texts.append("".join(chr(0x4E00 + pick.randrange(80)) for _ in range(40)) + "。")
        else:
            texts.append(" ".join(pick.choices(words, k=30)) + ".")
    return [
        {
            "text": text,
            "domain": "web" if i % 4 else "books",
            "language": "en" if text.isascii() else "zh",
            "url": f"https://example.org/{i}",
            "split": "held" if i % 10 == 3 else "train",
        }
        for i, text in enumerate(texts)
    ]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    rows = documents()
    return corpus_of(tmp_path, [rows[:25], rows[25:]])


def test_signatures_are_golden() -> None:
    signatures, shingles = sign_texts(
        pl.Series([row["text"] for row in documents()]), DedupConfig()
    )
    assert short(signatures.tobytes()) == "bc38c3d26bf1390c"
    assert (
        short(np.ascontiguousarray(keys_of(signatures, DedupConfig())).tobytes())
        == "06e2d0eb78d650a8"
    )
    assert short(shingles.tobytes()) == "1eb5012520d65df4"


def test_duplicates_are_golden(tmp_path: Path, corpus: Corpus) -> None:
    job = job_at(tmp_path, "d")
    dedup(job, corpus, DedupConfig())
    table = pl.read_parquet(job.files / "duplicates.parquet")
    assert table.height == 20
    assert short(repr(table.rows()).encode()) == "63228bf75f460488"


def test_tokens_are_golden(tmp_path: Path, corpus: Corpus) -> None:
    bpe = tokenizer(job_at(tmp_path, "b"), corpus, TokenizerConfig(vocabulary=400))
    assert short((bpe.files / "tokenizer.json").read_bytes()) == "97e17f2ce237e054"
    files = tokenize(job_at(tmp_path, "t"), corpus, bpe, TokenizeConfig()).files
    found = {p.name: short(p.read_bytes()) for p in files.iterdir() if p.suffix == ".bin"}
    assert found == {
        "books.held.bin": "e3b0c44298fc1c14",
        "books.train.bin": "a6c3fb8faa87fd10",
        "web.held.bin": "6500a9e93a94cf3f",
        "web.train.bin": "4cb7f9ade4439428",
    }
