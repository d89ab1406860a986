"""Rows of the worker become figures, with the numbers worked out by hand."""

import math
from typing import Any

import pytest

from tasks.evaluation_figures import (
    document_figures,
    held_figures,
    overfitted,
    pair_figures,
    request_figures,
    trials,
    writing_figures,
)
from tasks.exams import Request, Task

LN2 = math.log(2)


def request(number: int, right: int, *, is_whole: bool = False, **tags: tuple[str, ...]) -> Request:
    return Request(
        id=str(number),
        group="exam_option" if is_whole else "exam_letter",
        prefix=(),
        prompt="?",
        continuations=("红", "blue"),
        right=right,
        tags=tags,
        is_whole=is_whole,
    )


def scored(*logprobs: float) -> dict[str, object]:
    return {"logprobs": list(logprobs)}


def document(domain: str, split: str, bits: float, size: int) -> dict[str, object]:
    return {
        "domain": domain, "split": split, "nats": bits * LN2, "bytes": size,
        "characters": size // 2, "tokens": 2,
    }  # fmt: skip


def test_accuracy_by_subject_category_and_difficulty() -> None:
    stem: dict[str, Any] = {"category": ("STEM", "Hard"), "difficulty": ("college",)}
    requests = [
        request(0, 0, subject=("physics",), **stem),
        request(1, 0, subject=("physics",), **stem),
        request(2, 1, subject=("law",), category=("Other",)),
    ]
    found = request_figures(requests, [scored(-1, -2), scored(-3, -2), scored(-2, -2)])
    # Right, wrong, and a tie of two: half a hit.
    assert found["exam_letter/accuracy"].value == pytest.approx(1.5 / 3)
    assert found["exam_letter/accuracy"].chance == 0.5
    assert found["exam_letter/accuracy/physics"].value == 0.5
    assert found["exam_letter/accuracy/category=STEM"].n == 2
    assert found["exam_letter/accuracy/category=Hard"].n == 2
    assert found["exam_letter/accuracy/difficulty=college"].value == 0.5
    assert found["exam_letter/macro"].value == 0.5  # physics 1/2, law 1/2
    assert found["exam_letter/centred"].value == 0  # (0.5 - 0.5) / (1 - 0.5)


def test_every_trial_of_a_figure_is_told() -> None:
    requests = [request(0, 0), request(1, 1)]
    documents = [
        document("web", "held", 20, 10), document("books", "held", 30, 30),
        document("web", "train", 5, 10), document("web", "held", 80, 20),
    ]  # fmt: skip
    pairs = [
        {"id": "p", "chosen": -6.0, "rejected": -4.0, "chosen_tokens": 6, "rejected_tokens": 2},
        {"id": "q", "chosen": -4.0, "rejected": -4.0, "chosen_tokens": 4, "rejected_tokens": 4},
    ]
    found = [*trials(requests, [scored(-1, -2), scored(-2, -2)], documents, pairs)]
    # The first pair is wrong as a whole, and right at -1 a token against -2.
    assert [tuple(row.values()) for row in found] == [
        ("pairs/accuracy", "p", 0.0, 1), ("pairs_per_token/accuracy", "p", 1.0, 1),
        ("pairs/accuracy", "q", 0.5, 1), ("pairs_per_token/accuracy", "q", 0.5, 1),
        ("exam_letter/accuracy", "0", 1.0, 1), ("exam_letter/accuracy", "1", 0.5, 1),
        ("bits_per_byte/books", "0", pytest.approx(1.0), 30),
        ("bits_per_byte/web", "0", pytest.approx(2.0), 10),
        ("bits_per_byte/web", "1", pytest.approx(4.0), 20),
    ]  # fmt: skip
    values = {name: figure.value for name, figure in pair_figures(pairs).items()}
    assert values == {"pairs/accuracy": 0.25, "pairs_per_token/accuracy": 0.75}


