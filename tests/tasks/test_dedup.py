"""dedup keeps the first of every group of copies, and nothing else changes."""

import json
import random
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pytest
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.dedup import DedupConfig
from storage.corpus import Corpus
from tasks.dedup import dedup
from tasks.kernels import minhash
from tasks.signatures import permutations_of, shingle_sets, sign_texts
from tests.storage.corpora import corpus_of
from tests.tasks.text_jobs import digest_of, job_at, with_landings

TOKEN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]|[a-z0-9_]+")
TEXT = st.text(
    st.sampled_from("abcXYZ019_ .,!?\n你好世界猫狗吃草在山上，。！𠀀ＡＺａｚ０９＿＠／"),
    min_size=0,
    max_size=60,
)


def shingles_of(text: str, width: int = 5) -> set[tuple[str, ...]]:
    """The definition, in plain Python; NFKC makes full-width letters ASCII."""
    tokens = TOKEN.findall(unicodedata.normalize("NFKC", text).lower())
    if not tokens:
        return set()
    width = min(width, len(tokens))
    return {tuple(tokens[i : i + width]) for i in range(len(tokens) - width + 1)}


def jaccard_of(x: str, y: str) -> float:
    """Exact, in plain Python; two documents without a token have nothing in common."""
    a, b = shingles_of(x), shingles_of(y)
    return len(a & b) / len(a | b) if a and b else 0.0


def greedy(texts: Sequence[str], threshold: float) -> list[bool]:
    """What to keep, by comparing every document with all kept ones."""
    kept: list[str] = []
    decisions: list[bool] = []
    for text in texts:
        is_kept = all(text != other and jaccard_of(text, other) < threshold for other in kept)
        decisions.append(is_kept)
        kept += [text] * is_kept
    return decisions


def kept_of(corpus: Corpus) -> list[bool]:
    return [bool(keep) for shard in corpus.shards for keep in shard.decisions()["keep"]]


def words(count: int, seed: int, language: str = "en") -> list[str]:
    pick = random.Random(seed)
    if language == "zh":
        return [chr(pick.randrange(0x4E00, 0x6E00)) for _ in range(count)]
    return [f"w{pick.randrange(5000)}" for _ in range(count)]


def varied(tokens: list[str], changes: int) -> list[str]:
    """The tokens with the last ones replaced: of n - 4 shingles the last `changes` differ."""
    return tokens[: len(tokens) - changes] + [chr(0x8000 + i) for i in range(changes)]


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=5))
def test_signatures_are_those_of_datasketch(texts: list[str]) -> None:
    config = DedupConfig()
    signatures, counts = sign_texts(pl.Series(texts), config)
    values, ends = shingle_sets(pl.Series(texts), config)
    start = 0
    for i, text in enumerate(texts):
        oracle = MinHash(num_perm=120, seed=1, scheme="affine32", hashfunc=int)
        for value in values[start : ends[i]]:
            oracle.update(int(value) >> 32)
        start = ends[i]
        assert signatures[i].tolist() == oracle.hashvalues.tolist(), text
        assert (counts[i] > 0) == bool(shingles_of(text))


