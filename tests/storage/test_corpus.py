"""A corpus: text written once, keep bits that only ever drop more, spans that are cut."""

from pathlib import Path

import polars as pl
import pytest
import xxhash

from storage.corpus import (
    Corpus,
    ShardWriter,
    document_of,
    joined_spans,
    split_of,
    without_spans,
)
from tests.storage.corpora import corpus_of


def decisions(keep: list[bool], reason: list[str | None]) -> pl.DataFrame:
    return pl.DataFrame({"keep": keep, "reason": reason}, schema_overrides={"reason": pl.String})


def test_documents_come_back_in_order_with_their_place(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [["一只猫。", "a dog"], ["third\n"]])
    rows = [(d["shard"], d["row"], d["text"], d["n_chars"]) for d in corpus.documents()]
    assert rows == [(0, 0, "一只猫。", 4), (0, 1, "a dog", 5), (1, 0, "third\n", 6)]
    assert [shard.keep for shard in corpus.shards] == [None, None]


def test_text_hash_is_xxh3_of_the_utf8_text() -> None:
    row = document_of("猫", source="s")
    assert row["text_hash"] == xxhash.xxh3_64_intdigest("猫".encode())


def test_the_split_is_the_sources_or_a_share_of_the_ids() -> None:
    assert document_of("x", source="s", split="held")["split"] == "held"
    held = sum(split_of(i, 0.02) == "held" for i in range(100_000))
    # binomial: 2000 with a standard deviation of 44
    assert abs(held - 2000) < 5 * 44


def test_a_derived_corpus_drops_more_and_says_only_its_own_reasons(tmp_path: Path) -> None:
    first = corpus_of(tmp_path, [["a", "b", "c"], ["d"]])
    Corpus.write(
        tmp_path / "filtered" / "files",
        first,
        [decisions([True, False, True], [None, "short", None]), decisions([True], [None])],
        "filter",
    )
    second = Corpus(tmp_path / "filtered")
    Corpus.write(
        tmp_path / "deduped" / "files",
        second,
        [
            decisions([False, False, True], ["copy", "copy", None]),
            decisions([True], [None]),
        ],
        "dedup",
    )
    third = Corpus(tmp_path / "deduped")
    assert [d["text"] for d in third.documents()] == ["c", "d"]
    assert [(d["text"], d["reason"]) for d in third.dropped()] == [("a", "copy")]
    assert [(d["text"], d["reason"]) for d in second.dropped(limit=5)] == [("b", "short")]
    assert list(second.dropped(limit=0)) == []
    assert third.stage == "dedup"
    assert third.shards[0].keep.to_list() == [False, False, True]  # type: ignore[union-attr]
    assert [frame.height for frame in third.scan(["text"], kept_only=False)] == [3, 1]


def test_cuts_add_up_and_are_taken_out_of_the_text(tmp_path: Path) -> None:
    first = corpus_of(tmp_path, [["0123456789", "猫狗鸟马"]])
    cuts = decisions([True, True], [None, None]).with_columns(
        cuts=pl.Series([[{"start": 2, "end": 4}], []])
    )
    Corpus.write(tmp_path / "b" / "files", first, [cuts], "decontaminate")
    more = decisions([True, True], [None, None]).with_columns(
        cuts=pl.Series([[{"start": 3, "end": 6}], [{"start": 0, "end": 1}]])
    )
    Corpus.write(tmp_path / "c" / "files", Corpus(tmp_path / "b"), [more], "decontaminate")
    assert [d["text"] for d in Corpus(tmp_path / "b").documents()] == ["01456789", "猫狗鸟马"]
    assert [d["text"] for d in Corpus(tmp_path / "c").documents()] == ["016789", "狗鸟马"]
    uncut = next(Corpus(tmp_path / "c").scan(["text"], is_cut=False))
    assert uncut["text"].to_list() == ["0123456789", "猫狗鸟马"]


def test_spans_are_joined_where_they_touch() -> None:
    spans = [{"start": 5, "end": 7}, {"start": 0, "end": 2}, {"start": 2, "end": 3}]
    assert joined_spans(spans) == [{"start": 0, "end": 3}, {"start": 5, "end": 7}]
    assert without_spans("abcdefgh", joined_spans(spans)) == "deh"


def test_decisions_must_cover_every_row(tmp_path: Path) -> None:
    first = corpus_of(tmp_path, [["a", "b"]])
    with pytest.raises(ValueError, match="1 decisions for 2 rows"):
        Corpus.write(tmp_path / "x" / "files", first, [decisions([True], [None])], "filter")


def test_an_empty_shard_and_an_empty_corpus_read_as_empty(tmp_path: Path) -> None:
    assert list(corpus_of(tmp_path, [[]]).documents()) == []
    none = corpus_of(tmp_path, [], name="none")
    assert list(none.scan(["text"])) == []
    assert next(corpus_of(tmp_path, [[]]).scan(["text"])).columns == ["row", "text", "shard"]


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with ShardWriter(tmp_path / name) as writer:
            for text in ("猫吃鱼。", "The cat eats fish.", ""):
                writer.append(document_of(text, source="s", url="http://x/"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_shard_with_rows_missing_is_named(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [["a", "b"]])
    with ShardWriter(corpus.shards[0].text_path) as writer:
        writer.append(document_of("a", source="s"))
    with pytest.raises(ValueError, match="1 rows found, the manifest says 2"):
        list(corpus.documents())
