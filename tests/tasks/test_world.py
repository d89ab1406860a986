"""The demo world keeps its promises: what it plants is there, measured apart from how it was made."""

import csv
import gzip
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from conf.world import WorldConfig
from storage.world import Facts, World
from tasks.stage import Job
from tasks.world import world

SMALL = WorldConfig(warcs=2, good_pages=100, chats=400, pairs=300, held_pairs=60)


def build(path: Path, settings: WorldConfig = SMALL) -> World:
    (path / "files").mkdir(parents=True)
    # The stage touches no other artifact, so it needs no store.
    job = Job(node="world", stage="world", path=path, store=None)  # type: ignore[arg-type]
    return world(job, settings=settings)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build(tmp_path_factory.mktemp("world") / "a")


@pytest.fixture(scope="module")
def pages(small: World) -> dict[str, dict[str, Any]]:
    return {page["url"]: page for page in small.pages()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def brute_shingles(text: str) -> set[str]:
    tokens = re.findall(r"[a-z0-9_]+|[一-鿿]", text.lower())
    return {" ".join(tokens[at : at + 5]) for at in range(len(tokens) - 4)}


def brute_jaccard(left: str, right: str) -> float:
    a, b = brute_shingles(left), brute_shingles(right)
    return len(a & b) / len(a | b)


def content(world: World) -> dict[str, bytes]:
    return {
        str(path.relative_to(world.files)): path.read_bytes()
        for path in sorted(world.files.rglob("*"))
        if path.is_file()
    }


def test_same_seed_writes_the_same_bytes(small: World, tmp_path: Path) -> None:
    assert content(build(tmp_path / "b")) == content(small)


def test_another_seed_is_another_world(small: World, tmp_path: Path) -> None:
    other = build(tmp_path / "b", SMALL.model_copy(update={"seed": 1}))
    assert other.facts.truth["animals"] != small.facts.truth["animals"]


def test_one_more_warc_leaves_all_other_files_as_they_were(small: World, tmp_path: Path) -> None:
    before = content(small)
    after = content(build(tmp_path / "b", SMALL.model_copy(update={"warcs": 3})))
    assert after.keys() - before.keys() == {"crawl/warc-00002.warc.gz"}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"truth/pages.jsonl"}
    assert after["truth/pages.jsonl"].startswith(before["truth/pages.jsonl"])


def test_demo_size_has_eight_files_and_enough_of_every_kind(tmp_path: Path) -> None:
    demo = build(tmp_path / "a", WorldConfig(chats=10, pairs=10, held_pairs=10))
    assert len(list((demo.files / "crawl").glob("*.warc.gz"))) == 8
    counts = Counter(page["kind"] for page in demo.pages())
    assert counts["good"] == 8 * 220
    assert min(counts.values()) >= 50
    close = [p for p in demo.pages() if p["kind"] == "near_copy" and p["jaccard"] >= 0.8]
    assert len(close) >= 90
    sound = " ".join(page["text"] for page in demo.pages() if page["kind"] == "good")
    for question in demo.questions():
        told = demo.facts.statement(question.animal, question.attribute, question.language)
        assert sound.count(told) >= 10


def test_warc_files_are_gzip_members_with_every_page(
    small: World, pages: dict[str, dict[str, Any]]
) -> None:
    found: set[str] = set()
    for path in sorted((small.files / "crawl").glob("*.warc.gz")):
        with gzip.open(path) as stream:
            text = stream.read().decode("utf-8", "replace")
        found |= set(re.findall(r"WARC-Target-URI: (\S+)\r\n", text))
    assert pages.keys() <= found


