"""Scripts decide the language where they can; short Chinese is Chinese."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from py3langid import langid

from tasks.han import traditional_share
from tasks.language import identifier, language_of, languages_of, script_shares

library = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def language(text: str) -> str:
    return language_of(text, script_shares(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("猫是红色的。", "zh"),
        ("狐住在山洞里", "zh"),
        ("使用 Linux 命令 ls -la 查看文件目录的内容", "zh"),
        ("The cat is red.", "en"),
        ("What does the wolf eat? The wolf eats fish.", "en"),
        ("猫は魚を食べる。", "ja"),
        ("고양이는 물고기를 먹는다.", "ko"),
        ("Der Fuchs ist rot und wohnt im Wald.", "de"),
        ("Le renard vit dans la grotte près de la rivière.", "fr"),
        ("Лиса живёт в лесу.", "ru"),
        ("1234 5678 !!", "und"),
        ("", "und"),
    ],
)
def test_language_of_short_texts(text: str, expected: str) -> None:
    assert language(text) == expected


def test_shares_are_of_letters() -> None:
    # 2 Han and 2 Latin letters; digits, spaces and marks do not count
    shares = script_shares("猫狗 ab 123，。!")
    assert (shares.han, shares.latin, shares.kana, shares.hangul) == (0.5, 0.5, 0.0, 0.0)
    assert script_shares("only ascii").latin == 1.0
    assert script_shares("...") == (0.0, 0.0, 0.0, 0.0)


def test_long_texts_are_judged_by_three_samples() -> None:
    assert language("The old man went down to the river. " * 5000) == "en"


def test_traditional_characters_are_told_from_simplified_ones() -> None:
    # 臺灣氣: in Big5 only; 台湾气: the last two in GB 2312 only (台 is in both, as 天 and 的)
    assert traditional_share("臺灣的天氣") == 1.0
    assert traditional_share("台湾的天气") == 0.0
    assert traditional_share("臺湾") == 0.5
    assert traditional_share("天的 plain words") == 0.0


def test_the_compiled_walk_gives_the_library_s_probabilities() -> None:
    texts = [
        "a",
        "Le renard",
        "SHOUTING",
        "ß∂ƒ 😀",
        "\0\x01",
        "x" * 5000,
        "Der Fuchs wohnt im Wald. " * 50,
    ]
    for text in texts:
        assert identifier().rank(text) == library.rank(text), text


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=20))
def test_many_texts_are_told_as_one_by_one(generated: list[str]) -> None:
    texts = [*generated, "Le renard vit dans la grotte.", "", "Лиса живёт в лесу. " * 40]
    assert identifier().tell(texts) == [library.classify(text)[0] for text in texts]
    shares = [script_shares(text) for text in texts]
    assert languages_of(texts, shares) == [language(text) for text in texts]


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_letters_are_counted_as_python_s_expressions_count_them(text: str) -> None:
    letters = re.findall(r"[^\W\d_]", text)
    latin = re.findall(r"[A-Za-zÀ-ÖØ-öø-ɏ]", text)
    assert script_shares(text).latin == (len(latin) / len(letters) if letters else 0.0)
