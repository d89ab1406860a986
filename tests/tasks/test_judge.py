"""A judge that fails, stalls, talks nonsense and prefers what comes first: every verdict is asked and counted once."""

import math
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conf.judge import JudgeConfig
from storage import scores
from storage.scores import Scores
from tasks.answer_pairs import agreement, answered_by_all, contest_figures, contests
from tasks.completions import EndpointFailed
from tasks.judge import judge
from tests.tasks.endpoint_stand_in import Reply, completion, endpoint
from tests.tasks.text_jobs import digest_of, job_at

QUESTIONS = ["猫吃什么？", "What does a fox eat?", "写一句诗。", "Name a colour."]


def scores_at(path: Path, answers: dict[str, str]) -> Scores:
    (path / "files").mkdir(parents=True)
    rows = [
        {"id": f"prompt/{i}", "sample": sample, "prompt": question, "answer": answer}
        for i, (question, answer) in enumerate(answers.items())
        for sample in (0, 1)
    ]
    Scores.write(path / "files", {}, rows)
    return Scores(path)


@pytest.fixture
def answers(tmp_path: Path) -> dict[str, Scores]:
    return {
        name: scores_at(tmp_path / name, {q: f"{name} 说：{q}{{question}}" for q in QUESTIONS})
        for name in ("sft", "dpo")
    }


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here looks at the ends of an interval, which cost seconds."""
    monkeypatch.setattr(scores, "BOOTSTRAP_RESAMPLES", 20)


def config(url: str, **fields: Any) -> JudgeConfig:
    return JudgeConfig(model="m", base_url=url, **{"wait_seconds": 5.0, "attempts": 3, **fields})


def shown(prompt: str) -> list[str]:
    """Whose answers a prompt shows, in order."""
    return re.findall(r"(sft|dpo) 说", prompt)


def fair(prompt: str, times: int) -> Reply:
    """Scores dpo 8 and sft 4, and so prefers dpo in any order."""
    names = shown(prompt)
    if len(names) == 1:
        return completion(f"理由。\n[[{8 if names[0] == 'dpo' else 4}]]")
    return completion(f"[[A]] would be wrong.\n[[{'AB'[names.index('dpo')]}]]")


def test_a_fair_judge_is_believed(tmp_path: Path, answers: dict[str, Scores]) -> None:
    with endpoint(fair) as (url, asked):
        made = judge(job_at(tmp_path, "judged"), answers=answers, settings=config(url))
    # Four questions: an answer each of two, and a pair in both orders.
    assert sorted(asked.values()) == [1] * 16
    assert all("{question}" in prompt for prompt in asked)  # what answers spell in braces stays
    assert sum("公正" in prompt for prompt in asked) == 8  # Chinese questions are asked in Chinese
    figures = made.figures()
    assert figures["score/dpo"].value == 8
    assert figures["score/sft"].value == 4
    assert figures["wins/dpo_over_sft"].value == 1
    assert figures["ties/dpo_over_sft"].value == 0
    assert figures["consistent/dpo_over_sft"].value == 1
    assert figures["first_preferred/dpo_over_sft"].value == 0.5
    assert figures["unparsable/dpo"].value == 0
    assert [row["verdict"] for row in made.judgements() if "one" in row] == ["one"] * 4


def test_a_judge_that_prefers_what_comes_first_decides_nothing(
    tmp_path: Path, answers: dict[str, Scores]
) -> None:
    def biased(prompt: str, times: int) -> Reply:
        return completion("[[A]]")

    with endpoint(biased) as (url, _):
        settings = config(url, modes=("pairs",), baseline="sft")
        made = judge(job_at(tmp_path, "judged"), answers=answers, settings=settings)
    figures = made.figures()
    assert figures["consistent/dpo_over_sft"].value == 0
    assert figures["first_preferred/dpo_over_sft"].value == 1
    assert figures["ties/dpo_over_sft"].value == 1
    assert figures["wins/dpo_over_sft"].value == 0.5
    assert figures["unjudged/dpo_over_sft"].value == 0


def test_a_bad_endpoint_loses_no_verdict_and_is_asked_once(
    tmp_path: Path, answers: dict[str, Scores]
) -> None:
    order = Counter[str]()

    def bad(prompt: str, times: int) -> Reply:
        turn = order.setdefault(prompt, len(order)) % 5
        if turn == 0 and times == 1:
            return 429, {"error": "slow down"}
        if turn == 1 and times == 1:
            return 500, b"<html>oops"
        if turn == 2 and times == 1:
            time.sleep(1.2)
            return 200, b"late"
        if turn == 3 and times < 3:
            return 200, b"\xff not json"
        return fair(prompt, times)

    with endpoint(bad) as (url, asked):
        settings = config(url, wait_seconds=0.4)
        made = judge(job_at(tmp_path, "judged"), answers=answers, settings=settings)
        figures = made.figures()
        assert figures["wins/dpo_over_sft"].n == 4
        assert figures["wins/dpo_over_sft"].value == 1
        assert figures["score/dpo"].n == 4
        before = sum(asked.values())
        assert before > 16
        # Another run on the same store, as after `--force`: no call, the same bytes.
        again = judge(job_at(tmp_path, "again"), answers=answers, settings=settings)
        assert sum(asked.values()) == before
        assert digest_of(again.files) == digest_of(made.files)
        # One more checkpoint costs only what is new: its own scores and its pairs.
        other = scores_at(tmp_path / "ppo", {q: f"sft 说：{q}?" for q in QUESTIONS})
        more = judge(
            job_at(tmp_path, "more"),
            answers={**answers, "ppo": other},
            settings=config(url, modes=("score",)),
        )
        assert len(asked) == 16 + 4
        assert more.figures()["score/ppo"].value == 4


def test_nonsense_is_counted_and_nobodys_loss(tmp_path: Path, answers: dict[str, Scores]) -> None:
    def vague(prompt: str, times: int) -> Reply:
        if "诗" in prompt:
            return completion("I would rather not say. [[11]] [[D]]")
        return fair(prompt, times)

    with endpoint(vague) as (url, _):
        made = judge(job_at(tmp_path, "judged"), answers=answers, settings=config(url))
    figures = made.figures()
    assert figures["unparsable/dpo"].value == 0.25
    assert figures["score/dpo"].n == 3
    assert figures["unjudged/dpo_over_sft"].value == 0.25
    assert (figures["wins/dpo_over_sft"].value, figures["wins/dpo_over_sft"].n) == (1, 3)


def test_what_came_before_a_failure_or_the_budgets_end_is_kept(
    tmp_path: Path, answers: dict[str, Scores]
) -> None:
    def dying(prompt: str, times: int) -> Reply:
        return (403, {"error": "key"}) if len(asked) > 6 else fair(prompt, times)

    job = job_at(tmp_path, "judged")
    with endpoint(dying) as (url, asked), pytest.raises(EndpointFailed, match="status 403"):
        judge(job, answers=answers, settings=config(url, concurrency=1))
    kept = (job.state / "answers.jsonl").read_text("utf-8").count("\n")
    assert kept == 6
    with endpoint(fair) as (url, asked):
        made = judge(job, answers=answers, settings=config(url, max_requests=12))
    assert sum(asked.values()) == 12 - 6
    assert job.metrics["is_budget_spent"] is True
    assert job.metrics["answered"] == 12
    assert made.figures()["unjudged/dpo_over_sft"].value > 0


def test_answers_to_no_common_question_are_refused(
    tmp_path: Path, answers: dict[str, Scores]
) -> None:
    other = {**answers, "odd": scores_at(tmp_path / "odd", {"Else?": "yes"})}
    with pytest.raises(ValueError, match="no question in common"):
        answered_by_all(other)
    with pytest.raises(ValueError, match="nothing to judge"):
        answered_by_all({})
    with pytest.raises(ValueError, match="baseline 'x' is none of"):
        contests(["a", "b"], "x")
    assert contests(["b", "c", "a"], "") == [("a", "b"), ("a", "c"), ("b", "c")]
    assert contests(["b", "c", "a"], "b") == [("a", "b"), ("c", "b")]


def pair(verdict: str | None, gap: int = 0, number: int = 0) -> dict[str, Any]:
    lengths = [10 + gap, 10]
    return {
        "question": f"q{number}",
        "one": "a",
        "other": "b",
        "verdict": verdict,
        "lengths": lengths,
    }


def test_win_rate_at_equal_length_takes_length_out() -> None:
    # a wins exactly where it is longer, as often longer as shorter: at equal length nobody does.
    rows = [pair("one", 50), pair("other", -50)] * 10
    assert contest_figures(rows)["wins_at_equal_length/a_over_b"].value == pytest.approx(0.5)
    # Longer answers only, of which three quarters win: half of what is won is length. Four groups
    # (longer / shorter, won / lost) of 30, 10, 20, 20: logit = theta +- phi t, with t = tanh(1).
    rows = [pair("one", 9)] * 30 + [pair("other", 9)] * 10 + [pair("one", -9)] * 20
    rows += [pair("other", -9)] * 20
    theta = (math.log(30 / 10) + math.log(20 / 20)) / 2
    found = contest_figures(rows)
    assert found["wins/a_over_b"].value == pytest.approx(50 / 80)
    wanted = 1 / (1 + math.exp(-theta))
    assert found["wins_at_equal_length/a_over_b"].value == pytest.approx(wanted, abs=1e-3)


def test_one_who_always_wins_has_a_finite_rate() -> None:
    found = contest_figures([pair("one", gap) for gap in range(30)])
    assert 0.9 < found["wins_at_equal_length/a_over_b"].value < 1
    assert contest_figures([pair(None)])["unjudged/a_over_b"].value == 1


def test_agreement_by_hand() -> None:
    judged = [pair(v, number=i) for i, v in enumerate(["one", "one", "other", "tie", "one", None])]
    human = [
        {**pair(v, number=i), "one": "b", "other": "a"}  # the sides turned round
        for i, v in enumerate(["other", "other", "one", "tie", "one", "one"])
    ]
    # As a's: one one other tie other; judge: one one other tie one. Four of five agree. Chance: judge
    # one 3/5, other 1/5, tie 1/5; human one 2/5, other 2/5, tie 1/5: (6 + 2 + 1) / 25.
    found = agreement(judged, human)
    assert found["agreement"].value == pytest.approx(4 / 5)
    assert found["agreement"].n == 5
    assert found["kappa"].value == pytest.approx((0.8 - 0.36) / (1 - 0.36))
    assert agreement(judged, []) == {}