@settings(max_examples=100, deadline=None)
@given(TEXT, TEXT)
def test_exact_jaccard_is_that_of_the_token_sets(x: str, y: str) -> None:
    y = x[: len(x) // 2] + y if len(x) > 20 else y
    values, ends = shingle_sets(pl.Series([x, y]), DedupConfig())
    begins = np.array([0, ends[0]])
    assert minhash.jaccard(values, begins, ends, 0, 1) == pytest.approx(jaccard_of(x, y))


def test_a_han_character_beyond_the_basic_plane_is_one_token() -> None:
    _, counts = sign_texts(pl.Series(["𠀀𠀁𠀂𠀃𠀄𠀅", "ab cd ef gh ij kl"]), DedupConfig())
    assert counts.tolist() == [2, 2]  # six tokens each: two shingles of five


def test_full_width_letters_are_as_good_as_ascii(tmp_path: Path) -> None:
    plain = " ".join(words(20, 3)) + "Mixed_9"
    wide = "".join(chr(ord(c) + 0xFEE0) if c != " " else "\u3000" for c in plain)
    values, ends = shingle_sets(pl.Series([plain, wide]), DedupConfig())
    assert values[: ends[0]].tolist() == values[ends[0] :].tolist()
    result = dedup(job_at(tmp_path, "d"), corpus_of(tmp_path, [[plain, wide]]), DedupConfig())
    assert kept_of(result) == [True, False]


@pytest.mark.parametrize(("bands", "rows", "seed"), [(20, 6, 1), (1, 1, 7), (256, 1, 12345)])
def test_permutations_are_those_of_datasketch(bands: int, rows: int, seed: int) -> None:
    found = permutations_of(DedupConfig(bands=bands, band_rows=rows, permutation_seed=seed))
    oracle = MinHash(num_perm=bands * rows, seed=seed, scheme="affine32").permutations
    assert np.array_equal(np.stack(found), oracle)


def test_kept_permutations_that_are_damaged_are_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = np.stack(permutations_of(DedupConfig()))
    (kept,) = (tmp_path / ".cache" / "bessemer").iterdir()
    kept.write_bytes(bytes([kept.read_bytes()[0] ^ 1]) + kept.read_bytes()[1:])
    assert np.array_equal(np.stack(permutations_of(DedupConfig())), asked)
    assert np.array_equal(np.stack(permutations_of(DedupConfig())), asked)


def test_letters_with_marks_and_other_scripts_are_words() -> None:
    texts = ["café naïve ångström élève über", "один два три четыре пять шесть", "×÷ —…。，"]
    _, counts = sign_texts(pl.Series(texts), DedupConfig())
    assert counts.tolist() == [1, 2, 0]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_pairs_below_the_threshold_stay_and_above_it_go(tmp_path: Path, language: str) -> None:
    separator = "" if language == "zh" else " "
    texts: list[str] = []
    expected: list[bool] = []
    for seed, changes in enumerate((2, 8, 11, 12, 18, 25, 30)):
        # 104 tokens, 100 shingles; c changed at the end: J = (100 - c) / (100 + c)
        tokens = words(104, seed, language)
        texts += [separator.join(tokens), separator.join(varied(tokens, changes))]
        expected += [True, (100 - changes) / (100 + changes) < 0.8]
    assert expected.count(False) == 3  # 2, 8, 11: 0.96, 0.85, 0.80
    assert greedy(texts, 0.8) == expected
    result = dedup(job_at(tmp_path, "d"), corpus_of(tmp_path, [texts]), DedupConfig())
    assert kept_of(result) == expected


def test_chains_of_small_changes_are_not_collapsed(tmp_path: Path) -> None:
    # a ~ b and b ~ c within the threshold, a and c below it: b goes for a, c has no kept partner
    tokens = words(104, 1)
    a, b = " ".join(tokens), " ".join(varied(tokens, 8))  # 92 / 108
    c = " ".join(["changed"] * 5 + varied(tokens, 8)[5:])  # 95 / 105 of b, 87 / 113 of a
    assert jaccard_of(a, b) >= 0.8
    assert jaccard_of(b, c) >= 0.8
    assert jaccard_of(a, c) < 0.8
    result = dedup(job_at(tmp_path, "d"), corpus_of(tmp_path, [[a, b, c]]), DedupConfig())
    assert kept_of(result) == [True, False, True]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_choice_is_that_of_comparing_everything(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    # Small documents: a band of one row compares nearly every pair, so nothing may be missed.
    pick = random.Random(seed)
    pool = [" ".join(words(pick.randrange(0, 12), i)) for i in range(8)]
    texts = [
        pick.choice([text, text + " end", "begin " + text, text.upper(), text + "!"])
        for text in pick.choices(pool, k=30)
    ]
    root = tmp_path_factory.mktemp("choice")
    config = DedupConfig(bands=120, band_rows=1, threshold=0.6, shingle_tokens=5)
    corpus = corpus_of(root, [texts[:10], texts[10:11], texts[11:]])
    assert kept_of(dedup(job_at(root, "d"), corpus, config)) == greedy(texts, 0.6)


def test_short_documents_are_compared_whole_and_empty_ones_only_byte_by_byte(
    tmp_path: Path,
) -> None:
    texts = ["Hello, world", "hello world!", "hello there", "!!!", "???", "!!!", "你好", "你好。"]
    result = dedup(job_at(tmp_path, "d"), corpus_of(tmp_path, [texts]), DedupConfig())
    assert kept_of(result) == [True, False, True, True, True, False, True, False]


def test_a_copy_names_the_first_document_that_was_kept(tmp_path: Path) -> None:
    tokens = words(104, 3)
    first, near = " ".join(tokens), " ".join(varied(tokens, 4))
    corpus = corpus_of(tmp_path, [["alone and different", first], [near, near, first]])
    job = job_at(tmp_path, "d")
    dedup(job, corpus, DedupConfig())
    table = pl.read_parquet(job.files / "duplicates.parquet")
    assert table.select("shard", "row", "kind", "of_shard", "of_row").rows() == [
        (1, 0, "near", 0, 1),
        (1, 1, "exact", 0, 1),  # equals a text that is itself a near-copy of the first
        (1, 2, "exact", 0, 1),
    ]
    assert table["jaccard"].to_list() == pytest.approx([96 / 104, 96 / 104, 1.0])
    assert job.metrics["duplicates"] == {"exact": 2, "near": 1}
    assert job.metrics["groups"] == 1
    assert job.metrics["documents"] == {"in": 5, "kept": 2}
    examples = json.loads((job.logs / "examples.json").read_text("utf-8"))
    assert examples["duplicates"][0]["of_text"] == first[:400]


def test_a_later_landing_changes_no_earlier_decision_and_costs_only_itself(tmp_path: Path) -> None:
    tokens = [words(60, seed) for seed in range(12)]
    shards = [[" ".join(t) for t in tokens[i : i + 4]] for i in (0, 4, 8)]
    shards[1].append(" ".join(tokens[0] + ["tail"]))
    shards[2] += [" ".join(["head", *tokens[5]]), " ".join(tokens[9])]
    before = with_landings(corpus_of(tmp_path, shards[:2], name="before"), [0, 0])
    first = job_at(tmp_path, "first")
    decided = dedup(first, before, DedupConfig())
    assert first.metrics["landings"] == {"built": 1, "reused": 0}
    after = with_landings(corpus_of(tmp_path, shards, name="after"), [0, 0, 1])
    second = job_at(tmp_path, "second")
    extended = dedup(second, after, DedupConfig())
    assert second.metrics["landings"] == {"built": 1, "reused": 1}
    assert second.metrics["shards"] == {"built": 1, "reused": 2}
    assert kept_of(extended)[: len(kept_of(decided))] == kept_of(decided)
    assert kept_of(decided) == [True] * 8 + [False]
    assert kept_of(extended)[9:] == [True] * 4 + [False, False]


def test_two_landings_keep_what_one_keeps_when_the_order_is_the_same(tmp_path: Path) -> None:
    texts = [" ".join(varied(words(40, i % 6), i % 3)) for i in range(24)]
    shards = [texts[:8], texts[8:16], texts[16:]]
    one = corpus_of(tmp_path, shards, name="one")
    many = with_landings(corpus_of(tmp_path, shards, name="many"), [0, 1, 2])
    assert kept_of(dedup(job_at(tmp_path, "a"), one, DedupConfig())) == kept_of(
        dedup(job_at(tmp_path, "b"), many, DedupConfig())
    )


def test_landings_decide_in_order_of_arrival_not_of_listing(tmp_path: Path) -> None:
    corpus = with_landings(corpus_of(tmp_path, [["a b c d e f"], ["a b c d e f"]]), [1, 0])
    job = job_at(tmp_path, "d")
    assert kept_of(dedup(job, corpus, DedupConfig())) == [False, True]
    table = pl.read_parquet(job.files / "duplicates.parquet")
    assert table.select("shard", "of_shard").rows() == [(0, 1)]


def test_what_was_dropped_before_is_no_reason_to_drop(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [["same text here", "same text here", "same text here"]])
    keep = pl.DataFrame({"keep": [False, True, True], "reason": ["short", None, None]})
    Corpus.write(tmp_path / "filtered" / "files", corpus, [keep], "filter")
    result = dedup(job_at(tmp_path, "d"), Corpus(tmp_path / "filtered"), DedupConfig())
    decisions = result.shards[0].decisions()
    assert decisions["keep"].to_list() == [False, True, False]
    assert decisions["reason"].to_list() == [None, None, "exact_duplicate"]


def test_removed_spans_do_not_count(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [["one two three", "one two three four"]])
    cuts = pl.Series(
        "cuts",
        [[], [{"start": 13, "end": 18}]],
        dtype=pl.List(pl.Struct({"start": pl.UInt32, "end": pl.UInt32})),
    )
    keep = pl.DataFrame({"keep": [True, True], "reason": [None, None]}).with_columns(cuts)
    Corpus.write(tmp_path / "cut" / "files", corpus, [keep], "decontaminate")
    for mode in ("exact", "near"):
        job = job_at(tmp_path, f"d-{mode}")
        result = dedup(job, Corpus(tmp_path / "cut"), DedupConfig(mode=mode))
        assert kept_of(result) == [True, False]
        assert job.metrics["duplicates"] == {"exact": 1, "near": 0}


@pytest.mark.parametrize("shards", [[], [[]], [[], ["only one document"]], [[""]]])
def test_nothing_and_one_document_pass(tmp_path: Path, shards: list[list[str]]) -> None:
    result = dedup(job_at(tmp_path, "d"), corpus_of(tmp_path, shards), DedupConfig())
    assert kept_of(result) == [True] * sum(map(len, shards))


def test_poisoned_rows_are_documents_like_others(tmp_path: Path) -> None:
    poison = ["\x00" * 50, "\ufffd" * 2000, "a" * 100_000, "\u200b", " \n\t", "🙂" * 300, "𠀀" * 9]
    texts = [*poison, *poison, "a clean document of some words"]
    result = dedup(job_at(tmp_path, "d"), corpus_of(tmp_path, [texts]), DedupConfig())
    assert kept_of(result) == [True] * 7 + [False] * 7 + [True]


def test_modes(tmp_path: Path) -> None:
    tokens = words(104, 5)
    texts = [" ".join(tokens), " ".join(varied(tokens, 4)), " ".join(tokens)]
    corpus = corpus_of(tmp_path, [texts])
    kept = {
        mode: kept_of(dedup(job_at(tmp_path, mode), corpus, DedupConfig(mode=mode)))
        for mode in ("off", "exact", "near")
    }
    assert kept["off"] == [True, True, True]
    assert kept["exact"] == [True, True, False]
    assert kept["near"] == [True, False, False]


def test_twice_gives_the_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    texts = [" ".join(varied(words(40, i % 7), i % 3)) for i in range(40)]
    digests: set[str] = set()
    for name, workers in (("one", 1), ("two", 2)):
        root = tmp_path / name
        corpus = corpus_of(root, [texts[:10], texts[10:30], texts[30:]])
        job = job_at(root, "d", workers=workers)
        dedup(job, corpus, DedupConfig())
        digests.add(digest_of(job.files))
    assert len(digests) == 1


@pytest.mark.parametrize("mode", ["near", "simhash"])
def test_without_memory_everything_lies_on_disk_and_the_result_is_the_same(
    tmp_path: Path, mode: Literal["near", "simhash"]
) -> None:
    tokens = [words(60, seed) for seed in range(30)]
    texts = [" ".join(of) for of in tokens] + [" ".join(varied(of, 3)) for of in tokens]
    corpus = with_landings(corpus_of(tmp_path, [texts[:25], texts[25:]]), [0, 1])
    digests = {
        digest_of(dedup(job_at(tmp_path / str(mb), "d"), corpus, config).files)
        for mb in (0, None)
        for config in [DedupConfig(mode=mode, memory_mb=mb)]
    }
    assert len(digests) == 1


def test_another_threshold_signs_nothing_anew(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [["a b c d e f g"], ["h i j k l m n"]])
    dedup(job_at(tmp_path, "a"), corpus, DedupConfig())
    job = job_at(tmp_path, "b")
    dedup(job, corpus, DedupConfig(threshold=0.7))
    assert job.metrics["shards"] == {"built": 0, "reused": 2}
    assert job.metrics["landings"] == {"built": 1, "reused": 0}


def test_every_gold_pair_of_real_articles_is_found(shared_data: Path, tmp_path: Path) -> None:
    import zstandard

    folder = shared_data / "dedup" / "minhash_articles"

    def lines(name: str) -> list[str]:
        content = (folder / name).read_bytes()
        if name.endswith(".zst"):
            content = zstandard.ZstdDecompressor().decompressobj().decompress(content)
        return content.decode("utf-8").splitlines()

    articles = dict(line.split(" ", 1) for line in lines("articles_1000.train.zst"))
    gold = [line.split() for line in lines("articles_1000.truth")]
    names = list(articles)
    job = job_at(tmp_path, "d")
    dedup(
        job,
        corpus_of(tmp_path, [list(articles.values())]),
        DedupConfig(threshold=0.5, bands=40, band_rows=3),
    )
    table = pl.read_parquet(job.files / "duplicates.parquet")
    pairs = {frozenset((names[row], names[of])) for row, of in table.select("row", "of_row").rows()}
    assert pairs == {frozenset(pair) for pair in gold}
    for row, of, found in table.select("row", "of_row", "jaccard").rows():
        expected = jaccard_of(articles[names[row]], articles[names[of]])
        assert found == pytest.approx(expected)


def test_recall_formula() -> None:
    # 1 - (1 - 0.8^6)^20 = 1 - 0.737856^20
    assert DedupConfig().recall(0.8) == pytest.approx(1 - 0.737856**20)
    assert np.isclose(DedupConfig().recall(1.0), 1.0)
