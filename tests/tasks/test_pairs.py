"""The stage pairs, reading files: every layout becomes prompt, chosen, rejected."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.pairs import PairsConfig
from conf.settings import SourceSpec
from storage.jsonl import split_by_hash
from storage.preferences import Preferences
from storage.source import HashCache, resolve
from storage.store import Store
from tasks.chat_formats import RowRefused
from tasks.pairs import pairs
from tasks.preference_formats import parse_pair
from tasks.stage import Job

ASKED = [{"role": "user", "content": "猫吃什么？"}]


def run(folder: Path, settings: PairsConfig, base: Path) -> tuple[Preferences, Job]:
    source = resolve(settings.sources, artifacts={}, base=base, ledger=None, hashes=HashCache())
    attempt = folder / f"attempt-{len(list(folder.glob('attempt-*')))}"
    job = Job(
        node="pairs",
        stage="pairs",
        path=attempt,
        store=Store(folder / "store"),
        sources={"sources": source},
    )
    return pairs(job, settings=settings), job


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        ("prompt_text", {"prompt": "猫吃什么？", "chosen": "鱼。", "rejected": "不知道。"}),
        ("prompt_text", {"prompt": "猫吃什么？", "selected": "鱼。", "rejected": "不知道。"}),
        ("prompt_text", {"query": "猫吃什么？", "chosen": "鱼。", "rejected": "不知道。"}),
        (
            "prompt_text",
            {
                "system": "",
                "history": [],
                "question": "猫吃什么？",
                "response_chosen": "鱼。",
                "response_rejected": "不知道。",
            },
        ),
        ("prompt_messages", {"prompt": ASKED, "chosen": "鱼。", "rejected": "不知道。"}),
        (
            "messages",
            {
                "prompt": "猫吃什么？",
                "chosen": [*ASKED, turn("assistant", "鱼。")],
                "rejected": [*ASKED, turn("assistant", "不知道。")],
            },
        ),
        (
            "messages",
            {
                "prompt": ASKED,
                "chosen": [turn("assistant", "鱼。")],
                "rejected": [turn("assistant", "不知道。")],
            },
        ),
        (
            "sharegpt",
            {
                "conversations": [{"from": "human", "value": "猫吃什么？"}],
                "chosen": {"from": "gpt", "value": "鱼。"},
                "rejected": {"from": "gpt", "value": "不知道。"},
            },
        ),
        (
            "sharegpt",
            {
                "conversations": [{"from": "human", "value": "猫吃什么？"}],
                "chosen": "鱼。",
                "rejected": "不知道。",
            },
        ),
        (
            "transcript",
            {
                "chosen": "\n\nHuman: 猫吃什么？\n\nAssistant: 鱼。",
                "rejected": "\n\nHuman: 猫吃什么？\n\nAssistant: 不知道。",
            },
        ),
    ],
)
def test_every_layout_gives_the_same_pair(layout: str, row: Any) -> None:
    pair = parse_pair(row)
    assert pair.layout == layout
    assert (pair.prompt, pair.chosen, pair.rejected) == (ASKED, "鱼。", "不知道。")
    assert pair.margin is None


def test_system_and_history_come_before_the_question() -> None:
    row = {
        "system": "Be brief.",
        "history": [["Hi", "Hello."]],
        "question": "Q",
        "response_chosen": "yes",
        "response_rejected": "no",
    }
    assert parse_pair(row).prompt == [
        turn("system", "Be brief."),
        turn("user", "Hi"),
        turn("assistant", "Hello."),
        turn("user", "Q"),
    ]


def test_the_margin_is_the_difference_of_the_scores() -> None:
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 8.5, "score_rejected": 6}
    assert parse_pair(row).margin == 2.5


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "not an object"),
        ({"prompt": "Q", "chosen": "a"}, "no known layout"),
        ({"chosen": "a", "rejected": "b"}, "no known layout"),
        ({"prompt": "Q", "chosen": "same", "rejected": " same\n"}, "equal answers"),
        ({"prompt": "Q", "chosen": "a", "rejected": " "}, "empty answer"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty turn of the user"),
        ({"prompt": "Q", "chosen": "a", "rejected": 3}, "not text"),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "tools": "[1]"}, "uses tools"),
        (
            {
                "chosen": [turn("user", "Q1"), turn("assistant", "a")],
                "rejected": [turn("user", "Q2"), turn("assistant", "b")],
            },
            "two different prompts",
        ),
    ],
)
def test_what_is_no_pair_is_refused_with_its_reason(row: Any, reason: str) -> None:
    with pytest.raises(RowRefused, match=reason):
        parse_pair(row)


def test_bad_rows_are_counted_and_equal_bytes_come_out_twice(tmp_path: Path) -> None:
    row = {"prompt": "Q", "chosen": "好的", "rejected": "不"}
    lines = [json.dumps(row), "not json", json.dumps(row), json.dumps({"prompt": "Q"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
    settings = PairsConfig(sources=(SourceSpec(path="a.jsonl", domain="d"),), held_share=0.0)
    found, job = run(tmp_path, settings, tmp_path)
    again, _ = run(tmp_path, settings, tmp_path)
    [kept] = found.rows("train")
    assert (kept["chosen"], kept["rejected"], kept["domain"]) == ("好的", "不", "d")
    assert {k: job.metrics[k] for k in ("rows", "kept", "refused", "duplicates")} == {
        "rows": 4,
        "kept": 1,
        "refused": 2,
        "duplicates": 1,
    }
    assert (found.files / "train.jsonl").read_bytes() == (again.files / "train.jsonl").read_bytes()


def test_empty_files_give_an_empty_artifact(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]", "utf-8")
    found, job = run(tmp_path, PairsConfig(sources=(SourceSpec(path="a.json"),)), tmp_path)
    assert job.metrics["rows"] == 0
    assert not list(found.rows("train"))
    assert not list(found.rows("held"))


def test_pairs_without_anything_to_read_say_what_to_name(tmp_path: Path) -> None:
    job = Job(node="pairs", stage="pairs", path=tmp_path, store=Store(tmp_path / "store"))
    with pytest.raises(ValueError, match="set `sources`"):
        pairs(job, settings=PairsConfig())


REAL = {
    "medicalgpt/dpo_zh_500.jsonl.zst": 500,
    "medicalgpt/reward_test.jsonl.zst": 100,
    "llamafactory/dpo_zh_demo.json.zst": 300,
    "llamafactory/dpo_en_demo.json.zst": 300,
    "firefly/dummy_dpo.jsonl.zst": 16,
    "zh_sentiment_rank/sentiment_comments.jsonl.zst": 1000,
}


def test_real_sets_are_read_row_for_row(tmp_path: Path, shared_data: Path) -> None:
    """Row counts as the data folder's README states them; each row is kept or counted."""
    settings = PairsConfig(sources=tuple(SourceSpec(path=name) for name in REAL), held_share=0.1)
    found, job = run(tmp_path, settings, shared_data / "preference")
    by_file = {row["file"]: row for row in job.tables["files"]}
    for name, rows in REAL.items():
        counts = by_file[Path(name).name]
        assert counts["rows"] == rows
        assert counts["kept"] + counts["refused"] + counts["duplicates"] == rows
        assert counts["kept"] >= 0.85 * rows, name
    for split in ("train", "held"):
        for row in found.rows(split):
            assert row["prompt"][-1]["role"] == "user"
            first = next(m["content"] for m in row["prompt"] if m["role"] == "user")
            assert split_by_hash(first, 0.1) == split
