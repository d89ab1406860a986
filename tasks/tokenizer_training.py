"""Learns the pieces of a tokenizer. All algorithms work on bytes, so every text comes back."""

from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
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
"""WordPiece and Unigram look at every piece of a word that fits; a line of a million letters is cut."""
BETWEEN_WORDS = "\u241f"
"""A sign that no byte is spelled with; no piece that SentencePiece learns goes across it."""
NEVER_CHOSEN = -1e6
"""Score of a special token in a Unigram model, far below every path through the pieces of a word."""


def train(texts: Sequence[str], settings: TokenizerConfig) -> "tokenizers.Tokenizer":
    """The tokenizer that the texts give; the same texts give the same bytes.

    Source: Sennrich et al. 2016 (BPE), Radford et al. 2019 (byte level, GPT-2's split pattern),
    Bai et al. 2023 (Qwen, the pattern with single digits), Wu et al. 2016 (WordPiece), Kudo 2018
    (Unigram).
    """
    match settings.algorithm:
        case "bpe":
            return _bpe(texts, settings)
        case "wordpiece":
            return _wordpiece(texts, settings)
        case "unigram":
            return _unigram(texts, settings)


def learnt(texts: Sequence[str], settings: TokenizerConfig) -> str:
    """What `train` gives, as JSON."""
    return train(texts, settings).to_str()


def pattern_name(settings: TokenizerConfig) -> Pretokenizer:
    """Name of the pattern by which text is cut."""
    if settings.algorithm != "bpe":
        return "other"
    return "qwen2" if settings.splits_digits else "gpt-2"


def text_splitter(name: Pretokenizer) -> Any:
    """How text becomes words of byte signs, by the name of the pattern: `gpt-2` or `qwen2`."""
    from tokenizers import Regex, pre_tokenizers

    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    by_pattern = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
    return pre_tokenizers.Sequence(
        [by_pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


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


def _unigram(texts: Sequence[str], settings: TokenizerConfig) -> "tokenizers.Tokenizer":
    """Unigram over bytes. SentencePiece learns the pieces, one thread, since the trainer of
    `tokenizers` gives other pieces in every process; words and their counts are ours."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    splitter = _split(settings, LONGEST_WORD_BYTES)
    spelled = spelled_tokens(settings)
    counts = Counter(pre_tokenizers.ByteLevel.alphabet())  # a piece for every byte
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(text))
    pieces = _learnt_pieces(counts, settings)
    special = [(text, NEVER_CHOSEN) for text in spelled]
    model = Tokenizer(models.Unigram([*special, *pieces], None, False))
    model.pre_tokenizer, model.decoder = splitter, decoders.ByteLevel()
    model.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in spelled])
    return model


def _learnt_pieces(words: Counter[str], settings: TokenizerConfig) -> list[tuple[str, float]]:
    """Pieces of words and their log-probabilities, every sign of the words among them."""
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError(
            "algorithm=unigram learns with SentencePiece, which is not installed; "
            "run `pip install 'bessemer[unigram]'`, or choose algorithm=bpe"
        ) from error
    from storage.sentencepiece_model import NORMAL, parse

    written = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(words),
        model_writer=written,
        input_format="tsv",
        pretokenization_delimiter=BETWEEN_WORDS,
        model_type="unigram",
        vocab_size=settings.vocabulary - len(spelled_tokens(settings)) + 1,  # and its own <unk>
        character_coverage=1.0,
        max_sentencepiece_length=settings.max_token_bytes,
        num_threads=1,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        split_by_number=False,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    found = parse(written.getvalue()).pieces
    return [(piece.text, piece.score) for piece in found if piece.kind == NORMAL]


def _lines(words: Counter[str]) -> Iterator[str]:
    """Words with counts, most frequent first and ties by spelling: not in the order of a hash.

    SentencePiece takes as candidates what stands twice in different lines, whatever their counts, so that
    a frequent word would be none; hence two words to a line.
    """
    for word, count in sorted(words.items(), key=lambda item: (-item[1], item[0])):
        if count > 1:
            yield f"{word}{BETWEEN_WORDS}{word}\t{count // 2}"
        if count % 2:
            yield f"{word}\t1"


def _split(settings: TokenizerConfig, longest: int = 0) -> Any:
    """How text becomes words of byte signs; at most `longest` of them in one, if given."""
    from tokenizers import Regex, pre_tokenizers

    whole = text_splitter("qwen2" if settings.splits_digits else "gpt-2")
    if not longest:
        return whole
    cut = pre_tokenizers.Split(Regex(f".{{1,{longest}}}"), "isolated")
    return pre_tokenizers.Sequence([whole, cut])