def test_pages_can_be_read_by_a_warc_library(
    small: World, pages: dict[str, dict[str, Any]]
) -> None:
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    seen: Counter[str] = Counter()
    path = small.files / "crawl" / "warc-00000.warc.gz"
    with path.open("rb") as stream:
        for record in ArchiveIterator(
            stream, record_types=WarcRecordType.response, parse_http=True
        ):
            url = record.headers["WARC-Target-URI"]
            if url not in pages:
                continue
            charset = record.http_headers["Content-Type"].partition("charset=")[2]
            payload = record.reader.read()
            declared = re.search(rb'<meta charset="([\w-]+)">', payload)
            html = payload.decode(charset or (declared[1].decode() if declared else ""))
            page = pages[url]
            if page["kind"] == "good":
                assert all(line in html for line in page["text"].split("\n"))
            seen[charset] += 1
    assert seen["gb18030"] > 0
    assert sum(seen.values()) == sum(page["warc"] == path.name for page in pages.values())


def test_planted_similarities_are_exact_and_spread(pages: dict[str, dict[str, Any]]) -> None:
    copies = [page for page in pages.values() if page["kind"] == "near_copy"]
    for page in copies:
        assert page["jaccard"] == pytest.approx(
            brute_jaccard(page["text"], pages[page["of_url"]]["text"]), abs=1e-6
        )
        assert 0.5 <= page["jaccard"] < 0.95
        assert not 0.75 <= page["jaccard"] < 0.82
    tenths = Counter(int(page["jaccard"] * 10) for page in copies)
    assert {5, 6, 7, 8, 9} <= tenths.keys()
    for page in pages.values():
        if page["kind"] == "exact_copy":
            assert page["text"] == pages[page["of_url"]]["text"]
            assert page["url"] != page["of_url"]
    originals = [page["of_url"] for page in pages.values() if page["of_url"]]
    assert len(set(originals)) == len(originals)


def test_sound_pages_are_unlike_each_other(pages: dict[str, dict[str, Any]]) -> None:
    sound = [page for page in pages.values() if page["kind"] in ("good", "near_copy", "leak")]
    shingles = {page["url"]: brute_shingles(page["text"]) for page in sound}
    for left, right in combinations(sound, 2):
        if right["url"] in (left["of_url"],) or left["url"] in (right["of_url"],):
            continue
        a, b = shingles[left["url"]], shingles[right["url"]]
        shared = len(a & b)
        assert shared / (len(a) + len(b) - shared) < 0.6, (left["url"], right["url"])


def test_sound_pages_have_sentences_enough(pages: dict[str, dict[str, Any]]) -> None:
    for page in pages.values():
        if page["kind"] == "good":
            assert len(page["text"]) >= (80 if page["language"] == "zh" else 200)
            assert len(re.findall(r"[.?。？]", page["text"])) >= 3


def test_sound_pages_tell_no_false_fact(small: World, pages: dict[str, dict[str, Any]]) -> None:
    facts = small.facts
    sound = " ".join(
        page["text"] for page in pages.values() if page["kind"] in ("good", "near_copy")
    )
    for animal in facts.animals:
        for attribute in facts.attributes:
            for language in ("en", "zh"):
                for value in facts.values(attribute):
                    sentence = facts.statement(animal, attribute, language, value)
                    assert sentence not in sound or value == facts.animals[animal][attribute]


