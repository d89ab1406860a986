"""Learns the pieces of a tokenizer. Both algorithms work on bytes, so every text comes back."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from conf.tokenizer import TokenizerConfig
from storage.tokenizer import CONTINUES, SPECIAL_TOKENS, Pretokenizer

if TYPE_CHECKING:
    import tokenizers

# GPT-2's pattern with single digits, line breaks and a mark before a word in one piece; fastokens has
# a fast path for it (34 MB/s against 3 with tokenizers' own digit splitter before GPT-2's pattern).
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LONGEST_WORD_BYTES = 64
"""WordPiece looks at every piece of a word that fits; a line of a million letters is cut."""


def train(texts: Sequence[str], settings: TokenizerConfig) -> "tokenizers.Tokenizer":
    """The tokenizer that the texts give; the same texts give the same bytes.

    Source: Sennrich et al. 2016 (BPE), Radford et al. 2019 (byte level, GPT-2's split pattern),
    Bai et al. 2023 (Qwen, the pattern with single digits), Wu et al. 2016 (WordPiece).
    """
    match settings.algorithm:
        case "bpe":
            return _bpe(texts, settings)
        case "wordpiece":
            return _wordpiece(texts, settings)


def pattern_name(settings: TokenizerConfig) -> Pretokenizer:
    """Name of the pattern by which text is cut."""
    if settings.algorithm != "bpe":
        return "other"
    return "qwen2" if settings.splits_digits else "gpt-2"


def spelled_tokens(settings: TokenizerConfig) -> list[str]:
    """All special tokens in the order of their ids: the four, then those that were asked for."""
    return [*SPECIAL_TOKENS.values(), *settings.special]


def _bpe(texts: Sequence[str], settings: TokenizerConfig) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = _split(settings)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        min_frequency=settings.min_frequency,
        max_token_length=settings.max_token_bytes,
        special_tokens=spelled_tokens(settings),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer, length=len(texts))
    return model


def _wordpiece(texts: Sequence[str], settings: TokenizerConfig) -> "tokenizers.Tokenizer":
    """WordPiece over bytes: each byte is a token at the start of a word and within one, so that no
    text is unknown. Learnt by the merges of BPE, as the `tokenizers` library does it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(continuing_subword_prefix=CONTINUES))
    learner.pre_tokenizer = _split(settings, LONGEST_WORD_BYTES)
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        min_frequency=settings.min_frequency,
        max_token_length=settings.max_token_bytes,
        # Bytes within a word would else get their ids in an order that changes from run to run, and
        # ties between merges go by ids.
        special_tokens=[
            *spelled_tokens(settings), *signs, *(CONTINUES + sign for sign in signs)
        ],
        continuing_subword_prefix=CONTINUES,
        show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator(texts, trainer, length=len(texts))
    vocabulary = learner.get_vocab()
    made = Tokenizer(
        models.WordPiece(
            vocabulary,
            unk_token=SPECIAL_TOKENS["pad"],  # must be named, and is never given
            max_input_chars_per_word=LONGEST_WORD_BYTES,
            continuing_subword_prefix=CONTINUES,
        )
    )
    made.pre_tokenizer = _split(settings, LONGEST_WORD_BYTES)
    made.decoder = decoders.Sequence([decoders.Replace(CONTINUES, ""), decoders.ByteLevel()])
    special = [
        AddedToken(text, special=True, normalized=False) for text in spelled_tokens(settings)
    ]
    made.add_special_tokens(special)
    return made


def _split(settings: TokenizerConfig, longest: int = 0) -> Any:
    """How text becomes words of byte signs; at most `longest` of them in one, if given."""
    from tokenizers import Regex, pre_tokenizers

    if settings.splits_digits:
        by_pattern = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        steps: list[Any] = [by_pattern, plain]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if longest:
        steps.append(pre_tokenizers.Split(Regex(f".{{1,{longest}}}"), "isolated"))
    return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
