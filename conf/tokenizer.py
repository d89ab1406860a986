"""Settings of tokenizer: how large the vocabulary is and what it is learnt from."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from conf.settings import Settings

MIN_VOCABULARY = 260
"""256 bytes and 4 special tokens."""
MIN_WORDPIECE_VOCABULARY = 516
"""Each byte twice, at the start of a word and within one, and 4 special tokens."""
MAX_VOCABULARY = 65_536
"""Token files are uint16."""


class TokenizerConfig(Settings):
    """A tokenizer over bytes, learnt from the corpus."""

    algorithm: Literal["bpe", "wordpiece"] = "bpe"
    """What is learnt: merges of pairs (BPE), or pieces of which the longest are taken from the left
    (WordPiece)."""
    vocabulary: int = 32_000
    """Number of tokens, the 256 bytes and 4 special tokens included; 260 to 65,536."""
    splits_digits: bool = True
    """Whether every digit is a token of its own (the split pattern of Qwen2); else that of GPT-2."""
    max_token_bytes: Annotated[int, Field(ge=4)] = 16
    """Longest token, about 5 Han characters; without a limit, clauses that many pages share become one
    token each, and a model cannot learn what they say."""
    min_frequency: Annotated[int, Field(ge=1)] = 2
    """How often a pair must occur to become a token."""
    special: tuple[str, ...] = ()
    """Further special tokens, such as `<|tool|>`, with ids after the four; no text yields them."""
    sample_bytes: Annotated[int, Field(ge=1)] = 32_000_000
    """UTF-8 bytes of text to learn from; training takes about 2 s and 35 MB of memory per million."""
    balance: Literal["equal", "natural"] = "equal"
    """Shares of the languages in the sample: the same for each, as far as there is text, or those of
    the corpus."""
    conversations_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the sample taken from conversations, where they are given."""
    chunk_chars: Annotated[int, Field(ge=100)] = 20_000
    """Long documents are sampled in pieces of this length, so that a book weighs no more than pages."""
    sample_seed: int = 0
    """Which documents are sampled; not the recipe's seed, which would give every seed other tokens."""

    @field_validator("vocabulary")
    @classmethod
    def _fits_uint16(cls, vocabulary: int) -> int:
        if vocabulary > MAX_VOCABULARY:
            raise ValueError(
                f"{vocabulary:,} tokens do not fit the uint16 of the token files; "
                f"choose a vocabulary of at most {MAX_VOCABULARY:,}"
            )
        return vocabulary

    @field_validator("special")
    @classmethod
    def _distinct(cls, special: tuple[str, ...]) -> tuple[str, ...]:
        ours = ("<|pad|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
        wrong = [text for text in special if text in ours or not text or special.count(text) > 1]
        if wrong:
            raise ValueError(
                f"special tokens {wrong} are empty, twice there or among {', '.join(ours)}, which "
                "every tokenizer has; name each further one once"
            )
        return special

    @model_validator(mode="after")
    def _holds_the_bytes(self) -> Self:
        least = MIN_WORDPIECE_VOCABULARY if self.algorithm == "wordpiece" else MIN_VOCABULARY
        if self.vocabulary < least + len(self.special):
            raise ValueError(
                f"{self.vocabulary} tokens are fewer than the bytes and {4 + len(self.special)} "
                f"special tokens; choose a vocabulary of at least {least + len(self.special)}"
            )
        return self
