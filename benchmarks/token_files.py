"""Parquet text to uint16 .bin, against `tokenizers` encode_batch_fast; every byte is compared."""

import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import tokenizers

from benchmarks.work import Row, Work, run_stage
from conf.tokenize import TokenizeConfig
from conf.tokenizer import TokenizerConfig
from storage.corpus import Corpus
from storage.tokenizer import Tokenizer
from storage.tokens import Tokens
from tasks.tokenize import tokenize
from tasks.tokenizer import tokenizer

VOCABULARY = 32_000
PEER_BATCH = 1000


def measure(work: Work) -> list[Row]:
    """One row; both sides begin with the corpus' Parquet files and end with the same .bin files.

    Ours is the whole stage: processes started, counts, digests, commit. Raises RuntimeError when the
    files of the two sides differ.
    """
    settings = TokenizerConfig(vocabulary=VOCABULARY, sample_bytes=4_000_000)
    model = run_stage(tokenizer, settings, {"corpus": work.corpus}, work.folder)
    assert isinstance(model, Tokenizer)
    started = time.perf_counter()
    inputs = {"corpus": work.corpus, "tokenizer": model}
    tokens = run_stage(tokenize, TokenizeConfig(), inputs, work.folder)
    ours = time.perf_counter() - started
    assert isinstance(tokens, Tokens)
    peer = work.folder / "peer"
    peer.mkdir(exist_ok=True)
    started = time.perf_counter()
    _tokenizers(peer, work.corpus, model)
    theirs = time.perf_counter() - started
    for path in peer.iterdir():
        if path.read_bytes() != (tokens.files / path.name).read_bytes():
            raise RuntimeError(f"{path.name} differs between the two sides")
    counts = tokens.reader.meta.domains.values()
    size = sum(count.bytes for splits in counts for count in splits.values()) / 1e6
    row = Row("text to .bin", "tokenizers", size / ours, size / theirs, "MB/s", goal=13, floor=8)
    return [row]


def _tokenizers(folder: Path, corpus: Corpus, model: Tokenizer) -> None:
    """The plain way: batches of texts to encode_batch_fast, with all the threads that it takes."""
    encoder = tokenizers.Tokenizer.from_file(str(model.files / "tokenizer.json"))
    encoder.encode_special_tokens = True
    files: dict[str, list[bytes]] = defaultdict(list)
    for frame in corpus.scan(["domain", "split", "text"]):
        for start in range(0, frame.height, PEER_BATCH):
            rows = frame[start : start + PEER_BATCH]
            encoded = encoder.encode_batch_fast(rows["text"].to_list(), add_special_tokens=False)
            for domain, split, encoding in zip(rows["domain"], rows["split"], encoded, strict=True):
                ids = np.array(encoding.ids, "<u2")
                files[f"{domain}.{split}.bin"] += [ids.tobytes(), b"\x01\x00"]
    for name, pieces in files.items():
        (folder / name).write_bytes(b"".join(pieces))
