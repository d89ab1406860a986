"""A SentencePiece model that is read here gives the ids of the library that wrote it."""

import functools
import io
from typing import Any

import pytest
import sentencepiece

from storage.sentencepiece_model import converted, parse

SENTENCES = [
    "The cat sat on the mat, and 12 dogs ran over the hills of Rome.",
    "A cat and a dog sit in the sun; the sun is warm, the mat is red.",
    "猫坐在垫子上，狗在山上吃草。",
    "太阳很暖和，垫子是红色的，山上有三只猫和一只狗。",
] * 5
TEXTS = [
    *SENTENCES[:4],
    "",
    " ",
    "  two  spaces  ",
    "a\tb\n\n c\r\n",
    "▁a ▁",
    "<s></s><unk>",
    "<0x41>",
    "e\u0301 ﬁ Ａ１ ½ ㍿ \u3000全角\u3000",
    "🙂👩‍👩‍👧 \x00\x7f\ufffd\u200b\ufeff",
    "aaaa aaaaa" * 30,
    "x<sep>y <sep> z",
    "한국어 عربى",
    "猫<sep>狗" * 3,
]
SPELLED = ("<s></s><unk>", "<0x41>")
"""What unigram models need adoption for: it cuts such text before the model sees it."""
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS: dict[str, dict[str, Any]] = {
    "unigram": {"model_type": "unigram"},
    "unigram, bytes, plain": {"model_type": "unigram", "byte_fallback": True, **PLAIN},
    "unigram, user's symbol": {"model_type": "unigram", "user_defined_symbols": ["<sep>"]},
    "bpe": {"model_type": "bpe"},
    "bpe, bytes, plain": {"model_type": "bpe", "byte_fallback": True, **PLAIN},
    "bpe, digits, no space before": {
        "model_type": "bpe", "split_digits": True, "add_dummy_prefix": False,
    },
    "bpe, user's symbol, plain": {
        "model_type": "bpe", "user_defined_symbols": ["<sep>"], "add_dummy_prefix": False, **PLAIN,
    },
}  # fmt: skip


@functools.cache
def model_of(**settings: Any) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=written,
        vocab_size=380 if settings.get("byte_fallback") else 120,
        hard_vocab_limit=False,
        character_coverage=0.99,
        num_threads=1,
        minloglevel=2,
        **{name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()},
    )
    return written.getvalue()


def model_for(settings: dict[str, Any]) -> bytes:
    return model_of(**{n: tuple(v) if isinstance(v, list) else v for n, v in settings.items()})


@pytest.mark.parametrize("kind", list(KINDS))
def test_ids_are_those_of_the_library(kind: str) -> None:
    content = model_for(KINDS[kind])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content)
    ours = converted(parse(content))
    ours.encode_special_tokens = True
    is_unigram = KINDS[kind]["model_type"] == "unigram"
    for text in TEXTS:
        if is_unigram and text in SPELLED:
            continue
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), text


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "bytes" in kind])
def test_text_comes_back(kind: str) -> None:
    ours = converted(parse(model_for(KINDS[kind])))
    ours.encode_special_tokens = True
    for text in TEXTS:
        if "▁" not in text and text not in SPELLED:  # it cannot tell ▁ from a space
            ids = ours.encode(text, add_special_tokens=False).ids
            assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "word"}, "kind 3 .words or characters."),
        (
            {"model_type": "bpe", "user_defined_symbols": ["<sep>"]},
            "'<sep>', .* adopt its tokenizer",
        ),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "puts spaces behind words"),
    ],
)
def test_what_would_give_other_ids_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(model_for(settings))


def test_a_damaged_or_other_file_is_refused() -> None:
    content = model_for(KINDS["bpe"])
    for damaged in (b"", b"{}", b"\xff" * 40, content[:1000], content[: len(content) - 3]):
        with pytest.raises(ValueError, match="no SentencePiece model"):
            parse(damaged)