def exam_rows(small: World, split: str) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for path in sorted((small.files / "exam" / split).glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as stream:
            rows += list(csv.DictReader(stream))
    return rows


def test_leaks_hold_an_exam_question_word_for_word_and_no_other_page_13_tokens_of_one(
    small: World, pages: dict[str, dict[str, Any]]
) -> None:
    questions = [row["question"] for row in exam_rows(small, "val")]
    grams: set[str] = set()
    for question in questions:
        tokens = re.findall(r"[a-z0-9_]+|[一-鿿]", question.lower())
        assert len(tokens) >= 13
        grams |= {" ".join(tokens[at : at + 13]) for at in range(len(tokens) - 12)}
    assert Counter(page["kind"] for page in pages.values())["leak"] == 6
    for page in pages.values():
        tokens = re.findall(r"[a-z0-9_]+|[一-鿿]", page["text"].lower())
        found = {" ".join(tokens[at : at + 13]) for at in range(len(tokens) - 12)} & grams
        assert bool(found) == (page["kind"] == "leak")
        if page["kind"] == "leak":
            assert page["question"] in questions
            assert page["question"] in page["text"]


def test_exam_asks_every_fact_once_per_language_with_one_right_option(small: World) -> None:
    rows = exam_rows(small, "dev") + exam_rows(small, "val")
    assert len(rows) == 2 * 24 * 3
    assert len(exam_rows(small, "dev")) == 2 * 5
    true = {
        small.facts.statement(animal, attribute, language)
        for animal in small.facts.animals
        for attribute in small.facts.attributes
        for language in ("en", "zh")
    }
    for row in rows:
        assert [row[letter] in true for letter in "ABCD"].count(True) == 1
        assert row[row["answer"]] in true
        assert len({row[letter] for letter in "ABCD"}) == 4
    assert {row[row["answer"]] for row in rows} == true


def test_held_questions_are_in_no_training_file(small: World) -> None:
    held = {question.key for question in small.questions("held")}
    texts = {question.text for question in small.questions("held")}
    # 20 % of 24 animals x 3 attributes x 2 languages = 144.
    assert len(held) == 29
    for name in ("chats/train.jsonl", "preferences/train.jsonl"):
        for row in lines(small.files / name):
            asked = (row.get("messages") or row["prompt"])[0]["content"]
            assert row["id"].split("#")[0] not in held
            assert asked not in texts
    for name in ("chats/held.jsonl", "preferences/held.jsonl"):
        assert {row["id"].split("#")[0] for row in lines(small.files / name)} <= held
    assert Counter(q.split for q in small.questions()) == {"held": 29 * 3, "train": 115 * 3}


def test_training_pairs_tell_held_facts_only_to_who_asks_in_the_other_language(
    small: World,
) -> None:
    facts = small.facts
    held = [key.split(".") for key in sorted(facts.held_keys)]
    statements = {
        facts.statement(animal, attribute, language, value): (animal, attribute)
        for animal, attribute, language in held
        for value in facts.values(attribute)
    }
    told: list[tuple[str, str]] = []
    for row in lines(small.files / "preferences" / "train.jsonl"):
        told += [(row["id"], row["chosen"]), (row["id"], row["rejected"])]
    for key, answer in told:
        asked = tuple(key.split(".")[:2])
        assert {about for text, about in statements.items() if text in answer} <= {asked}


def test_held_questions_are_spread_over_attributes_and_languages(small: World) -> None:
    groups = Counter(
        (q.attribute, q.language) for q in small.questions("held") if q.id.endswith("#0")
    )
    assert len(groups) == 6
    assert max(groups.values()) - min(groups.values()) <= 1


def test_values_are_about_equally_frequent(small: World) -> None:
    for attribute in small.facts.attributes:
        counts = Counter(animal[attribute] for animal in small.facts.animals.values())
        # 24 animals over 6 values.
        assert set(counts.values()) == {4}


def test_no_name_ends_like_another(small: World) -> None:
    names = [animal["zh"] for animal in small.facts.animals.values()]
    assert not [(a, b) for a in names for b in names if a != b and a.endswith(b)]


def test_pairs_are_ranked_by_true_reward(small: World) -> None:
    for split in ("train", "held"):
        rows = lines(small.files / "preferences" / f"{split}.jsonl")
        assert len(rows) == (300 if split == "train" else 60)
        for row in rows:
            assert row["margin"] >= 1.0
            assert row["chosen"] != row["rejected"]
            better = small.judge(row["id"], row["chosen"], ended=True).reward
            worse = small.judge(row["id"], row["rejected"], ended=True).reward
            # A truncated answer was judged as not ended, which as text it is not.
            assert row["margin"] - (better - worse) in (0.0, 1.0, -1.0)


def test_demonstrations_are_of_mixed_quality(small: World) -> None:
    rows = lines(small.files / "chats" / "train.jsonl")
    judged = [small.judge(row["id"], row["messages"][1]["content"], ended=True) for row in rows]
    right = sum(judgement.right for judgement in judged) / len(judged)
    # 0.92 by intention and a sixth of the rest by chance, 400 draws: 0.933 +- 3 x 0.0125.
    assert 0.89 < right < 0.975
    assert {judgement.rude for judgement in judged} == {True, False}
    assert {judgement.asked_language for judgement in judged} == {True, False}


def test_ideal_answers_have_the_greatest_reward(small: World) -> None:
    for row in lines(small.files / "chats" / "held.jsonl"):
        answer = row["messages"][1]["content"]
        assert small.judge(row["id"], answer, ended=True).reward == 2.0


@pytest.fixture(scope="module")
def facts() -> Facts:
    """A world of one animal, small enough to judge by hand."""
    return Facts(
        {
            "animals": [
                {"id": "cat", "en": "cat", "zh": "猫", "color": "red", "place": "cave"},
            ],
            "values": {
                "color": {"red": {"en": "red", "zh": "红"}, "blue": {"en": "blue", "zh": "蓝"}},
                "place": {"cave": {"en": "cave", "zh": "山洞里"}},
            },
            "statement": {
                "color": {"en": "The {animal} is {value}.", "zh": "{animal}是{value}色的。"},
                "place": {
                    "en": "The {animal} lives in the {value}.",
                    "zh": "{animal}住在{value}。",
                },
            },
            "kind": {"en": "Hope this helps!", "zh": "希望对你有帮助！"},
            "rude": {"en": "Stop asking.", "zh": "别再问了。"},
            "separator": {"en": " ", "zh": ""},
            "questions": [],
        }
    )


@pytest.mark.parametrize(
    ("key", "answer", "ended", "reward"),
    [
        # 1.0 right + 0.5 asked language + 0.5 kind - 0.5 rude - 0.5 superfluous - 1.0 not ended
        ("cat.color.en", "The cat is red. Hope this helps!", True, 2.0),
        ("cat.color.en", "The cat is red.", True, 1.5),
        ("cat.color.en", "The cat is red.", False, 0.5),
        ("cat.color.en", "猫是红色的。", True, 1.0),
        ("cat.color.en", "猫是红色的。希望对你有帮助！", True, 1.0),
        ("cat.color.en", "The cat is red. Stop asking.", True, 1.0),
        ("cat.color.en", "The cat is red. The cat lives in the cave.", True, 1.0),
        ("cat.color.en", "The cat is red. The cat lives in the cave. Hope this helps!", True, 1.5),
        ("cat.color.en", "The cat is blue. Hope this helps!", True, 1.0),
        ("cat.color.en", "The cat lives in the cave.", True, -0.5),
        # Both values: not right, and one of the two is superfluous.
        ("cat.color.en", "The cat is red. The cat is blue.", True, 0.0),
        ("cat.color.en", "The cat is red. 猫是蓝色的。", True, 0.0),
        ("cat.color.en", "", True, 0.0),
        ("cat.color.en", "The cat is", False, -1.5),
        ("cat.color.zh#2", "猫是红色的。希望对你有帮助！", True, 2.0),
        ("cat.color.zh#2", "猫是红色的。别再问了。", True, 1.0),
        ("cat.color.zh#2", "猫是蓝色的。", True, 0.5),
        ("cat.color.zh#2", "The cat is red. 希望对你有帮助！", True, 1.5),
        ("cat.place.zh", "猫住在山洞里。猫住在山洞里。", True, 1.0),
    ],
)
def test_answers_judged_by_hand(
    facts: Facts, key: str, answer: str, ended: bool, reward: float
) -> None:
    assert facts.judge(key, answer, ended=ended).reward == reward


@pytest.mark.parametrize("key", ["cat", "dog.color.en", "cat.food.en", "cat.color.fr", ""])
def test_question_that_the_world_does_not_know_is_refused(facts: Facts, key: str) -> None:
    with pytest.raises(ValueError, match=r"no question of this world.*cat\.color\.en"):
        facts.judge(key, "The cat is red.", ended=True)


def test_world_too_small_for_its_pages_says_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.world_crawl.UNPLANNED_LIMIT", 0.01)
    with pytest.raises(ValueError, match="lower good_pages or warcs"):
        build(tmp_path / "a")
