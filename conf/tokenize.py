"""Settings of tokenize."""

from typing import Annotated, Literal

from conf.settings import RUNTIME, Settings


class TokenizeConfig(Settings):
    """Documents to token ids; the corpus and the tokenizer decide everything else."""

    engine: Annotated[Literal["auto", "tokenizers"], RUNTIME] = "auto"
    """`auto` encodes with fastokens where it is installed and gives the same ids on the first
    documents of a shard; `tokenizers` never does."""
