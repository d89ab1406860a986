"""A sample keeps the proportions of what it is drawn from, and grows without a change of mind."""

from pathlib import Path
from typing import Any

import pytest

from conf.sample import SampleConfig
from storage.corpus import Corpus
from tasks.sample import sample
from tests.storage.corpora import corpus_of
from tests.tasks.text_jobs import digest_of, job_at


def corpus_at(root: Path) -> Corpus:
    """Four groups of 1,000, 200, 500 and 50 documents of 10 to 29 characters in two shards."""
    sizes = {("zh", "web"): 1000, ("zh", "books"): 200, ("en", "web"): 500, ("en", "books"): 50}
    documents = [
        {"text": f"{n:09}".ljust(10 + n % 20, "."), "language": language, "source": source,
         "split": "held" if n % 25 == 0 else "train", "url": f"{language}/{source}/{n}"}
        for (language, source), count in sizes.items()
        for n in range(count)
    ]  # fmt: skip
    return corpus_of(root, [documents[::2], documents[1::2]])


def drawn(root: Path, name: str, corpus: Corpus, **fields: Any) -> list[dict[str, Any]]:
    job = job_at(root, name)
    sample(job, corpus=corpus, settings=SampleConfig(**fields))
    return [
        row
        for shard in Corpus(job.path).shards
        for row in shard.read(["doc_id", "language", "source", "split", "n_chars"]).to_dicts()
    ]


def chars(rows: list[dict[str, Any]]) -> dict[tuple[str, str], int]:
    totals: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["split"] == "train":
            key = (row["language"], row["source"])
            totals[key] = totals.get(key, 0) + row["n_chars"]
    return totals


def test_every_group_keeps_its_share_to_within_a_document(tmp_path: Path) -> None:
    corpus = corpus_at(tmp_path)
    everything = drawn(tmp_path, "all", corpus, share=1.0)
    assert len(everything) == 1750
    kept = drawn(tmp_path, "tenth", corpus, share=0.1)
    for group, total in chars(everything).items():
        assert 0.1 * total <= chars(kept)[group] < 0.1 * total + 29
    # 1 of 25 is held out, and all of these stay: 40 + 8 + 20 + 2.
    assert sum(row["split"] == "held" for row in kept) == 70


def test_a_larger_share_holds_the_smaller_one_and_a_seed_draws_others(tmp_path: Path) -> None:
    corpus = corpus_at(tmp_path)
    tenth, fifth, other = (
        {row["doc_id"] for row in drawn(tmp_path, name, corpus, **fields)}
        for name, fields in (
            ("a", {"share": 0.1}),
            ("b", {"share": 0.2}),
            ("c", {"share": 0.1, "seed": 1}),
        )
    )
    assert tenth < fifth
    assert tenth != other


def test_groups_may_have_shares_of_their_own(tmp_path: Path) -> None:
    corpus = corpus_at(tmp_path)
    kept = chars(drawn(tmp_path, "a", corpus, share=0.5, shares={"zh/web": 0.0, "en/books": 1.0}))
    everything = chars(drawn(tmp_path, "b", corpus, share=1.0))
    assert ("zh", "web") not in kept
    assert kept["en", "books"] == everything["en", "books"]
    with pytest.raises(
        ValueError, match=r"no documents of fr/web; the groups are en/books, en/web"
    ):
        drawn(tmp_path, "c", corpus, shares={"fr/web": 0.5})


def test_empty_one_and_dropped_documents(tmp_path: Path) -> None:
    assert drawn(tmp_path, "a", corpus_of(tmp_path, [], name="none")) == []
    assert drawn(tmp_path, "b", corpus_of(tmp_path, [[]], name="empty")) == []
    one = corpus_of(tmp_path, [["one document"]], name="one")
    assert len(drawn(tmp_path, "c", one)) == 1
    job = job_at(tmp_path, "d")
    sample(job, corpus=one, settings=SampleConfig())
    assert list(Corpus(job.path).dropped()) == []


def test_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    corpus = corpus_at(tmp_path)
    for name in ("a", "b"):
        drawn(tmp_path, name, corpus)
    assert digest_of(tmp_path / "a" / "files") == digest_of(tmp_path / "b" / "files")
