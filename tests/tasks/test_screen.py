"""screen: no exam question and no repeated conversation is trained on."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from conf.screen import ScreenConfig
from conf.screen_pairs import ScreenPairsConfig
from storage.conversations import Conversations
from storage.jsonl import Split, SplitWriter, content_id
from storage.preferences import Preferences
from storage.source import HashCache, resolve
from tasks.screen import screen
from tasks.screen_pairs import screen_pairs
from tasks.stage import Job
from tests.tasks.corpus_runs import spec
from tests.tasks.test_dedup_modes import jaccard_of, variants
from tests.tasks.text_jobs import job_at

QUESTIONS = {
    "en": "A farmer has 17 sheep in one field and 25 goats in another field, how many animals are there?",
    "zh": "在下列动物当中，哪一种住在老磨坊后面的寒冷山洞里？",
}


def conversations_of(root: Path, train: Sequence[str], held: Sequence[str] = ()) -> Conversations:
    """Conversations of one question, and one answer of their own."""
    with SplitWriter(root / "chats" / "files") as writer:
        for split, questions in (("train", train), ("held", held)):
            for question in questions:
                messages = [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": "好的。"},
                ]
                row = {"id": content_id([split, *messages]), "messages": messages}
                writer.write(split, {**row, "domain": "d", "source": "s", "language": "en"})  # pyright: ignore[reportArgumentType]
    return Conversations(root / "chats")


def run(
    root: Path, train: Sequence[str], held: Sequence[str] = (), **fields: Any
) -> tuple[Conversations, Job]:
    root.mkdir(exist_ok=True)
    (root / "gsm8k.jsonl").write_text(json.dumps({"question": QUESTIONS["en"]}) + "\n", "utf-8")
    (root / "ceval.csv").write_text(f"id,question,A,B\n0,{QUESTIONS['zh']},狐狸,狼\n", "utf-8")
    exams = (spec("gsm8k.jsonl"), spec("ceval.csv"))
    source = resolve(exams, artifacts={}, base=root, ledger=None, hashes=HashCache())
    job = replace(job_at(root, "screen"), sources={"exams": source})
    settings = ScreenConfig(exams=exams, **fields)
    return screen(job, conversations_of(root, train, held), settings), job


def asked(result: Conversations, split: Split) -> list[str]:
    return [row["messages"][0]["content"] for row in result.rows(split)]


def test_conversations_that_hold_exam_questions_go(tmp_path: Path) -> None:
    sound = ["How many goats does the farmer have?", "狐狸住在哪里？山洞里很冷。"]
    leaks = [f"Solve: {QUESTIONS['en']}", f"请回答：{QUESTIONS['zh']}"]
    result, job = run(tmp_path, [sound[0], leaks[0]], [sound[1], leaks[1]])
    assert asked(result, "train") == sound[:1]
    assert asked(result, "held") == sound[1:]
    table = pl.read_parquet(job.files / "dropped.parquet")
    assert set(table.select("split", "reason", "of", "question").rows()) == {
        ("train", "exam", "gsm8k.jsonl", QUESTIONS["en"]),
        ("held", "exam", "ceval.csv", QUESTIONS["zh"]),
    }
    assert job.metrics["exams"] == {"ceval.csv": 1, "gsm8k.jsonl": 1}


@pytest.mark.parametrize("threshold", [0.4, None])
def test_a_repeated_conversation_goes_and_never_the_held_out_one(
    tmp_path: Path, threshold: float | None
) -> None:
    texts = [text for text in dict.fromkeys(variants(120, seed=11)) if text]
    random.Random(0).shuffle(texts)
    held, train = texts[:20], texts[20:]
    result, job = run(tmp_path, [*train, held[3]], held, threshold=threshold, least_recall=0.9999)
    kept: list[str] = []
    for text in [*held, *train]:
        said = f"{text}\n好的。"
        if threshold is None or all(jaccard_of(said, f"{k}\n好的。") < 0.4 for k in kept):
            kept.append(text)
    assert asked(result, "held") == [text for text in held if text in kept]
    assert asked(result, "train") == [text for text in train if text in kept]
    table = pl.read_parquet(job.files / "dropped.parquet")
    assert set(table["reason"]) == {"repeated"}
    ids = {row["id"] for split in ("train", "held") for row in result.rows(split)}
    assert set(table["of"]) <= ids


def test_nothing_and_one_conversation_pass(tmp_path: Path) -> None:
    for name, train in (("none", []), ("one", ["hello"])):
        result, job = run(tmp_path / name, train)
        assert asked(result, "train") == train
        assert job.metrics["conversations"] == {"in": len(train), "kept": len(train)}


def test_short_long_and_repeating_conversations_go(tmp_path: Path) -> None:
    with SplitWriter(tmp_path / "chats" / "files") as writer:
        for name, question, answer in (
            ("good", "猫吃什么？", "The cat eats fish and rice, as all cats do."),
            ("short", "猫？", "好"),
            ("long", "x" * 300, "A fine answer."),
            ("again", "诗", "春眠不觉晓，" * 8),
        ):
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            writer.write("train", {"id": name, "messages": turns, "domain": "d"})
    settings = ScreenConfig(least_answer_chars=2, most_chars=200, most_repeated=0.5, threshold=None)
    job = job_at(tmp_path, "screen")
    result = screen(job, Conversations(tmp_path / "chats"), settings)
    assert [row["id"] for row in result.rows("train")] == ["good"]
    assert dict(pl.read_parquet(job.files / "dropped.parquet").select("id", "reason").rows()) == {
        "short": "short_answer", "long": "long", "again": "repeats_itself",
    }  # fmt: skip


def test_domains_have_the_shares_that_are_asked_for(tmp_path: Path) -> None:
    with SplitWriter(tmp_path / "chats" / "files") as writer:
        for number in range(130):
            question = f"question {number} {random.Random(number).random()}"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
            domain = "zh" if number < 100 else "en"
            split: Split = "held" if number % 10 == 0 else "train"
            writer.write(split, {"id": str(number), "messages": turns, "domain": domain})
    settings = ScreenConfig(domain_shares={"zh": 0.6, "en": 0.4}, threshold=None)
    found = [
        screen(job_at(tmp_path / name, "screen"), Conversations(tmp_path / "chats"), settings)
        for name in "ab"
    ]
    # 27 of en are 0.4 of 67.5, and 0.6 of that are 40 of the 90 of zh; held-out ones all stay.
    kept = Counter(row["domain"] for row in found[0].rows("train"))
    assert kept == {"zh": 40, "en": 27}
    assert sum(1 for _ in found[0].rows("held")) == 13
    assert list(found[0].rows("train")) == list(found[1].rows("train"))
    wrong = ScreenConfig(domain_shares={"zh": 1.0}, threshold=None)
    with pytest.raises(ValueError, match=r"are of \['en', 'zh'\]"):
        screen(job_at(tmp_path / "c", "screen"), Conversations(tmp_path / "chats"), wrong)
    with pytest.raises(ValueError, match="add up to 1"):
        ScreenConfig(domain_shares={"zh": 0.5})


def test_pairs_are_screened_as_conversations_are(tmp_path: Path) -> None:
    long = " ".join(f"word{n}" for n in range(40))
    said = {  # prompt, chosen, rejected
        "leaked": ("Help me.", QUESTIONS["en"], "No."),
        "kept": (long, "It is the first one.", "走开。"),
        "again": (long, "It is the first one.", "走开吧。"),
        "other prompt": ("猫吃什么？", "鱼。", "不知道。"),
        "short": ("狗吃什么？", "骨头。", ""),
    }
    with SplitWriter(tmp_path / "pairs" / "files") as writer:
        for name, (prompt, chosen, rejected) in said.items():
            row = {"id": name, "prompt": [{"role": "user", "content": prompt}], "chosen": chosen}
            writer.write("train", {**row, "rejected": rejected, "margin": None, "domain": "d"})
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"question": QUESTIONS["en"]}) + "\n", "utf-8")
    settings = ScreenPairsConfig(exams=(spec("gsm8k.jsonl"),), least_answer_chars=1)
    source = resolve(settings.exams, artifacts={}, base=tmp_path, ledger=None, hashes=HashCache())
    job = replace(job_at(tmp_path, "screened"), sources={"exams": source})
    found = screen_pairs(job, Preferences(tmp_path / "pairs"), settings)
    assert [row["id"] for row in found.rows("train")] == ["kept", "other prompt"]
    assert job.metrics["reasons"] == {"exam": 1, "repeated": 1, "short_answer": 1}
    assert job.metrics["pairs"] == {"in": 5, "kept": 2}
