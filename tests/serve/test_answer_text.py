"""Tokens become text without cutting a character, whatever bytes they are."""

import random

import pytest

from flows.answer_text import StopStrings, TokenText
from storage.tokenizer import ChatTokenizer
from tests.model.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), 300)


def pieces(tokenizer: ChatTokenizer, ids: list[int]) -> list[str]:
    text = TokenText(tokenizer)
    return [*(text.add(token) for token in ids), text.finish()]


def test_a_character_comes_with_its_last_byte(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode("鑫🙂a")  # no merge knows them: three, four and one token
    assert pieces(tokenizer, ids) == ["", "", "鑫", "", "", "", "🙂", "a", ""]


def test_any_tokens_give_what_they_decode_to_at_once(tokenizer: ChatTokenizer) -> None:
    draw = random.Random(0)
    for length in (1, 2, 5, 60):
        for _ in range(100):
            ids = [draw.randrange(tokenizer.vocabulary) for _ in range(length)]
            assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_broken_bytes_are_not_held_back_for_ever(tokenizer: ChatTokenizer) -> None:
    (broken,) = (token for token in tokenizer.encode("鑫")[2:])  # a byte that begins no character
    told = pieces(tokenizer, [broken] * 10)
    assert told[:3] == ["", "", ""]
    assert told[3:10] == ["\ufffd"] * 7
    assert told[10] == "\ufffd" * 3


@pytest.mark.parametrize("size", [1, 2, 7])
def test_text_goes_up_to_the_first_stop_string(size: int) -> None:
    text = "aababac 猫吃鱼。END more"
    for stops, expected in (
        (["END"], "aababac 猫吃鱼。"),
        (["abac", "END"], "aab"),
        (["鱼。E", "猫"], "aababac "),
        (["nothing", "mores"], text),
        ([], text),
    ):
        held = StopStrings(stops)
        told = [held.add(text[place : place + size]) for place in range(0, len(text), size)]
        assert "".join(told) + held.finish() == expected
        assert held.is_found == (expected != text)
