"""What training did to a model: who answers better afterwards and what was forgotten, by hand."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.effect import EffectConfig
from conf.settings import SourceSpec
from storage import scores as figures_of
from storage.scores import Scores
from storage.source import HashCache, resolve
from tasks.effect import effect
from tests.tasks.text_jobs import digest_of, job_at

Told = tuple[str, int, str, float]
"""Id, sample, answer, reward model's score."""


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures_of, "BOOTSTRAP_RESAMPLES", 50)


def evaluation(
    path: Path, told: Sequence[Told], bits: Sequence[float] = (), *, has_truth: bool = False
) -> Scores:
    """Scores of an evaluation; the true reward of an answer is its length."""
    rows: list[dict[str, Any]] = []
    for name, sample, answer, score in told:
        row = {
            "id": name, "sample": sample, "prompt": f"{name} 吗？", "answer": answer,
            "is_ended": not answer.endswith("…"), "tokens": len(answer), "reward_model": score,
        }  # fmt: skip
        rows.append({**row, "judgement": {"reward": len(answer)}} if has_truth else row)
    trials = [
        {"figure": f"bits_per_byte/{'zh' if n else 'en'}", "id": str(n), "value": value, "weight": 1 + n}
        for n, value in enumerate(bits)
    ]  # fmt: skip
    scores = Scores(path)
    scores.files.mkdir(parents=True)
    Scores.write(scores.files, {}, rows, trials=trials)
    return scores


SFT = [("猫#0", 0, "鱼", 1.0), ("猫#1", 0, "鱼…", 2.0), ("fox", 0, "rice", 3.0), ("cow", 0, "grass", 0.0)]  # fmt: skip
DPO = [("猫#0", 0, "鱼。", 2.0), ("猫#1", 0, "鱼", 2.0), ("fox", 0, "bones", 1.0), ("cow", 1, "hay", 9.0)]  # fmt: skip


def test_answers_and_documents_are_compared_one_by_one(tmp_path: Path) -> None:
    before = evaluation(tmp_path / "sft", SFT, (1.0, 2.0, 3.0), has_truth=True)
    after = evaluation(tmp_path / "dpo", DPO, (1.5, 2.0, 2.0), has_truth=True)
    job = job_at(tmp_path, "effect")
    found = effect(job, before=before, after={"dpo": after}, settings=EffectConfig()).figures()
    # Another sample of `cow` is no pair. Won, tied and lost; two of the three are one question.
    wins = found["wins/by_reward_model/dpo"]
    assert (wins.value, wins.n, wins.chance) == (0.5, 3, 0.5)
    assert found["change/reward_model/dpo"].value == pytest.approx((1 + 0 - 2) / 3)
    assert found["wins/by_truth/dpo"].value == pytest.approx(2 / 3)  # 1 to 2, 2 to 1, 4 to 5 signs
    assert found["change/ended/dpo"].value == pytest.approx(1 / 3)
    assert found["change/answer_tokens/dpo"].value == pytest.approx(1 / 3)
    # One document of English, two of Chinese with weights 2 and 3.
    assert found["change/bits_per_byte/en/dpo"].value == 0.5
    assert found["change/bits_per_byte/zh/dpo"].value == pytest.approx((0 * 2 - 1 * 3) / 5)
    assert found["change/bits_per_byte/all/dpo"].value == pytest.approx((0.5 - 3) / 6)
    shown = job.tables["answers before and after"]
    assert [row["answer after"] for row in shown] == ["鱼。", "鱼", "bones"]


def test_a_rule_of_ones_own_decides(tmp_path: Path) -> None:
    rule = "def score(answer):\n    return -len(answer['text']) * answer['is_ended']\n"
    (tmp_path / "rule.py").write_text(rule, "utf-8")
    settings = EffectConfig(functions=(SourceSpec(path="rule.py"),))
    rules = resolve(
        settings.functions, artifacts={}, base=tmp_path, ledger=None, hashes=HashCache()
    )
    job = replace(job_at(tmp_path, "effect"), sources={"functions": rules})
    sides = evaluation(tmp_path / "sft", SFT), evaluation(tmp_path / "dpo", DPO)
    found = effect(job, before=sides[0], after={"dpo": sides[1]}, settings=settings).figures()
    # -1 to -2, 0 (not ended) to -1, -4 to -5.
    assert found["wins/by_functions/dpo"].value == 0.0
    assert found["change/functions/dpo"].value == pytest.approx(-1.0)
    assert "wins/by_truth/dpo" not in found


def test_equal_evaluations_tie_and_give_equal_bytes(tmp_path: Path) -> None:
    sides = [evaluation(tmp_path / name, SFT[:1], (1.0,)) for name in ("a", "b")]
    digests: set[str] = set()
    for name in ("one", "two"):
        job = job_at(tmp_path, name)
        found = effect(job, before=sides[0], after={"b": sides[1]}, settings=EffectConfig())
        digests.add(digest_of(found.files))
        assert found.figures()["wins/by_reward_model/b"].value == 0.5
        assert found.figures()["change/bits_per_byte/all/b"].value == 0.0
    assert len(digests) == 1


def test_evaluations_of_nothing_in_common_are_refused(tmp_path: Path) -> None:
    before = evaluation(tmp_path / "a", SFT[:1], (1.0,))
    # Another number of documents, and other questions.
    after = evaluation(tmp_path / "b", [("owl", 0, "mice", 1.0)], (1.0, 2.0))
    after.files.joinpath("trials.jsonl").write_text("")
    with pytest.raises(ValueError, match="b and the evaluation before have no document"):
        effect(job_at(tmp_path, "c"), before=before, after={"b": after}, settings=EffectConfig())
