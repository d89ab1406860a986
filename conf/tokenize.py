"""Settings of tokenize."""

from typing import Annotated, Literal

from conf.settings import RUNTIME, Settings

MAX_UINT16_VOCABULARY = 65_536
"""Largest vocabulary whose ids fit 16 bits."""


class TokenizeConfig(Settings):
    """Documents to token ids; the corpus and the tokenizer decide everything else."""

    dtype: Literal["uint16", "uint32"] = "uint16"
    """Width of an id in the token files; a vocabulary above 65,536 needs `uint32`, which makes the files
    twice as large."""
    engine: Annotated[Literal["auto", "tokenizers"], RUNTIME] = "auto"
    """`auto` encodes with fastokens where it is installed and gives the same ids on the first
    documents of a shard; `tokenizers` never does."""
