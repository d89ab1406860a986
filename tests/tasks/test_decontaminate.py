"""Decontaminate: planted leaks go, texts that merely speak of the same things stay."""

import json
import random
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from conf.decontaminate import DecontaminateConfig
from conf.extract import ExtractConfig
from tasks.decontaminate import decontaminate
from tasks.extract import extract
from tests.tasks.corpus_runs import reasons, run_stage, spec, texts

QUESTION = {
    "en": "Which of the following animals is known to live in the cold cave behind the old mill?",
    "zh": "在下列动物当中，哪一种住在老磨坊后面的寒冷山洞里？",
}
SHORT = {"en": "Who painted the northern lights first?", "zh": "是谁最先画下了北方的极光？"}
OPTIONS = {"A": "fox", "B": "狼", "C": "duck", "D": "马"}
SOUND = [
    "The animals in the cave behind the mill are known to us: the fox lives there in the cold.",
    "老磨坊后面有一个山洞，狐狸住在里面。冬天很冷，动物都不出来。",
    "Who painted the house first? The northern lights were green.",
    "下列说法正确的是：狐狸住在山洞里。",
]


def exams(root: Path) -> tuple[Any, ...]:
    rows = [f"{n},{q},{','.join(OPTIONS.values())},A" for n, q in enumerate(QUESTION.values())]
    generic = [f"{n},下列说法正确的是____。,甲{n},乙,丙,丁,A" for n in (7, 8)]
    (root / "cave_val.csv").write_text(
        "\n".join(["id,question,A,B,C,D,answer", *rows, *generic]), "utf-8"
    )
    (root / "short.jsonl").write_text(
        "".join(json.dumps({"question": q}) + "\n" for q in SHORT.values()), "utf-8"
    )
    return spec("cave_val.csv"), spec("short.jsonl")


def run(root: Path, documents: list[str], **fields: Any) -> Any:
    (root / "docs.jsonl").write_text(
        "".join(json.dumps({"text": d}) + "\n" for d in documents), "utf-8"
    )
    corpus = run_stage(
        extract, ExtractConfig(sources=(spec("docs.jsonl"),), languages=()), {}, root
    )
    settings = DecontaminateConfig(**{"exams": exams(root), **fields})
    return run_stage(decontaminate, settings, {"corpus": corpus.artifact}, root)


def test_leaks_go_and_neighbours_stay(tmp_path: Path) -> None:
    leaks = [
        f"Some notes. {QUESTION['en']} I do not know.",
        f"{QUESTION['zh']}\nA. fox\nB. 狼\nC. duck\nD. 马\n答案：A",
        f"有人问：{QUESTION['zh']}",
        QUESTION["en"].upper().replace(" ", "\n"),
        f"Quiz: {SHORT['en']} Nobody knows.",
        f"问题：{SHORT['zh']}没有人知道。",
        QUESTION["en"].translate({c: c + 0xFEE0 for c in range(0x21, 0x7F)}),  # full-width
    ]
    outcome = run(tmp_path, [*SOUND, *leaks])
    assert texts(outcome.artifact) == SOUND
    dropped = dict(reasons(outcome.artifact))
    assert dropped[leaks[0]] == dropped[leaks[1]] == "exam:cave_val.csv"
    assert dropped[leaks[4]] == dropped[leaks[5]] == "exam:short.jsonl"
    metrics = outcome.record.metrics
    assert (metrics["documents"], metrics["overlapping"]) == (11, 7)
    assert metrics["exams"]["cave_val.csv"]["documents"] == 5
    assert metrics["exams"]["short.jsonl"] == {
        "questions": 2, "ngrams": 0, "whole": 2, "ignored": 0, "documents": 2,
    }  # fmt: skip


def test_thirteen_words_in_a_row_are_a_leak_and_twelve_are_none(tmp_path: Path) -> None:
    words = QUESTION["en"].split()
    outcome = run(tmp_path, [" ".join(words[2:14]) + " stop", " ".join(words[2:15]) + " stop"])
    assert [text for text, _ in reasons(outcome.artifact)] == [" ".join(words[2:15]) + " stop"]
    han = QUESTION["zh"].replace("，", "")
    outcome = run(tmp_path, [han[3:15] + "。我知道。", han[3:16] + "。我知道。"])
    assert [text for text, _ in reasons(outcome.artifact)] == [han[3:16] + "。我知道。"]


