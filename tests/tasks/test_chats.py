"""The stage chats: every layout becomes one form, bad rows are counted, questions stay on one side."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zstandard

from conf.chats import ChatsConfig
from conf.settings import SourceSpec
from storage.conversations import Conversations, first_user_turn
from storage.jsonl import SPLITS, split_by_hash
from storage.source import HashCache, resolve
from storage.store import Store
from tasks.chat_formats import RowRefused, parse_chat
from tasks.chats import chats
from tasks.stage import Job

HELLO = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]


def run(folder: Path, settings: ChatsConfig, base: Path) -> tuple[Conversations, Job]:
    specs = settings.sources
    source = resolve(specs, artifacts={}, base=base, ledger=None, hashes=HashCache())
    attempt = folder / f"attempt-{len(list(folder.glob('attempt-*')))}"
    job = Job(
        node="chats",
        stage="chats",
        path=attempt,
        store=Store(folder / "store"),
        sources={"sources": source},
    )
    return chats(job, settings=settings), job


def jsonl(path: Path, *rows: Any) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, "utf-8")
    return path


def alpaca(question: str, answer: str) -> dict[str, str]:
    return {"instruction": question, "input": "", "output": answer}


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        ("list", HELLO),
        ("messages", {"messages": HELLO}),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "你好"},
                    {"from": "gpt", "value": "你好！"},
                ]
            },
        ),
        ("firefly", {"conversation": [{"human": "你好", "assistant": "你好！"}]}),
        ("firefly", {"conversation": [{"user": "你好", "assistant": "你好！"}]}),
        ("list", [{"input": "你好", "output": "你好！"}]),
        (
            "messages",
            {"messages": [{"from": "user", "value": "你好"}, {"from": "gpt", "value": "你好！"}]},
        ),
        ("alpaca", {"instruction": "你好", "context": "", "response": "你好！"}),
        ("firefly_pair", {"kind": "Chat", "input": "你好", "target": "你好！"}),
        (
            "moss",
            {
                "chat": {
                    "turn_1": {
                        "Human": "<|Human|>: 你好<eoh>\n",
                        "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
                        "Commands": "<|Commands|>: None<eoc>\n",
                        "MOSS": "<|MOSS|>: 你好！<eom>\n",
                    }
                }
            },
        ),
        ("alpaca", {"instruction": "你好", "input": "", "output": "你好！"}),
        ("seed_task", {"instruction": "你好", "instances": [{"input": "", "output": "你好！"}]}),
        ("prompt_answer", {"prompt": "你好", "response": "你好！"}),
        ("prompt_answer", {"prompt": HELLO[:1], "completion": "你好！"}),
    ],
)
def test_every_layout_gives_the_same_messages(layout: str, row: Any) -> None:
    parsed = parse_chat(row)
    assert parsed.layout == layout
    assert parsed.messages == HELLO


def test_input_history_and_system_keep_their_place() -> None:
    row = {
        "system": "Be brief.",
        "history": [["Hi", "Hello."]],
        "instruction": "Translate",
        "input": "猫",
        "output": "cat",
    }
    assert [message["content"] for message in parse_chat(row).messages] == [
        "Be brief.",
        "Hi",
        "Hello.",
        "Translate\n猫",
        "cat",
    ]


def test_a_system_message_of_its_own_is_not_doubled() -> None:
    own = {"role": "System", "content": "Be brief."}
    row = {"system": "Be long.", "messages": [own, *HELLO]}
    assert parse_chat(row).messages == [{"role": "system", "content": "Be brief."}, *HELLO]


def test_moss_turns_stand_in_the_order_of_their_numbers() -> None:
    turn = {"Human": "q{}", "MOSS": "a{}", "Commands": "None"}
    chat = {f"turn_{n}": {k: v.format(n) for k, v in turn.items()} for n in (10, 2, 1)}
    contents = [message["content"] for message in parse_chat({"chat": chat}).messages]
    assert contents == ["q1", "a1", "q2", "a2", "q10", "a10"]


def test_a_last_question_without_an_answer_is_left_out() -> None:
    parsed = parse_chat([*HELLO, {"role": "user", "content": "还在吗？"}])
    assert parsed.is_trimmed
    assert parsed.messages == HELLO


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (3, "neither an object nor a list"),
        ([], "no turns"),
        ({"text": "plain"}, "no known layout"),
        ({"messages": HELLO[:1]}, "does not end with a turn of the assistant"),
        ({"messages": HELLO[::-1]}, "turn of the assistant where the user's is due"),
        ({"messages": [HELLO[0], {"role": "assistant", "content": " \n"}]}, "empty turn"),
        ({"messages": [HELLO[0], {"role": "function_call", "content": "{}"}]}, "the role"),
        ({"messages": [HELLO[0], {"role": "assistant", "content": None}]}, "no text"),
        ({"messages": [HELLO[0], {"content": "x"}]}, "neither `role` nor `from`"),
        ({"messages": HELLO, "label": False}, "labelled as bad"),
        ({"messages": HELLO, "tools": "[{}]"}, "uses tools"),
        ({"instruction": "a", "output": "b", "history": [["only"]]}, "`history`"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, HELLO[1]]},
            "more than text",
        ),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_reason(row: Any, reason: str) -> None:
    with pytest.raises(RowRefused, match=reason):
        parse_chat(row)


def test_bad_rows_are_counted_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    good = json.dumps(alpaca("What is 2+2?", "4")).encode()
    path.write_bytes(good + b"\n\n{broken\n" + b'{"messages": []}\n' + b'"\xff"\n')
    spec = SourceSpec(path="mixed.jsonl", domain="math")
    found, job = run(tmp_path, ChatsConfig(sources=(spec,), held_share=0.0), tmp_path)
    assert [row["messages"][1]["content"] for row in found.rows("train")] == ["4"]
    assert (job.metrics["rows"], job.metrics["kept"], job.metrics["refused"]) == (4, 1, 3)
    assert [(row["file"], row["line"]) for row in job.tables["bad_rows"]] == [
        ("mixed.jsonl", 3),
        ("mixed.jsonl", 4),
        ("mixed.jsonl", 5),
    ]
    with pytest.raises(ValueError, match=r"mixed\.jsonl:3: is not JSON"):
        run(tmp_path, ChatsConfig(sources=(spec,), on_bad_row="fail"), tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_character_costs_itself_alone(tmp_path: Path, name: str) -> None:
    # As a program writes it that cuts a text by UTF-16: the second half of an emoji is gone.
    row = '{"instruction": "Hi \\ud83d", "output": "\\ud83d\\ude00!"}'
    deep = "[" * 900 + '"\\ud83d"' + "]" * 900
    (tmp_path / name).write_text(
        f"{row}\n{deep}\n" if name == "a.jsonl" else f"[{row}, {deep}, {{broken]"
    )
    chats, job = run(tmp_path, ChatsConfig(sources=(SourceSpec(path=name),)), tmp_path)
    [told] = [row for split in SPLITS for row in chats.rows(split)]
    assert [message["content"] for message in told["messages"]] == ["Hi \ufffd", "😀!"]
    assert job.metrics["refused"] > 0  # and too deep a row is only refused


def test_one_file_of_every_packing_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [alpaca(f"问题 {n}", f"回答 {n}") for n in range(5)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    array = json.dumps(rows, indent=1).encode()
    packings = {
        "a.jsonl": lines,
        "b.json": array,
        "c.jsonl.gz": gzip.compress(lines),
        "d.json.zst": zstandard.compress(array),
        "e.json": lines,  # some projects call JSON lines .json
        "f.json": json.dumps({"data": rows}).encode(),
    }
    for name, content in packings.items():
        (tmp_path / name).write_bytes(content)
        settings = ChatsConfig(sources=(SourceSpec(path=name),), held_share=0.0)
        found, _ = run(tmp_path, settings, tmp_path)
        assert [row["messages"][0]["content"] for row in found.rows("train")] == [
            f"问题 {n}" for n in range(5)
        ], name


def test_a_json_file_that_is_one_conversation_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "0.json").write_text(json.dumps(HELLO), "utf-8")
    found, job = run(tmp_path, ChatsConfig(sources=(SourceSpec(path="0.json"),)), tmp_path)
    assert job.metrics["layouts"] == {"list": 1}
    assert sum(len(list(found.rows(split))) for split in ("train", "held")) == 1


def test_a_damaged_compressed_file_names_itself(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"prompt": "a", "answer": "b"}\n' * 100)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "cut.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + b"\xff" * 40)
    for name in ("cut.jsonl.gz", "cut.jsonl.zst"):
        with pytest.raises(ValueError, match=f"{name}: cannot be decompressed"):
            run(tmp_path, ChatsConfig(sources=(SourceSpec(path=name),)), tmp_path)


def test_the_same_question_is_on_one_side_whatever_file_it_is_in(tmp_path: Path) -> None:
    questions = [f"What is {n}?" for n in range(300)]
    jsonl(tmp_path / "a.jsonl", *(alpaca(q, "first answer") for q in questions))
    jsonl(tmp_path / "b.jsonl", *(alpaca(f" {q}\n", "second answer") for q in questions))
    settings = ChatsConfig(sources=(SourceSpec(path="*.jsonl"),), held_share=0.2)
    found, job = run(tmp_path, settings, tmp_path)
    sides = {
        split: {first_user_turn(row["messages"]).strip() for row in found.rows(split)}
        for split in ("train", "held")
    }
    assert not sides["train"] & sides["held"]
    assert job.metrics["train"] + job.metrics["held"] == 600
    assert len(sides["held"]) == sum(split_by_hash(q, 0.2) == "held" for q in questions)
    assert 30 <= len(sides["held"]) <= 90  # 60 expected, 4 standard deviations


def test_a_file_that_is_held_out_takes_its_questions_out_of_training(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", alpaca("Q1", "A1"), alpaca("Q2", "A2"))
    jsonl(tmp_path / "exam.jsonl", alpaca("Q2", "the right answer"))
    settings = ChatsConfig(
        sources=(SourceSpec(path="a.jsonl"), SourceSpec(path="exam.jsonl", split="held")),
        held_share=0.0,
    )
    found, job = run(tmp_path, settings, tmp_path)
    assert [row["messages"][0]["content"] for row in found.rows("train")] == ["Q1"]
    assert [row["messages"][1]["content"] for row in found.rows("held")] == ["the right answer"]
    assert job.metrics["held_elsewhere"] == 1


def test_a_file_that_is_for_training_is_taken_whole_and_its_overlap_counted(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", alpaca("Q1", "A1"), alpaca("Q2", "A2"))
    jsonl(tmp_path / "exam.jsonl", alpaca("Q2", "the right answer"))
    settings = ChatsConfig(
        sources=(
            SourceSpec(path="a.jsonl", split="train"),
            SourceSpec(path="exam.jsonl", split="held"),
        )
    )
    found, job = run(tmp_path, settings, tmp_path)
    assert [row["messages"][0]["content"] for row in found.rows("train")] == ["Q1", "Q2"]
    assert job.metrics["held_elsewhere"] == 1


def test_repeated_conversations_are_dropped_and_counted(tmp_path: Path) -> None:
    jsonl(
        tmp_path / "a.jsonl", alpaca("Q", "A"), {"messages": parse_chat(alpaca("Q", "A")).messages}
    )
    settings = ChatsConfig(sources=(SourceSpec(path="a.jsonl"),), held_share=0.0)
    found, job = run(tmp_path, settings, tmp_path)
    assert len(list(found.rows("train"))) == 1
    assert job.metrics["duplicates"] == 1


def test_no_rows_give_two_empty_files(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("", "utf-8")
    found, job = run(tmp_path, ChatsConfig(sources=(SourceSpec(path="none.jsonl"),)), tmp_path)
    assert job.metrics["rows"] == 0
    assert [(found.files / f"{s}.jsonl").read_bytes() for s in ("train", "held")] == [b"", b""]


def test_files_that_hold_no_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", "utf-8")
    with pytest.raises(ValueError, match="text holds no conversations"):
        run(tmp_path, ChatsConfig(sources=(SourceSpec(path="a.txt"),)), tmp_path)


def test_the_same_content_gives_the_same_bytes_under_any_name(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    rows = [alpaca(f"Where is {n}?", f"在 {n} 那里。") for n in range(20)]
    jsonl(tmp_path / "here" / "a.jsonl", *rows)
    jsonl(tmp_path / "there" / "other name.jsonl", *rows)
    outputs: list[list[bytes]] = []
    for folder in ("here", "there"):
        found, _ = run(tmp_path, ChatsConfig(sources=(SourceSpec(path="*"),)), tmp_path / folder)
        outputs.append([path.read_bytes() for path in sorted(found.files.iterdir())])
    assert outputs[0] == outputs[1]


REAL = {
    "alpaca_hikariming/zh_extra.jsonl.zst": ("alpaca", 10282),
    "belle/zh_seed_tasks.jsonl.zst": ("seed_task", 175),
    "firefly/dummy_data.jsonl.zst": ("firefly", 33),
    "llamafactory/alpaca_zh_demo.json.zst": ("alpaca", 1000),
    "medicalgpt/sharegpt_zh_1K_format.jsonl.zst": ("sharegpt", 1000),
    "moss/conversation_without_plugins.jsonl.zst": ("moss", 620),
    "smile_multiturn/first5000.jsonl.zst": ("messages", 5000),
    "llamafactory/glaive_toolcall_zh_demo.json.zst": ("sharegpt", 300),
}


def test_real_sets_are_read_row_for_row(tmp_path: Path, shared_data: Path) -> None:
    """Row counts as the data folder's README states them; each row is kept or counted."""
    specs = tuple(SourceSpec(path=name, domain=name.split("/")[0]) for name in REAL)
    settings = ChatsConfig(sources=specs)
    found, job = run(tmp_path, settings, shared_data / "sft")
    by_file = {row["file"]: row for row in job.tables["files"]}
    for name, (_, rows) in REAL.items():
        counts = by_file[Path(name).name]
        assert counts["rows"] == rows, name
        lost = counts["refused"] + counts["duplicates"]
        assert counts["kept"] + lost == rows, name
    assert set(job.metrics["layouts"]) == {layout for layout, _ in REAL.values()}
    # Tool calls are refused: the chat form has no roles for them.
    assert by_file["glaive_toolcall_zh_demo.json.zst"]["kept"] == 0
    assert job.metrics["kept"] > 16_000
    everything = [row for split in ("train", "held") for row in found.rows(split)]
    for row in everything:
        roles = [m["role"] for m in row["messages"] if m["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(m["content"].strip() for m in row["messages"])
    languages = Counter(row["language"] for row in everything)
    assert languages["zh"] > 0.8 * len(everything)
    moss = next(row for row in everything if row["domain"] == "moss")
    assert moss["messages"][0]["role"] == "system"
    assert not any("<eo" in m["content"] for m in moss["messages"])


ALL_ROWS = {
    "alpaca_en.jsonl.zst": 52_002, "alpaca_zh.jsonl.zst": 17_476, "zh_extra.jsonl.zst": 10_282,
    "zh_seed_tasks.jsonl.zst": 175, "dummy_data.jsonl.zst": 33, "alpaca_en_demo.json.zst": 999,
    "alpaca_zh_demo.json.zst": 1000, "identity.json.zst": 91, "glaive_toolcall_en_demo.json.zst": 300,
    "glaive_toolcall_zh_demo.json.zst": 300, "Belle_open_source_1k.jsonl.zst": 1000,
    "glaive_toolcall_zh_demo.jsonl.zst": 300, "medical_sft_1K_format.jsonl.zst": 1000,
    "sharegpt_zh_1K_format.jsonl.zst": 1000, "conversation_without_plugins.jsonl.zst": 620,
    "first5000.jsonl.zst": 5000,
}  # fmt: skip


@pytest.mark.soak
def test_every_file_of_conversations_has_every_row_accounted_for(
    tmp_path: Path, shared_data: Path
) -> None:
    settings = ChatsConfig(sources=(SourceSpec(path="*/*.zst"),))
    _, job = run(tmp_path, settings, shared_data / "sft")
    found = {Path(row["file"]).name: row for row in job.tables["files"]}
    assert {name: counts["rows"] for name, counts in found.items()} == ALL_ROWS
    for name, counts in found.items():
        assert counts["kept"] + counts["refused"] + counts["duplicates"] == counts["rows"], name
    assert sum(job.metrics["reasons"].values()) == job.metrics["refused"]
