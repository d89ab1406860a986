"""The stage pairs, reading files: every layout becomes prompt, chosen, rejected."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.dpo import DpoConfig
from conf.pairs import PairsConfig
from conf.settings import SourceSpec
from storage.checkpoint import Policy
from storage.jsonl import split_by_hash
from storage.preferences import Preferences
from storage.record import Record
from storage.source import HashCache, resolve
from storage.store import Store
from tasks.chat_formats import RowRefused
from tasks.dpo import _reference_record
from tasks.pairs import pairs, similarity
from tasks.preference_formats import parse_pairs
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
    [pair] = parse_pairs(row)
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
    assert parse_pairs(row)[0].prompt == [
        turn("system", "Be brief."),
        turn("user", "Hi"),
        turn("assistant", "Hello."),
        turn("user", "Q"),
    ]


SYSTEM = turn("system", "答得简短。")


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": ASKED, "chosen": "鱼。", "rejected": "不知道。"},
        {"prompt": ASKED, "chosen": "鱼。", "rejected": "不知道。"},
        {
            "chosen": [*ASKED, turn("assistant", "鱼。")],
            "rejected": [*ASKED, turn("assistant", "不知道。")],
        },
        {"messages": ASKED, "responses": ["不知道。", "鱼。"], "scores": [1, 2]},
        {"conversations": [SYSTEM, *ASKED], "chosen": "鱼。", "rejected": "不知道。"},
    ],
)
def test_a_system_message_beside_the_prompt_opens_it(row: dict[str, Any]) -> None:
    [pair] = parse_pairs({"system": SYSTEM["content"], **row})
    assert (pair.prompt, pair.chosen, pair.rejected) == ([SYSTEM, *ASKED], "鱼。", "不知道。")


def test_the_margin_is_the_difference_of_the_scores() -> None:
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 8.5, "score_rejected": 6}
    assert parse_pairs(row)[0].margin == 2.5


SEVERAL: dict[str, dict[str, Any]] = {
    "scores beside": {"responses": ["差", "好", "中"], "scores": [1, 4.5, 3]},
    "ranks beside": {"answers": ["差", "好", "中"], "ranks": [3, 1, 2]},
    "scores inside": {
        "completions": [
            {"response": "差", "overall_score": 1},
            {"response": "好", "overall_score": 4.5},
            {"response": "中", "overall_score": 3},
        ]
    },
    "ranks inside": {
        "candidates": [{"text": t, "rank": r} for t, r in (("差", 3), ("好", 1), ("中", 2))]
    },
    "in order": {"ranked": ["好", "中", "差"]},
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_rated_answers_make_pairs(name: str) -> None:
    row = {"prompt": "猫吃什么？", **SEVERAL[name]}
    is_scored = "scores" in name
    [pair] = parse_pairs(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == (ASKED, "好", "差")
    assert pair.margin == (3.5 if is_scored else 2.0)
    pairs = parse_pairs(row, "all_pairs")
    assert [(p.chosen, p.rejected) for p in pairs] == [("好", "中"), ("好", "差"), ("中", "差")]
    assert [p.margin for p in pairs] == ([1.5, 3.5, 2.0] if is_scored else [1.0, 2.0, 1.0])


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "猫吃什么？", "completion": "鱼。"},
        {"prompt": ASKED, "completion": [turn("assistant", "鱼。")]},
        {"messages": [*ASKED, turn("assistant", "鱼。")]},
    ],
)
def test_a_single_answer_with_a_label_is_good_or_bad_by_itself(
    row: dict[str, Any], label: bool
) -> None:
    labelled = {**row, "label": label}
    with pytest.raises(RowRefused, match="one answer with a label"):
        parse_pairs(labelled)
    [pair] = parse_pairs(labelled, keeps_labelled=True)
    assert (pair.layout, pair.prompt) == ("labelled", ASKED)
    assert (pair.chosen, pair.rejected) == (("鱼。", None) if label else (None, "鱼。"))


def test_what_the_reference_says_of_single_answers_is_not_what_other_losses_ask(
    tmp_path: Path,
) -> None:
    record = Record(fingerprint="a", kind="policy", stage="test", digest="d", identity={})
    (tmp_path / "record.json").write_text(record.model_dump_json(), "utf-8")
    job = Job(node="dpo", stage="dpo", path=tmp_path, store=Store(tmp_path / "store"))
    of = {
        loss: _reference_record(
            job, Policy(tmp_path), Preferences(tmp_path), DpoConfig(loss=loss)
        ).fingerprint
        for loss in ("sigmoid", "ipo", "kto")
    }
    assert of["sigmoid"] == of["ipo"] != of["kto"]


def test_single_answers_stand_beside_pairs_where_they_are_kept(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "completion": "good", "label": True},
        {"prompt": "Q", "completion": "bad", "label": False},
        {"prompt": "Q", "chosen": "good", "rejected": "not good"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows), "utf-8")
    settings = PairsConfig(
        sources=(SourceSpec(path="a.json", split="train"),), labelled="keep", max_similarity=0.9
    )
    found, job = run(tmp_path, settings, tmp_path)
    sides = [(row["chosen"], row["rejected"]) for row in found.rows("train")]
    assert sides == [("good", None), (None, "bad"), ("good", "not good")]
    assert job.metrics["layouts"] == {"labelled": 2, "prompt_text": 1}
    assert job.metrics["rejected_chars"] == 8  # of pairs alone


def test_answers_of_equal_score_are_no_pair() -> None:
    row = {"prompt": "Q", "responses": ["a", "b", "c"], "scores": [2, 2, 1]}
    pairs = [(p.chosen, p.rejected) for p in parse_pairs(row, "all_pairs")]
    assert pairs == [("a", "c"), ("b", "c")]
    with pytest.raises(RowRefused, match="no two answers of which one is better"):
        parse_pairs({**row, "scores": [2, 2, 2]})


def test_scaled_margins_are_shares_of_the_files_range(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q1", "responses": ["a", "b"], "scores": [10, 5]},
        {"prompt": "Q2", "chosen": "a", "rejected": "b", "score_chosen": 4, "score_rejected": 2},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    specs = (SourceSpec(path="a.jsonl"),)
    found, _ = run(tmp_path, PairsConfig(sources=specs, held_share=0.0, margins="scaled"), tmp_path)
    # The scores go from 2 to 10.
    assert [row["margin"] for row in found.rows("train")] == [5 / 8, 2 / 8]


def test_answers_that_say_almost_the_same_are_dropped_and_length_bias_is_told(
    tmp_path: Path,
) -> None:
    rows = [
        {"prompt": "Q1", "chosen": "猫吃鱼和米饭。", "rejected": "猫吃鱼和米饭"},
        {"prompt": "Q2", "chosen": "A long and patient answer.", "rejected": "No!"},
        {"prompt": "Q3", "chosen": "Yes.", "rejected": "Maybe."},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    specs = (SourceSpec(path="a.jsonl"),)
    settings = PairsConfig(sources=specs, held_share=0.0, max_similarity=0.7)
    found, job = run(tmp_path, settings, tmp_path)
    assert [row["prompt"][0]["content"] for row in found.rows("train")] == ["Q2", "Q3"]
    assert {k: job.metrics[k] for k in ("near_equal", "chosen_longer_share", "chosen_chars")} == {
        "near_equal": 1, "chosen_longer_share": 0.5, "chosen_chars": 15.0,
    }  # fmt: skip
    # 猫吃鱼 吃鱼和 鱼和米 和米饭, and 米饭。 of the first alone.
    assert similarity("猫吃鱼和米饭。", "猫吃鱼 和米饭") == 4 / 5


def test_tables_with_and_without_names_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected\nQ,"yes,\nsure",no\n', "utf-8")
    (tmp_path / "b.tsv").write_text("很好的苹果\t不好\n也好\t差\n", "utf-8")
    specs = (SourceSpec(path="a.csv"), SourceSpec(path="b.tsv"))
    found, job = run(tmp_path, PairsConfig(sources=specs, held_share=0.0), tmp_path)
    assert [row["chosen"] for row in found.rows("train")] == ["yes,\nsure"]
    assert job.metrics["reasons"] == {"is no object": 2}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"responses": ["a", "b"], "scores": [1, 2]}, "without a prompt"),
        ({"prompt": "Q", "responses": ["a", "b"]}, "nothing that says which is better"),
        ({"prompt": "Q", "responses": ["a", "b"], "scores": [1]}, "nothing that says which"),
        ({"prompt": "Q", "responses": ["a", 3], "scores": [1, 2]}, "not text"),
        ({"messages": ASKED, "label": True}, "one answer with a label"),
        ([1], "no object"),
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
        parse_pairs(row)


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


@pytest.mark.parametrize("held_by", ["question", "pair"])
def test_many_pairs_of_one_question_can_be_held_out_in_part(held_by: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "猫吃什么？", "chosen": f"{n} 鱼", "rejected": f"{n}"} for n in range(400)]
    (tmp_path / "a.json").write_text(json.dumps(rows), "utf-8")
    settings = PairsConfig(sources=(SourceSpec(path="a.json"),), held_share=0.25, held_by=held_by)
    found, job = run(tmp_path, settings, tmp_path)
    counts = (job.metrics["train"], job.metrics["held"])
    if held_by == "question":
        assert sorted(counts) == [0, 400]
        return
    # 400 coins of 1/4: 100, 9 to a deviation.
    assert sum(counts) == 400
    assert abs(counts[1] - 100) < 4 * 9
    assert {row["id"] for row in found.rows("held")}.isdisjoint(
        row["id"] for row in found.rows("train")
    )


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


REAL: dict[str, tuple[int, float]] = {
    "medicalgpt/dpo_zh_500.jsonl.zst": (500, 0.85),
    "medicalgpt/reward_test.jsonl.zst": (100, 0.85),
    "llamafactory/dpo_zh_demo.json.zst": (300, 0.85),
    "llamafactory/dpo_en_demo.json.zst": (300, 0.85),
    "firefly/dummy_dpo.jsonl.zst": (16, 0.85),
    "zh_sentiment_rank/sentiment_comments.jsonl.zst": (1000, 0.85),
    # Tool calls, single answers with a label, and ranked answers without a prompt are no pairs.
    "medicalgpt/toolcall_dpo_zh_demo.jsonl.zst": (11, 0.0),
    "llamafactory/kto_en_demo.json.zst": (300, 0.0),
    "zh_sentiment_rank/dev.tsv.zst": (3082, 0.0),
}


def test_real_sets_are_read_row_for_row(tmp_path: Path, shared_data: Path) -> None:
    """Row counts as the data folder's README states them; each row is kept or counted, with its reason."""
    there = {
        str(p.relative_to(shared_data / "preference")) for p in shared_data.glob("preference/*/*")
    }
    assert there == set(REAL)
    settings = PairsConfig(sources=tuple(SourceSpec(path=name) for name in REAL), held_share=0.1)
    found, job = run(tmp_path, settings, shared_data / "preference")
    by_file = {row["file"]: row for row in job.tables["files"]}
    for name, (rows, least_kept) in REAL.items():
        counts = by_file[Path(name).name]
        assert counts["rows"] == rows
        assert counts["kept"] + counts["refused"] + counts["duplicates"] == rows
        assert counts["kept"] >= least_kept * rows, name
    assert sum(job.metrics["reasons"].values()) == job.metrics["refused"]
    for split in ("train", "held"):
        for row in found.rows(split):
            assert row["prompt"][-1]["role"] == "user"
            first = next(m["content"] for m in row["prompt"] if m["role"] == "user")
            assert split_by_hash(first, 0.1) == split


def test_real_single_answers_with_labels_are_read_row_for_row(
    tmp_path: Path, shared_data: Path
) -> None:
    source = SourceSpec(path="llamafactory/kto_en_demo.json.zst", split="train")
    settings = PairsConfig(sources=(source,), labelled="keep")
    found, _ = run(tmp_path, settings, shared_data / "preference")
    sides = [(row["chosen"] is None, row["rejected"] is None) for row in found.rows("train")]
    assert sorted(sides) == [(False, True)] * 150 + [(True, False)] * 150
