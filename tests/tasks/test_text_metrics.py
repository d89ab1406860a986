"""Likeness and variety of generated texts, against cases worked by hand."""

import math

import pytest

from tasks.text_metrics import bleu, likeness, repetition, rouge, units, variety


def test_units_are_chinese_signs_and_words() -> None:
    assert units("猫坐在GPT-4 垫子上，OK！") == [
        "猫", "坐", "在", "gpt", "4", "垫", "子", "上", "ok",
    ]  # fmt: skip


def test_chinese_bleu_by_hand() -> None:
    # Six signs against seven, all of them in order but for the sign 了 before the full stop:
    # 猫坐在垫子上。 (7 with the stop) and 猫坐在垫子上了。 (8). 7 of 7 single signs, 5 of 6 pairs (上。 is
    # none), 4 of 5 triples, 3 of 4 quadruples; brevity e^(1 - 8/7).
    wanted = 100 * math.exp(1 - 8 / 7) * (1 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25
    for tokenize in ("zh", "char"):
        found = bleu(["猫坐在垫子上。"], [["猫坐在垫子上了。"]], tokenize=tokenize)
        assert found.value == pytest.approx(wanted)
        assert (found.low, found.high, found.n) == (found.value, found.value, 1)


def test_corpus_bleu_adds_counts_before_dividing() -> None:
    # Signs: 4 + 4 of 8, 3 of 6 pairs, 2 of 4, 1 of 2 in the first text alone; lengths equal.
    found = bleu(["春天来了", "天下太平"], [["春天来了"], ["太平天下"]], tokenize="char")
    # Second text: all four signs, pairs 天下 and 太平 shared, no triple.
    wanted = 100 * (8 / 8 * 5 / 6 * 2 / 4 * 1 / 2) ** 0.25
    assert found.value == pytest.approx(wanted)
    assert found.low < found.value < found.high


def test_corpus_bleu_is_that_of_the_library() -> None:
    from sacrebleu.metrics.bleu import BLEU

    answers = ["the cat sat on a mat", "春天来了，燕子 fly 回来", "x"]
    references = [["the cat sat on the mat"], ["春天来了，燕子飞回来了"], ["y z"]]
    for tokenize in ("zh", "char"):
        library = BLEU(tokenize=tokenize).corpus_score(answers, [[r[0] for r in references]])
        found = bleu(answers, references, tokenize=tokenize)
        assert found.value == pytest.approx(library.score)


def test_rouge_by_hand() -> None:
    # Own 我 爱 北 京 (4), wanted 我 在 北 京 (4): 3 signs shared, one pair of three (北京), 我北京 in order.
    found = rouge("我爱北京", "我在北京。")
    assert found == pytest.approx({"rouge_1": 6 / 8, "rouge_2": 2 / 6, "rouge_l": 6 / 8})
    # Order counts for the subsequence alone: of "b a" one word is in the order of "a b".
    assert rouge("B a", "a b") == {"rouge_1": 1.0, "rouge_2": 0.0, "rouge_l": 0.5}
    assert set(rouge("", "猫").values()) == {0.0}


def test_the_best_of_several_references_counts() -> None:
    found = likeness(["猫吃鱼", "no"], [["狗吃肉", "猫吃鱼"], ["yes"]])
    assert found["rouge_l"].value == 0.5
    assert found["exact"].value == 0.5
    assert found["exact"].n == 2


def test_an_answer_without_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="has no reference"):
        likeness(["a"], [[]])


def test_repetition_and_distinct_shares_by_hand() -> None:
    # 好好好好好好: three quadruples, one of them distinct.
    assert repetition(units("好好好好好好")) == pytest.approx(2 / 3)
    assert repetition(units("好")) == 0
    found = variety(["a b a", "a b"], [True, False])
    # Words a b a a b: 2 of 5; pairs ab ba ab: 2 of 3.
    assert found["distinct_1"].value == pytest.approx(2 / 5)
    assert found["distinct_2"].value == pytest.approx(2 / 3)
    assert found["ended"].value == 0.5
    assert variety([""], [True])["distinct_2"].value == 0
