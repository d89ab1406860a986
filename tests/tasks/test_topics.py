"""Documents about one thing come together, in both languages, and samples can keep their shares."""

import random
from collections import Counter
from pathlib import Path

from conf.sample import SampleConfig
from conf.topics import TopicsConfig
from storage.corpus import Corpus
from storage.topics import Topics
from tasks.sample import sample
from tasks.topics import terms_of, topics
from tests.storage.corpora import corpus_of
from tests.tasks.text_jobs import digest_of, job_at

SUBJECTS = {
    "cooking": ["soup", "onion", "butter", "kitchen", "oven", "flour", "recipe", "salt"],
    "sailing": ["boat", "harbour", "anchor", "wind", "captain", "deck", "mast", "tide"],
    "足球": ["足球", "球队", "比赛", "射门", "教练", "联赛", "进球", "球迷"],
    "医院": ["医生", "病人", "手术", "药物", "医院", "护士", "诊断", "治疗"],
}


def documents() -> list[tuple[str, str]]:
    """Subject and text of 60 documents of each subject, mixed."""
    rng = random.Random(0)
    made = [
        (subject, "。".join(rng.choices(words, k=12)) if subject > "z" else " ".join(rng.choices(words, k=12)))
        for subject, words in SUBJECTS.items()
        for _ in range(60)
    ]  # fmt: skip
    rng.shuffle(made)
    return made


def corpus_at(root: Path) -> Corpus:
    rows = [{"text": text, "source": "s", "url": str(i)} for i, (_, text) in enumerate(documents())]
    return corpus_of(root, [rows[:100], rows[100:]])


def found_at(root: Path, corpus: Corpus, name: str = "t") -> Topics:
    job = job_at(root, name)
    topics(job, corpus=corpus, settings=TopicsConfig(topics=4, max_term_share=0.5))
    return Topics(job.path)


def test_each_subject_is_a_topic(tmp_path: Path) -> None:
    found = found_at(tmp_path, corpus_at(tmp_path))
    labels = [topic for index in range(2) for topic in found.of_shard(index)]
    pairs = Counter(
        (subject, label) for (subject, _), label in zip(documents(), labels, strict=True)
    )
    assert sorted(pairs.values()) == [60, 60, 60, 60]
    entry = next(entry for entry in found.entries if "butter" in entry["terms"])
    assert set(entry["terms"]) == set(SUBJECTS["cooking"])
    assert entry["by"] == {"en/s": 60}


def test_terms_are_words_and_pairs_of_characters() -> None:
    assert list(terms_of("The Boat at 5, 中国人民 ok")) == ["boat", "中国"]


def test_a_sample_keeps_the_shares_of_topics(tmp_path: Path) -> None:
    corpus = corpus_at(tmp_path)
    found = found_at(tmp_path, corpus)
    job = job_at(tmp_path, "s")
    settings = SampleConfig(share=0.25, strata=("topic",))
    sample(job, corpus=corpus, settings=settings, topics=found)
    kept: Counter[int] = Counter()
    for shard in Corpus(job.path).shards:
        labels = found.of_shard(shard.index)
        kept.update(labels.gather(shard.read(["split"])["row"]).to_list())
    # 60 documents of about one length each: a quarter is about 15, and held-out ones stay.
    assert sorted(kept) == [0, 1, 2, 3]
    assert all(13 <= count <= 20 for count in kept.values())


def test_empty_one_and_without_terms(tmp_path: Path) -> None:
    for name, shards in (
        ("none", []),
        ("empty", [[]]),
        ("one", [["a single text"]]),
        ("odd", [["!"]]),
    ):
        found = found_at(tmp_path, corpus_of(tmp_path, shards, name=name), f"t-{name}")
        assert found.entries == []


def test_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    corpus = corpus_at(tmp_path)
    for name in ("a", "b"):
        found_at(tmp_path, corpus, name)
    assert digest_of(tmp_path / "a" / "files") == digest_of(tmp_path / "b" / "files")
