"""screen: no exam question and no repeated conversation is trained on."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from conf.screen import ScreenConfig
from storage.conversations import Conversations
from storage.jsonl import Split, SplitWriter, content_id
from storage.source import HashCache, resolve
from tasks.screen import screen
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
