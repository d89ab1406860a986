"""Corpus to uint16 .bin, against `tokenizers` encode_batch_fast on the same texts."""

from pathlib import Path

import numpy as np
import tokenizers

from benchmarks.work import Row, megabytes_per_second, run_stage, texts_of
from conf.tokenize import TokenizeConfig
from conf.tokenizer import TokenizerConfig
from storage.corpus import Corpus
from storage.tokenizer import Tokenizer
from storage.tokens import Tokens
from tasks.tokenize import tokenize
from tasks.tokenizer import tokenizer


def measure(folder: Path, corpus: Corpus) -> list[Row]:
    """One row; both sides end with all ids in one file of uint16."""
    settings = TokenizerConfig(vocabulary=8192, sample_bytes=4_000_000)
    model = run_stage(tokenizer, settings, {"corpus": corpus}, folder)
    assert isinstance(model, Tokenizer)
    texts = texts_of(corpus)
    made: list[Tokens] = []

    def ours() -> None:
        artifact = run_stage(
            tokenize, TokenizeConfig(), {"corpus": corpus, "tokenizer": model}, folder
        )
        assert isinstance(artifact, Tokens)
        made.append(artifact)

    def theirs() -> None:
        encoder = tokenizers.Tokenizer.from_file(str(model.files / "tokenizer.json"))
        encoder.encode_special_tokens = True
        with (folder / "peer.bin").open("wb") as stream:
            for start in range(0, len(texts), 1000):
                batch = encoder.encode_batch_fast(texts[start : start + 1000])
                for encoding in batch:
                    stream.write(np.array([*encoding.ids, model.chat.eos], "<u2").tobytes())

    our_rate = megabytes_per_second(texts, ours)
    peer_rate = megabytes_per_second(texts, theirs)
    written = sum(
        count.tokens for splits in made[0].reader.meta.domains.values() for count in splits.values()
    )
    assert written * 2 == (folder / "peer.bin").stat().st_size, "the two files hold other counts"
    return [Row("text to .bin", "tokenizers", our_rate, peer_rate, "MB/s", goal=13, floor=8)]
