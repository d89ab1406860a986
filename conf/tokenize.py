"""Settings of tokenize."""

from typing import Annotated, Literal

from conf.settings import RUNTIME, Settings

Difficulty = Literal[
    "length", "unigram", "bigram", "trigram", "rarity", "tag_diversity", "source_order"
]

MAX_UINT16_VOCABULARY = 65_536
"""Largest vocabulary whose ids fit 16 bits."""


class TokenizeConfig(Settings):
    """Documents to token ids; the corpus and the tokenizer decide everything else."""

    dtype: Literal["uint16", "uint32"] = "uint16"
    """Width of an id in the token files; a vocabulary above 65,536 needs `uint32`, which makes the files
    twice as large."""
    difficulty: tuple[Difficulty, ...] = ()
    """Columns that `pretrain.curriculum.difficulty` can name, one value a training document, larger where it is
    more difficult: its `length` in tokens; -ln P of a token in the mean by the `unigram`, `bigram` and `trigram`
    counts of the first landing; `rarity`, the sum of it by unigrams (Platanios et al. 2019);
    `tag_diversity`, the entropy of the parts of speech in its first 2,000 characters (Chinese only, by jieba;
    0 for others); `source_order`, its place in the domain, from 0 to 1."""
    engine: Annotated[Literal["auto", "tokenizers"], RUNTIME] = "auto"
    """`auto` encodes with fastokens where it is installed and gives the same ids on the first
    documents of a shard; `tokenizers` never does."""
