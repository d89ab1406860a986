"""Where rewards come from besides a reward model: functions, people, a judge; and the truth beside them."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.ppo import PpoConfig, RewardJudgeConfig
from model.judge import Judge, JudgeFailed, number_in
from model.opinions import People, functions, reward_opinions, truth_opinion
from storage.people_scores import answer_key, people_scores
from tests.model.small_world import make_job
from tests.tasks.endpoint_stand_in import Reply, completion, endpoint

ANSWER = {
    "text": "鱼。",
    "is_ended": True,
    "messages": [{"role": "user", "content": "猫吃什么？"}],
    "reference": "猫吃鱼。",
}
OTHER = {**ANSWER, "text": "Go away."}


def verdict(prompt: str, _: int) -> Reply:
    """8 for what names fish, no number for anything else."""
    return completion("8 out of 10" if "鱼" in prompt.split("Answer:")[1] else "I cannot say")


def judge_at(address: str, said: Path) -> Judge:
    return Judge(RewardJudgeConfig(model="m", base_url=address), said)


def test_functions_are_added_up(tmp_path: Path) -> None:
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("def score(answer):\n    return answer['reference'].endswith(answer['text'])\n")
    two.write_text("def score(answer):\n    return -0.25 * len(answer['text'])\n")
    assert functions([one, two])([ANSWER, OTHER]) == [1 - 0.5, -2.0]


def test_a_function_that_gives_no_number_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("def score(answer):\n    return float('nan')\n")
    with pytest.raises(ValueError, match=r"own.py: score gave nan for the answer '鱼。'"):
        functions([path])([ANSWER])
    path.write_text("def rate(answer):\n    return 1.0\n")
    with pytest.raises(ValueError, match="has no function `score`"):
        functions([path])


def test_people_score_word_for_word_and_are_asked_for_the_rest(tmp_path: Path) -> None:
    scores, unscored = tmp_path / "scores.jsonl", tmp_path / "unscored.jsonl"
    scores.write_text(json.dumps({"prompt": "猫吃什么？", "answer": " 鱼。", "score": 3}) + "\n\n")
    people = People([scores], unscored)
    assert people([ANSWER, OTHER, OTHER]) == [3.0, None, None]
    [line] = unscored.read_text("utf-8").splitlines()
    assert json.loads(line) == {"messages": OTHER["messages"], "answer": "Go away.", "score": None}
    # What they then score is a file of scores; a job that goes on after a kill tells nothing twice.
    whole = unscored.read_bytes()
    unscored.write_bytes(whole + '{"messages": [{"role": "用'.encode()[:-1])
    assert People([scores], unscored)([OTHER]) == [None]
    assert unscored.read_bytes() == whole
    with pytest.raises(ValueError, match=r"unscored.jsonl:1 is no score"):
        People([unscored], tmp_path / "none")
    # A sign that ends a line, but no line of JSON.
    row: dict[str, Any] = {**json.loads(line), "answer": "Go\u2028away.", "score": 1}
    scores.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", "utf-8")
    assert people_scores([scores]) == {answer_key(row["messages"], "Go\u2028away."): 1.0}
    scores.write_text("")
    with pytest.raises(ValueError, match="hold no score"):
        People([scores], unscored)


def test_a_judge_is_asked_once_for_each_answer(tmp_path: Path) -> None:
    said = tmp_path / "judged.jsonl"
    with endpoint(verdict) as (address, asked):
        assert judge_at(address, said)([ANSWER, OTHER, ANSWER]) == [8.0, None, 8.0]
        assert sorted(asked.values()) == [1, 1]
        assert all("user: 猫吃什么？" in prompt for prompt in asked)
        # A kill in the middle of a line: what is whole is known.
        whole = said.read_bytes()
        said.write_bytes(whole + b'{"key": "half')
        assert judge_at(address, said)([ANSWER, OTHER]) == [8.0, None]
        assert sum(asked.values()) == 2
    assert said.read_bytes() == whole


def test_a_busy_judge_is_asked_again_and_one_that_refuses_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("model.judge.time.sleep", pauses.append)
    with endpoint(lambda prompt, times: (503, "") if times < 3 else verdict(prompt, times)) as (
        address,
        _,
    ):
        assert judge_at(address, tmp_path / "a")([ANSWER]) == [8.0]
    assert pauses == [1.0, 2.0]
    with endpoint(lambda _, __: (401, "who?")) as (address, asked):
        with pytest.raises(JudgeFailed, match=r"answered 'status 401.*judge.key_variable"):
            judge_at(address, tmp_path / "b")([ANSWER])
        assert asked.total() == 1
    keyed = RewardJudgeConfig(model="m", key_variable="NO_SUCH_KEY")
    with pytest.raises(ValueError, match=r"NO_SUCH_KEY \(judge.key_variable\) is not set"):
        Judge(keyed, tmp_path / "c")


def test_the_first_number_counts() -> None:
    assert [number_in(text) for text in ("7", "Score: 6.5/10", "-1", "none")] == [7, 6.5, -1, None]


def test_one_truth_is_looked_at(tmp_path: Path) -> None:
    job = make_job(tmp_path, "ppo", PpoConfig(), {})
    assert truth_opinion(job, PpoConfig()) is None
    looking = PpoConfig(truth_every_iterations=5)
    with pytest.raises(ValueError, match="looks at one truth, the node has none"):
        truth_opinion(job, looking)
    both = job.model_copy(update={"inputs": {"world": "w"}, "sources": {"truth_functions": ["f"]}})
    with pytest.raises(ValueError, match=r"\['truth_functions', 'world'\]"):
        truth_opinion(both, looking)
    with endpoint(verdict) as (address, _):
        judge = RewardJudgeConfig(model="m", base_url=address, is_truth=True)
        judged = looking.model_copy(update={"judge": judge})
        truth = truth_opinion(job, judged)
        assert truth is not None
        assert truth([ANSWER, OTHER]) == [8.0, None]
    assert reward_opinions(job, judged) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "grpo"}, "samples_per_prompt=1 leaves none"),
        ({"samples_per_prompt": 3}, "not a multiple of samples_per_prompt=3"),
        ({"kl_in": "loss"}, "kl_estimator=k1 has no effect with kl_in=loss"),
        ({"judge": {"model": "m", "prompt": "{answers}"}}, r"`\{answer\}` is needed"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PpoConfig.model_validate(settings)
