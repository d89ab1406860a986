"""Settings of tokenizer: how large the vocabulary is and what it is learnt from, or what is adopted."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from conf.settings import Settings, SourceSpec

LEAST_VOCABULARY = {"bpe": 260, "wordpiece": 516, "unigram": 260}
"""256 bytes and 4 special tokens; WordPiece has each byte twice, at the start of a word and within one."""
MAX_VOCABULARY = 1 << 24


class TokenizerConfig(Settings):
    """A tokenizer over bytes, learnt from the corpus, or one that others made."""

    algorithm: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    """What is learnt: merges of pairs (BPE), pieces of which the longest are taken from the left
    (WordPiece), or pieces with probabilities (Unigram; needs `pip install 'bessemer[unigram]'`)."""
    vocabulary: int = 32_000
    """Number of tokens, the 256 bytes and 4 special tokens included; 260 or more, and above 65,536
    together with `tokenize.dtype=uint32` only."""
    splits_digits: bool = True
    """Whether every digit is a token of its own (the split pattern of Qwen2); else that of GPT-2."""
    max_token_bytes: Annotated[int, Field(ge=4)] = 16
    """Longest token, about 5 Han characters; without a limit, clauses that many pages share become one
    token each, and a model cannot learn what they say."""
    min_frequency: Annotated[int, Field(ge=1)] = 2
    """How often a pair must occur to become a token; Unigram does not count pairs."""
    special: tuple[str, ...] = ()
    """Further special tokens, such as `<|tool|>`, with ids after the four; no text yields them."""
    system: str = ""
    """Default system prompt: what a conversation without a system message begins with."""
    adopt: tuple[SourceSpec, ...] = ()
    """An existing tokenizer to take instead of learning one: a `tokenizer.json`, a Hugging Face folder,
    `vocab.json` with `merges.txt`, or a SentencePiece `.model`; a path, or a source. What it lacks of
    the special tokens gets ids behind its own. The settings of learning are not used then; `vocabulary`
    is what `bessemer plan` reckons with before the tokenizer is there."""
    adopted_special: dict[Literal["pad", "eos"], str] = Field(
        default_factory=dict[Literal["pad", "eos"], str]
    )
    """How the adopted tokenizer spells padding and the end of a document, where the usual names (those
    of its `tokenizer_config.json`, `<|endoftext|>`, `</s>`, `<pad>`, ...) would be wrong."""
    compare: tuple[SourceSpec, ...] = ()
    """Other tokenizers to measure on the same held-out documents, each as in `adopt`."""
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

    @field_validator("adopt", "compare", mode="before")
    @classmethod
    def _paths(cls, sources: object) -> object:
        if isinstance(sources, str):
            sources = [sources]
        if not isinstance(sources, list | tuple):
            return sources
        return [{"path": s} if isinstance(s, str) else s for s in sources]

    @field_validator("adopt", "compare")
    @classmethod
    def _raw(cls, sources: tuple[SourceSpec, ...]) -> tuple[SourceSpec, ...]:
        # Files of a tokenizer are told apart by their names; no layout of documents applies.
        return tuple(spec.model_copy(update={"format": "text"}) for spec in sources)

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
    def _is_one_tokenizer(self) -> Self:
        if len(self.adopt) > 1:
            raise ValueError(
                f"adopt names {len(self.adopt)} tokenizers, a model has one; name one file, folder "
                "or glob there, and the others under compare"
            )
        if self.adopted_special and not self.adopt:
            raise ValueError(
                "adopted_special is for a tokenizer that is adopted; name it with adopt, or leave this out"
            )
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        least = LEAST_VOCABULARY[self.algorithm] + len(self.special)
        if not least <= self.vocabulary <= MAX_VOCABULARY:
            raise ValueError(
                f"{self.vocabulary:,} tokens do not hold the bytes and {4 + len(self.special)} special "
                f"tokens, or are more than anybody uses; choose a vocabulary of {least} to "
                f"{MAX_VOCABULARY:,}"
            )
        return self