def test_everyday_phrases_are_no_leak_by_themselves(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text(
        '{"question": "What is it?"}\n{"question": "下列说法正确的是"}\n', "utf-8"
    )
    outcome = run(tmp_path, ["What is it? 下列说法正确的是甲。"], exams=(spec("e.jsonl"),))
    assert len(texts(outcome.artifact)) == 1
    assert outcome.record.metrics["ignored_questions"] == 2


def test_cut_takes_the_passage_and_its_margin_only(tmp_path: Path) -> None:
    for language, filler in (("en", "Nothing here. " * 40), ("zh", "这里什么也没有。" * 60)):
        text = f"{filler}{QUESTION[language]}{filler}".strip()
        outcome = run(tmp_path, [text, SOUND[0]], action="cut", cut_margin_chars=20)
        [cut, sound] = texts(outcome.artifact)
        assert sound == SOUND[0]
        start = text.index(QUESTION[language])
        assert cut.startswith(text[: start - 25])
        assert QUESTION[language][:10] not in cut
        assert len(text) - len(cut) <= len(QUESTION[language]) + 45


def test_no_exams_no_documents_and_poison(tmp_path: Path) -> None:
    assert texts(run(tmp_path, SOUND, exams=()).artifact) == SOUND
    assert texts(run(tmp_path, []).artifact) == []
    poison = ["猫" * 100_000, "\n".join("-" * 50), "a " * 50_000]
    assert texts(run(tmp_path, poison).artifact) == [text.strip() for text in poison]


@pytest.mark.parametrize("row", ["{broken", '["x", "A"]'])
def test_a_bad_exam_row_is_an_error_that_names_the_place(tmp_path: Path, row: str) -> None:
    (tmp_path / "e.jsonl").write_text(f'{{"question": "x"}}\n{row}\n', "utf-8")
    with pytest.raises(ValueError, match=r"e\.jsonl:2"):
        run(tmp_path, SOUND, exams=(spec("e.jsonl"),))


def test_twice_gives_the_same_bytes_and_new_exams_look_again(tmp_path: Path) -> None:
    first = run(tmp_path, SOUND)
    assert run(tmp_path, SOUND).status == "hit"
    other = run(tmp_path, SOUND, exams=exams(tmp_path)[:1])
    assert other.record.metrics["shards"] == {"built": 1, "reused": 0}
    assert other.record.digest == first.record.digest


def test_real_exams_have_few_hits_in_real_text(shared_data: Path, tmp_path: Path) -> None:
    corpus = run_stage(
        extract,
        ExtractConfig(sources=(spec(shared_data / "pretrain/zh_csl_abstracts/*.zst"),)),
        {},
        tmp_path,
    )
    settings = DecontaminateConfig(exams=(spec(shared_data / "eval/ceval/*/*.csv"),))
    outcome = run_stage(decontaminate, settings, {"corpus": corpus.artifact}, tmp_path)
    metrics = outcome.record.metrics
    assert metrics["questions"] > 10_000
    # Of 3,987 abstracts; the 8 found quote the same official names and slogans.
    assert metrics["overlapping"] <= 10


def test_every_hit_is_in_a_file(tmp_path: Path) -> None:
    leak = f"问：{QUESTION['zh']}答。"
    outcome = run(tmp_path, [SOUND[0], leak])
    hits = pl.read_parquet(outcome.artifact.files / "exam_hits.parquet")
    words = re.findall(r"[\u4e00-\u9fff]", QUESTION["zh"])
    assert hits.height == len(words) - 12  # runs of 13 words
    assert set(hits.select("shard", "row", "exam", "question").rows()) == {
        (0, 1, "cave_val.csv", QUESTION["zh"])
    }
    first = hits.row(0, named=True)
    assert leak.encode()[first["start"] : first["end"]].decode().strip("：") == QUESTION["zh"][:14]


def test_layouts_of_the_usual_exams_are_read(tmp_path: Path) -> None:
    question = "A farmer has 17 sheep in one field and 25 goats in another field; how many animals are there"
    han = "农夫在一块地里有十七只绵羊，在另一块地里有二十五只山羊，一共有多少只动物"
    files = {
        "ceval.csv": f"id,question,A,B,C,D,answer\n0,{han},1,2,3,42,D\n",
        "cmmlu.csv": f",Question,A,B,C,D,Answer\n0,{han},1,2,3,42,D\n",
        "mmlu.csv": f"{question},1,2,3,42,D\n",
        "gsm8k.jsonl": json.dumps({"question": question + "?", "answer": "17+25=42 #### 42"})
        + "\n",
        "own.txt": f"{question}\n{han}\n",
    }
    texts_ = [*SOUND, f"So: {question}. Well.", f"题目：{han}。"]
    for name, content in files.items():
        (tmp_path / name).write_text(content, "utf-8")
        outcome = run(tmp_path, texts_, exams=(spec(name),))
        gone = [text for text, _ in reasons(outcome.artifact)]
        expected = {"ceval": 1, "cmmlu": 1, "mmlu": 1, "gsm8k": 1, "own": 2}[name.split(".")[0]]
        assert len(gone) == expected, name
        assert not set(gone) & set(SOUND)


def test_held_out_documents_that_training_documents_hold_are_dropped(tmp_path: Path) -> None:
    pick = random.Random(5)

    def words(count: int) -> list[str]:
        if pick.random() < 0.5:
            return [f"w{pick.randrange(3000)} " for _ in range(count)]
        return [chr(pick.randrange(0x4E00, 0x5E00)) for _ in range(count)]

    made = [words(pick.randrange(5, 60)) for _ in range(150)]
    held = [words(20) + pick.choice(made)[: pick.randrange(60)] for _ in range(40)]
    (tmp_path / "held.jsonl").write_text(
        "".join(json.dumps({"text": "".join(d).strip()}) + "\n" for d in held), "utf-8"
    )
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"text": "".join(d).strip()}) + "\n" for d in made), "utf-8"
    )
    sources = (spec("train.jsonl", split="train"), spec("held.jsonl", split="held"))
    corpus = run_stage(extract, ExtractConfig(sources=sources, languages=()), {}, tmp_path).artifact
    settings = DecontaminateConfig(ngram_words=8, held_overlap=0.3)
    outcome = run_stage(decontaminate, settings, {"corpus": corpus}, tmp_path)

    def runs(text: str) -> set[tuple[str, ...]]:
        tokens = re.findall(r"[\u4e00-\u9fff]|[a-z0-9]+", text)
        return {tuple(tokens[i : i + 8]) for i in range(len(tokens) - 7)}

    documents = list(corpus.documents())
    train = [document for document in documents if document["split"] == "train"]
    known = {run_ for document in train for run_ in runs(document["text"])}
    shares = {
        document["text"]: len(own & known) / len(own)
        for document in documents
        if document["split"] == "held" and (own := runs(document["text"]))
    }
    expected = {text: share for text, share in shares.items() if share >= 0.3}
    assert 5 < len(expected) < 35
    assert dict(reasons(outcome.artifact)) == dict.fromkeys(expected, "held_out:in_training")
    hits = pl.read_parquet(outcome.artifact.files / "held_hits.parquet")
    places = {(d["shard"], d["row"]): d["text"] for d in documents}
    for hit in hits.iter_rows(named=True):
        text = places[hit["shard"], hit["row"]]
        assert hit["share"] == pytest.approx(expected[text])
        assert runs(text) & runs(places[hit["of_shard"], hit["of_row"]])
    metrics = outcome.record.metrics
    assert metrics["held"]["documents"] == 40
    assert metrics["held"]["dropped"] == len(expected) == hits.height
    assert metrics["kept"] == len(documents) - len(expected)