def test_answers_to_held_out_questions_have_figures_of_their_own() -> None:
    answers = [
        {"id": "held/a", "is_ended": True, "tokens": 4, "kl": 1.0},
        {"id": "held/b", "is_ended": False, "tokens": 8, "kl": 2.0},
        {"id": "prompt/0", "is_ended": False, "tokens": 100, "kl": 9.0},
    ]
    values = {name: figure.value for name, figure in held_figures(answers).items()}
    assert values == {"held/ended": 0.5, "held/answer_tokens": 6.0, "held/kl": 1.5}


def test_whole_options_are_compared_per_byte() -> None:
    # Bytes 3 and 4: -3/3 is above -6/4, and so is -3 above -6; in the second -6/3 is below -7/4.
    rows = [scored(-3, -6), scored(-6, -7)]
    found = request_figures([request(i, i, is_whole=True) for i in (0, 1)], rows)
    assert found["exam_option/accuracy"].value == 1.0
    assert found["exam_option_sum/accuracy"].value == 0.5


def test_costs_of_documents_by_hand() -> None:
    rows = [
        document("zh", "held", 30, 10),
        document("zh", "held", 10, 30),
        document("en", "held", 4, 8),
    ]
    found = document_figures(rows)
    assert found["bits_per_byte/zh"].value == pytest.approx(40 / 40)
    assert found["bits_per_character/zh"].value == pytest.approx(40 / 20)
    assert found["nats_per_token/zh"].value == pytest.approx(40 * LN2 / 4)
    assert found["nats_per_document/zh"].value == pytest.approx(20 * LN2)
    assert found["bits_per_byte/all"].value == pytest.approx(44 / 48)
    assert found["bits_per_byte/macro"].value == pytest.approx((1 + 0.5) / 2)
    assert document_figures([]) == {}


def test_one_domain_has_no_macro_mean() -> None:
    assert "bits_per_byte/macro" not in document_figures([document("zh", "held", 30, 10)])


def test_training_documents_that_cost_less_are_told() -> None:
    learnt = [document("zh", "held", 20, 10)] * 5 + [document("zh", "train", 10, 10)] * 5
    new = [document("en", "held", 20, 10)] * 5 + [document("en", "train", 19, 10)] * 5
    found = document_figures([*learnt, *new])
    assert found["overfit/zh"].value == pytest.approx(1.0)
    assert found["overfit/en"].value == pytest.approx(0.1)  # surely more, but not by a tenth of 2
    assert found["train/bits_per_byte/zh"].value == pytest.approx(1.0)
    assert overfitted(found) == ["zh"]
    # What varies by chance is no over-fitting.
    spread = [document("zh", "held", bits, 10) for bits in (1, 20, 40)]
    spread += [document("zh", "train", bits, 10) for bits in (2, 18, 30)]
    assert overfitted(document_figures(spread)) == []


def test_free_answers_are_compared_with_their_references() -> None:
    answers = [
        {"id": "prompt/0", "answer": "好好好好好", "is_ended": False},
        {"id": "task/poem/1", "answer": "春天来了", "is_ended": True},
        {"id": "task/poem/2", "answer": "天下", "is_ended": True},
        {"id": "fact-7", "answer": "the world's own", "is_ended": True},
    ]
    tasks = [
        Task("poem/1", "poem", "?", ("春天来了",)),
        Task("poem/2", "poem", "?", ("天上", "天下太平")),
    ]
    found = writing_figures(answers, tasks)
    assert found["writing/ended"].value == pytest.approx(2 / 3)
    assert found["writing/ended"].n == 3
    # 好好好好 comes twice in the first: half of its two quadruples.
    assert found["writing/repetition"].value == pytest.approx(0.5 / 3)
    assert found["own_poem/exact"].value == 0.5
    # 天下 against 天下太平: 2 * 2 / 6; against 天上: 2 * 1 / 4.
    assert found["own_poem/rouge_1"].value == pytest.approx((1 + 2 / 3) / 2)
    assert writing_figures([answers[-1]], []) == {}
