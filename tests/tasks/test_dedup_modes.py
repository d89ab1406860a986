"""Every way of finding copies agrees with comparing everything with everything, in plain Python."""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from conf.dedup import DedupConfig
from storage.corpus import Corpus
from tasks.dedup import dedup
from tasks.near_duplicates import copies_among
from tasks.signatures import shingle_sets, simhash_texts
from tests.storage.corpora import corpus_of
from tests.tasks.text_jobs import job_at, with_landings

TOKEN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[a-z0-9_]+")
HAN = re.compile(r"[\u4e00-\u9fff]+")


def text_of(tokens: Sequence[str]) -> str:
    """English words with spaces, Han characters without; some punctuation."""
    text = ""
    for i, token in enumerate(tokens):
        is_word = token.isascii() and text[-1:].isascii()
        text += (" " if is_word and text else "") + token
        text += (". " if token.isascii() else "。") if i % 9 == 8 else ""
    return text


def tokens_of(pick: random.Random, count: int, language: str) -> list[str]:
    if language == "zh":
        return [chr(pick.randrange(0x4E00, 0x4E00 + 900)) for _ in range(count)]
    return [f"w{pick.randrange(900)}" for _ in range(count)]


def variants(count: int, seed: int, tokens: int = 60) -> list[str]:
    """Documents in both languages; most are some earlier one with a few tokens changed."""
    pick = random.Random(seed)
    made: list[list[str]] = []
    for i in range(count):
        if made and pick.random() < 0.7:
            changed = list(pick.choice(made))
            for _ in range(pick.choice((0, 0, 1, 1, 2, 4, 9, 20))):
                if changed:
                    changed[pick.randrange(len(changed))] = pick.choice(
                        ("new", "新", "other", "w7")
                    )
            made.append(changed)
        else:
            size = pick.choice((0, 1, 3, 6, tokens // 2, tokens, 2 * tokens))
            made.append(tokens_of(pick, size, ("en", "zh")[i % 2]))
    return [text_of(tokens) for tokens in made]


def kept_of(corpus: Corpus) -> list[bool]:
    return [bool(keep) for shard in corpus.shards for keep in shard.decisions()["keep"]]


def cuts_of(corpus: Corpus) -> list[list[tuple[int, int]]]:
    """Cut spans of every document; the whole text of a dropped one is no cut."""
    return [
        [(span["start"], span["end"]) for span in cuts or ()]
        for shard in corpus.shards
        for cuts in shard.decisions()["cuts"].to_list()
    ]


def run(root: Path, texts: Sequence[str], **fields: Any) -> tuple[Corpus, Any]:
    """dedup over two shards."""
    job = job_at(root, "d")
    half = len(texts) // 2
    corpus = corpus_of(root, [texts[:half], texts[half:]])
    return dedup(job, corpus, DedupConfig(**fields)), job


# SimHash


def simhash_by_hand(text: str, settings: DedupConfig, rarity: dict[int, float] | None) -> int:
    values, _ = shingle_sets(pl.Series([text]), settings)
    counts = Counter(shingles_with_repeats(text, settings))
    total = 0
    for bit in range(64):
        weights = [
            (counts[int(v)] * rarity[int(v)] if rarity else 1) * (1 if int(v) >> bit & 1 else -1)
            for v in values
        ]
        total |= (sum(weights) > 1e-9) << bit
    return total


def shingles_with_repeats(text: str, settings: DedupConfig) -> list[int]:
    """Hashes of every shingle by the set of each shingle alone: one shingle, one value."""
    tokens = TOKEN.findall(text.lower())
    width = min(settings.shingle_tokens, len(tokens))
    pieces = [tokens[i : i + width] for i in range(len(tokens) - width + 1)] if tokens else []
    alone = [" ".join(piece) for piece in pieces]
    values, ends = shingle_sets(pl.Series(alone, dtype=pl.String), settings)
    assert len(ends) == len(values) == len(alone)
    return [int(value) for value in values]


@pytest.mark.parametrize("weights", ["unit", "tfidf"])
def test_simhash_drops_what_comparing_all_pairs_drops(tmp_path: Path, weights: str) -> None:
    # Single tokens, so that small changes move few bits.
    fields: dict[str, Any] = {"shingle_tokens": 1, "weights": weights, "distance_bits": 4}
    settings = DedupConfig(mode="simhash", **fields)
    texts = variants(160, seed=3)
    rarity = None
    if weights == "tfidf":
        sets = [set(shingles_with_repeats(text, settings)) for text in texts]
        counts = Counter(value for values in sets for value in values)
        rarity = {v: math.log((1 + len(texts)) / (1 + c)) + 1 for v, c in counts.items()}
    hashes = [simhash_by_hand(text, settings, rarity) for text in texts]
    if weights == "unit":
        assert simhash_texts(pl.Series(texts), settings)[0].tolist() == hashes
    kept: list[int] = []
    for i, text in enumerate(texts):
        is_empty = not TOKEN.findall(text.lower())
        is_copy = any(
            texts[j] == text
            or (
                not is_empty and (hashes[i] ^ hashes[j]).bit_count() <= 4 and TOKEN.search(texts[j])
            )
            for j in kept
        )
        kept += [] if is_copy else [i]
    result, job = run(tmp_path, texts, mode="simhash", **fields)
    assert [i for i, keep in enumerate(kept_of(result)) if keep] == kept
    assert job.metrics["duplicates"]["near"] > 5


# Passages


def passages_by_hand(texts: Sequence[str], width: int) -> list[list[tuple[int, int]]]:
    first: dict[tuple[str, ...], int] = {}
    cuts: list[list[tuple[int, int]]] = []
    for number, text in enumerate(texts):
        found = list(TOKEN.finditer(text.lower()))
        spans: list[list[int]] = []
        for i in range(len(found) - width + 1):
            run_of = tuple(token.group() for token in found[i : i + width])
            if first.setdefault(run_of, number) != number:
                start, end = found[i].start(), found[i + width - 1].end()
                if spans and start <= spans[-1][1]:
                    spans[-1][1] = end
                else:
                    spans.append([start, end])
        cuts.append([(start, end) for start, end in spans])
    return cuts


def spliced(count: int, seed: int) -> list[str]:
    """Documents of random tokens with passages of 5 to 40 tokens that others have too."""
    pick = random.Random(seed)
    pool = [tokens_of(pick, pick.randrange(5, 40), ("en", "zh")[i % 2]) for i in range(12)]
    made: list[str] = []
    for i in range(count):
        tokens: list[str] = []
        for _ in range(pick.randrange(4)):
            tokens += tokens_of(pick, pick.randrange(15), ("en", "zh")[i % 2])
            passage = pick.choice(pool)
            start = pick.randrange(len(passage))
            tokens += passage[: start + 1] if pick.random() < 0.5 else passage
        made.append(text_of(tokens))
    return made


def without(text: str, spans: Sequence[tuple[int, int]]) -> str:
    for start, end in reversed(spans):
        text = text[:start] + text[end:]
    return text


@pytest.mark.parametrize(("width", "seed"), [(8, 1), (11, 2), (20, 3)])
def test_repeated_passages_are_those_of_a_full_search(
    tmp_path: Path, width: int, seed: int
) -> None:
    texts = spliced(300, seed)
    expected = passages_by_hand(texts, width)
    result, job = run(tmp_path, texts, mode="substring", passage_tokens=width, min_left_chars=12)
    is_kept = [
        not spans or len(without(text, spans).strip()) >= 12
        for text, spans in zip(texts, expected, strict=True)
    ]
    assert kept_of(result) == is_kept
    expected = [spans if keep else [] for spans, keep in zip(expected, is_kept, strict=True)]
    assert cuts_of(result) == expected
    assert sum(map(bool, expected)) > 50
    assert job.metrics["cut"]["documents"] == sum(map(bool, expected))


def test_a_passage_is_cut_where_it_comes_later_and_its_text_is_gone(tmp_path: Path) -> None:
    shared = "这是一段很长的话，许多网页都有。" * 5  # 70 Han characters
    own = [
        "第一篇自己的话，只有这里才有的内容，写得比较长。",
        "另外一篇的内容，和前面那篇并不相同。",
    ]
    result, _ = run(tmp_path, [own[0] + shared, own[1] + shared], mode="substring")
    first, second = (document["text"] for document in result.documents())
    assert first == own[0] + shared
    assert second == own[1] + "。"


def test_what_a_document_repeats_itself_is_not_cut(tmp_path: Path) -> None:
    song = " ".join(tokens_of(random.Random(0), 60, "en"))
    result, _ = run(tmp_path, [f"{song}. {song}.", "something else"], mode="substring")
    assert kept_of(result) == [True, True]
    assert cuts_of(result) == [[], []]


# Soft


def test_weights_fall_with_the_tfidf_similarity_to_an_earlier_document(tmp_path: Path) -> None:
    settings = DedupConfig(mode="soft", shingle_tokens=2, soft_floor=0.4, least_weight=0.2)
    texts = variants(160, seed=5)
    bags = [Counter(shingles_with_repeats(text, settings)) for text in texts]
    counts = Counter(value for bag in bags for value in bag)
    rarity = {v: math.log((1 + len(texts)) / (1 + c)) + 1 for v, c in counts.items()}
    vectors: list[dict[int, float]] = []
    for bag in bags:
        weights = {v: c * rarity[v] for v, c in bag.items()}
        norm = math.sqrt(sum(w * w for w in weights.values())) or 1
        vectors.append({v: w / norm for v, w in weights.items()})
    expected: dict[int, float] = {}
    for i, x in enumerate(vectors):
        cosines = [sum(w * y.get(v, 0) for v, w in x.items()) for y in vectors[:i]]
        if (most := max(cosines, default=0)) > 0.4 + 1e-9:
            expected[i] = 1 - 0.8 * (min(most, 1) - 0.4) / 0.6
    result, job = run(
        tmp_path, texts, mode="soft", shingle_tokens=2, soft_floor=0.4, least_weight=0.2
    )
    table = pl.read_parquet(job.files / "weights.parquet")
    places = [80 * shard + row for shard, row in table.select("shard", "row").rows()]
    assert places == sorted(expected)
    assert table["weight"].to_list() == pytest.approx([expected[i] for i in places])
    dropped = [i for i, keep in enumerate(kept_of(result)) if not keep]
    assert set(dropped) <= set(places)
    # The draws follow the weights: within four standard deviations of the expected number.
    gone = sum(1 - w for w in expected.values())
    spread = math.sqrt(sum(w * (1 - w) for w in expected.values()))
    assert abs(len(dropped) - gone) < 4 * spread
    assert job.metrics["lighter"] == len(expected)


# Paragraphs


def paragraphs(text: str, least: int) -> list[tuple[int, int, str]]:
    found: list[tuple[int, int, str]] = []
    start = 0
    for line in text.split("\n"):
        if len(TOKEN.findall(line.lower())) >= least:
            found.append((start, start + len(line) + 1, line.strip()))
        start += len(line) + 1
    return found


def jaccard_of(x: str, y: str, width: int = 5) -> float:
    def shingles(text: str) -> set[tuple[str, ...]]:
        tokens = TOKEN.findall(text.lower())
        size = min(width, len(tokens))
        return {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}

    a, b = shingles(x), shingles(y)
    return len(a & b) / len(a | b) if a and b else 0.0


@pytest.mark.parametrize("mode", ["exact", "near"])
def test_paragraphs_of_other_documents_are_cut(tmp_path: Path, mode: str) -> None:
    pick = random.Random(8)
    pool = [line for line in variants(60, seed=8, tokens=20) if line]
    texts = ["\n".join(pick.choices(pool, k=pick.randrange(1, 6))) for _ in range(120)]
    kept: list[tuple[int, str]] = []
    expected: list[list[tuple[int, int]]] = []
    for number, text in enumerate(texts):
        spans: list[list[int]] = []
        for start, end, line in paragraphs(text, 4):
            firsts = [owner for owner, other in kept if other == line]
            is_copy = bool(firsts) and firsts[0] != number
            if mode == "near" and not firsts:
                is_copy = any(o != number and jaccard_of(line, other) >= 0.6 for o, other in kept)
            if not is_copy:
                kept.append((number, line))
            elif spans and start <= spans[-1][1]:
                spans[-1][1] = end
            else:
                spans.append([start, end])
        expected.append([(start, end) for start, end in spans])
    # A band of one row compares every pair, so nothing may be missed.
    result, _ = run(
        tmp_path, texts, mode=mode, unit="paragraph", min_paragraph_tokens=4, threshold=0.6,
        bands=60, band_rows=1, min_left_chars=1,
    )  # fmt: skip
    is_kept = [
        not spans or bool(without(text, spans).strip())
        for text, spans in zip(texts, expected, strict=True)
    ]
    assert kept_of(result) == is_kept
    found = cuts_of(result)
    # A span may end with the line break that the last line of a text has not.
    limited = [
        [(s, min(e, len(t))) for s, e in spans if k]
        for spans, t, k in zip(expected, texts, is_kept, strict=True)
    ]
    assert [
        [(s, min(e, len(t))) for s, e in f] for f, t in zip(found, texts, strict=True)
    ] == limited
    assert sum(map(bool, found)) > 20


# Shingles


def test_shingles_of_every_kind_are_as_defined() -> None:
    import jieba

    jieba.setLogLevel("ERROR")
    x, y = "我们在北京大学学习 Python_3，天气很好!", "他们在北京大学学习 python 3, 天气不好！"

    def runs(units: Sequence[str], width: int) -> set[tuple[str, ...]]:
        return {tuple(units[i : i + width]) for i in range(len(units) - width + 1)}

    def words(text: str) -> list[str]:
        joined = " ".join(jieba.cut(text)).lower()
        return re.findall(r"[\u4e00-\u9fffa-z0-9_]+", joined)

    def tokens(text: str) -> list[str]:
        return TOKEN.findall(text.lower())

    def characters(text: str) -> list[str]:
        return re.findall(r"[\u4e00-\u9fffa-z0-9_]", text.lower())

    splits: dict[Any, Any] = {
        "tokens": tokens,
        "characters": characters,
        "windows": list,
        "words": words,
    }
    assert words(x) != tokens(x)
    for kind, split in splits.items():
        for width in (1, 3):
            settings = DedupConfig(shingles=kind, shingle_tokens=width)
            values, ends = shingle_sets(pl.Series([x, y]), settings)
            a, b = runs(split(x), width), runs(split(y), width)
            assert (ends[0], len(values)) == (len(a), len(a) + len(b)), (kind, width)
            assert len(set(values[: ends[0]]) & set(values[ends[0] :])) == len(a & b)


# Choices


def test_the_one_that_stays_is_chosen_within_a_landing(tmp_path: Path) -> None:
    tokens = tokens_of(random.Random(1), 60, "en")
    plain, ended, longest = " ".join(tokens), " ".join(tokens) + ".", " ".join([*tokens, "tail"])
    rows = [
        {"text": plain, "source": "a", "domain": "web"},
        {"text": ended, "source": "b", "domain": "books"},
        {"text": longest, "source": "c", "domain": "web"},
    ]
    kept = {}
    for keep, more in (
        ("first", {}),
        ("quality", {}),
        ("longest", {}),
        ("source", {"source_order": ("c", "books")}),
        ("source", {"source_order": ("books",)}),
    ):
        root = tmp_path / f"{keep}-{len(more)}-{more.get('source_order')}"
        corpus = corpus_of(root, [rows])
        result = dedup(job_at(root, "d"), corpus, DedupConfig(keep=keep, **more))  # pyright: ignore[reportArgumentType]
        kept[keep, more.get("source_order")] = kept_of(result).index(True)
        assert sum(kept_of(result)) == 1
    assert list(kept.values()) == [0, 1, 2, 2, 1]


def test_an_earlier_landing_is_not_outdone_by_a_longer_copy(tmp_path: Path) -> None:
    tokens = tokens_of(random.Random(1), 60, "zh")
    texts = [["".join(tokens)], ["".join([*tokens, "尾"]), "".join([*tokens, "尾", "巴"])]]
    settings = DedupConfig(keep="longest")
    one = dedup(job_at(tmp_path, "a"), corpus_of(tmp_path, texts, name="one"), settings)
    assert kept_of(one) == [False, False, True]
    corpus = with_landings(corpus_of(tmp_path, texts, name="two"), [0, 1])
    assert kept_of(dedup(job_at(tmp_path, "b"), corpus, settings)) == [True, False, False]


def test_clusters_name_everybody_and_what_they_were_matched_with(tmp_path: Path) -> None:
    tokens = tokens_of(random.Random(2), 104, "en")
    first, near = " ".join(tokens), " ".join([*tokens[:-4], "a", "b", "c", "d"])
    result, job = run(tmp_path, ["alone and different", first, near, first])
    table = pl.read_parquet(job.files / "clusters.parquet")
    ids = [document["doc_id"] for document in result.documents(kept_only=False)]
    assert table.select("cluster", "shard", "row", "doc_id", "is_kept", "kind").rows() == [
        (0, 0, 1, ids[1], True, None),
        (0, 1, 0, ids[2], False, "near"),
        (0, 1, 1, ids[3], False, "exact"),
    ]
    assert table["matched_doc_id"].to_list() == [None, ids[1], ids[1]]
    assert table["jaccard"].to_list() == pytest.approx([None, 96 / 104, 1.0])


def test_short_documents_may_be_left_to_the_exact_comparison(tmp_path: Path) -> None:
    texts = ["Hello, world", "hello world!", "Hello, world", "one two three four five six seven"]
    texts.append(texts[-1] + "!")
    for least, expected in (
        (1, [True, False, False, True, False]),
        (2, [True, True, False, True, False]),
    ):
        result, _ = run(tmp_path / str(least), texts, min_shingles=least)
        assert kept_of(result) == expected


def test_bands_are_chosen_for_a_stated_recall() -> None:
    for threshold in (0.4, 0.7, 0.8, 0.95):
        for least in (0.9, 0.99, 0.999):
            bands, rows = DedupConfig(threshold=threshold, least_recall=least).banding()
            recall = 1 - (1 - threshold**rows) ** bands
            assert recall >= least
            assert 64 <= bands * rows <= 256
            # One row more in a band would not reach it, whatever the number of bands.
            assert 1 - (1 - threshold ** (rows + 1)) ** (256 // (rows + 1)) < least


def test_conversations_are_compared_as_texts() -> None:
    texts = variants(300, seed=9)
    settings = DedupConfig(threshold=0.4, bands=120, band_rows=1)
    kept: list[int] = []
    expected: list[bool] = []
    for i, text in enumerate(texts):
        is_copy = any(texts[j] == text or jaccard_of(texts[j], text) >= 0.4 for j in kept)
        kept += [] if is_copy else [i]
        expected.append(not is_copy)
    found = copies_among(pl.Series(texts), settings)
    assert [place is None for place in found] == expected
    for i, place in enumerate(found):
        if place is not None:
            assert expected[place]
            assert texts[i] == texts[place] or jaccard_of(texts[i], texts[place]) >= 0.4
    assert copies_among(pl.Series([], dtype=pl.String), settings) == []


@pytest.mark.parametrize("mode", ["simhash", "substring", "soft"])
def test_a_new_landing_leaves_earlier_decisions_and_reuses_their_parts(
    tmp_path: Path, mode: str
) -> None:
    texts = spliced(90, seed=4) if mode == "substring" else variants(90, seed=4)
    shards = [texts[:40], texts[40:70], texts[70:]]
    fields: dict[str, Any] = {"weights": "tfidf"} if mode == "simhash" else {"passage_tokens": 10}
    settings = DedupConfig(mode=mode, shingle_tokens=2, **fields)  # pyright: ignore[reportArgumentType]
    before = with_landings(corpus_of(tmp_path, shards[:2], name="before"), [0, 0])
    first = dedup(job_at(tmp_path, "a"), before, settings)
    after = with_landings(corpus_of(tmp_path, shards, name="after"), [0, 0, 1])
    job = job_at(tmp_path, "b")
    second = dedup(job, after, settings)
    assert job.metrics["landings"] == {"built": 1, "reused": 1}
    assert kept_of(second)[:70] == kept_of(first)
    if mode == "substring":
        assert cuts_of(second)[:70] == cuts_of(first)
        # The new landing is compared with the old ones: as if all had come at once.
        whole = dedup(job_at(tmp_path, "c"), corpus_of(tmp_path, shards, name="one"), settings)
        assert cuts_of(second) == cuts_of(whole)
    assert kept_of(second)[70:].count(False) + (mode == "substring") > 0


@pytest.mark.parametrize("mode", ["exact", "simhash", "substring", "soft"])
def test_empty_single_and_poisoned_input_and_the_same_bytes_twice(
    tmp_path: Path, mode: str
) -> None:
    poison = [
        "",
        "\x00" * 50,
        "\ufffd" * 500,
        "a" * 50_000,
        " \n\t",
        "🙂" * 300,
        "𠀀" * 90,
        "e\u0301 " * 60,
    ]
    for name, shards in (("none", []), ("empty", [[]]), ("one", [["just one"]])):
        corpus = corpus_of(tmp_path, shards, name=name)
        result = dedup(job_at(tmp_path, f"d-{name}"), corpus, DedupConfig(mode=mode))  # pyright: ignore[reportArgumentType]
        assert all(kept_of(result))
    tables = []
    for name in ("a", "b"):
        root = tmp_path / name
        result, job = run(root, [*poison, *poison, "a clean document"], mode=mode)
        assert kept_of(result)[-1]
        tables.append([p.read_bytes() for p in sorted(job.files.rglob("*")) if p.is_file()])
    assert tables[0] == tables[1]
    assert np.all([len(t) for t in tables])
