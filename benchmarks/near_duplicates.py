"""Near-duplicate removal with exact check, text in, keep bits out, against datasketch's own loop."""

import re
from pathlib import Path

from datasketch import MinHash, MinHashLSH

from benchmarks.work import Row, megabytes_per_second, run_stage, texts_of
from conf.dedup import DedupConfig
from storage.corpus import Corpus
from tasks.dedup import dedup

TOKEN = re.compile(r"[\u3400-\u9fff]|[a-z0-9_]+")
PEER_MEGABYTES = 1.0
"""The loop is so slow that a small part of the text tells its rate."""


def measure(folder: Path, corpus: Corpus) -> list[Row]:
    """One row; our kernels are compiled and warm before the clock starts."""
    texts = texts_of(corpus)
    run_stage(dedup, DedupConfig(permutation_seed=2), {"corpus": corpus}, folder)
    ours = megabytes_per_second(
        texts, lambda: run_stage(dedup, DedupConfig(), {"corpus": corpus}, folder)
    )
    part, size = [], 0
    for text in texts:
        if size < PEER_MEGABYTES * 1e6:
            part.append(text)
            size += len(text.encode())
    theirs = megabytes_per_second(part, lambda: _datasketch(part))
    return [Row("near-duplicates", "datasketch loop", ours, theirs, "MB/s", goal=150, floor=50)]


def _datasketch(texts: list[str]) -> list[bool]:
    """Keep bits as the library's documentation shows it: update per shingle, query, insert."""
    index = MinHashLSH(params=(20, 6), num_perm=120)
    keeps: list[bool] = []
    for number, text in enumerate(texts):
        tokens = TOKEN.findall(text.lower())
        signature = MinHash(num_perm=120)
        for start in range(max(1, len(tokens) - 4)):
            signature.update(" ".join(tokens[start : start + 5]).encode())
        keeps.append(not index.query(signature))
        index.insert(str(number), signature)
    return keeps
