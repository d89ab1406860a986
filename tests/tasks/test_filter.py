"""Filter: junk goes, sound text of both languages stays, every figure is explained."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from conf.filter import PRESETS, Bounds, FilterConfig, Rule
from storage.corpus import Corpus
from tasks.extract import extract
from tasks.filter import EXAMPLES, filter  # noqa: A004 - the stage's word
from tasks.length_outliers import LENGTHS
from tests.tasks.corpus_runs import reasons, run_stage, spec, texts

from conf.extract import ExtractConfig  # isort: skip

GOOD = {
    "en": [
        "The fox is red. It lives in the cave near our village.",
        "What does the wolf eat? The wolf eats fish, and it sleeps at noon.",
        "The old man went down to the river every morning to look at the boats. He knew each of "
        "them by name, and he could tell from the sound of the water who was coming home early. "
        "On Sundays his daughter walked with him, and they talked about the years in the city.",
    ],
    "zh": [
        "狐是红色的，住在山洞里，早上吃蜂蜜。",
        "狼吃什么？狼吃鱼，中午在树下睡觉。",
        "老人每天早上都到河边去看船。他知道每一条船的名字，听水声就知道谁先回家。星期天女儿陪他一起走，"
        "两个人说起从前在城里的日子，说着说着就笑了起来，直到太阳落下去才慢慢走回来。",
    ],
}
JUNK = {
    "en": {
        "Too short.": "too_short",
        "great cheap watches " * 30: "",
        "\n".join(["Home", "About", "Contact", "Login", "Search", "Shop"]): "ended_lines",
        "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do the eiusmod.": "lorem_ipsum",
        "x1 9 8 7 4 22 17 9.1 88 71 6 5 4 3 2 1 0 the 9 9 9 9.": "letters",
        "the @@ $$ we see that some of it has &&& the signs of code in ++ it {}<>.": "signs",
    },
    "zh": {
        "登录": "too_short",
        "便宜手表快来买" * 20: "",
        "\n".join(
            ["首页", "新闻中心", "关于我们", "联系方式", "网站地图", "友情链接"]
        ): "ended_lines",
        "龘靐齉爩鱻麤龗灪吁龖厵滟爨癵籱饢驫鲡鹂鸾麣纞虋讟。": "rare_han",
        "天空山水火木金土石田日月星云风雨雪花草虫鱼鸟马牛羊狗猫鸡鸭。": "any_stop_word",
    },
}


def run(root: Path, documents: list[dict[str, Any]], **fields: Any) -> Any:
    (root / "docs.jsonl").write_text(
        "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents), "utf-8"
    )
    sources = tuple(spec("docs.jsonl", language=None) for _ in range(1))
    corpus = run_stage(extract, ExtractConfig(sources=sources, languages=()), {}, root)
    return run_stage(filter, FilterConfig(**fields), {"corpus": corpus.artifact}, root)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_short_sound_texts_stay(tmp_path: Path, language: str) -> None:
    outcome = run(tmp_path, [{"text": text} for text in GOOD[language]])
    assert texts(outcome.artifact) == GOOD[language]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_junk_goes_with_its_reason(tmp_path: Path, language: str) -> None:
    source = spec("docs.jsonl", language=language)
    (tmp_path / "docs.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in JUNK[language]), "utf-8"
    )
    corpus = run_stage(extract, ExtractConfig(sources=(source,)), {}, tmp_path)
    outcome = run_stage(filter, FilterConfig(), {"corpus": corpus.artifact}, tmp_path)
    assert texts(outcome.artifact) == []
    dropped = dict(reasons(outcome.artifact))
    for text, reason in JUNK[language].items():
        assert dropped[text.strip()] == reason or not reason, text


def test_figures_add_up(tmp_path: Path) -> None:
    junk = [text for of_language in JUNK.values() for text in of_language]
    outcome = run(tmp_path, [{"text": text} for text in [*GOOD["en"], *GOOD["zh"], *junk]])
    metrics = outcome.record.metrics
    rules = metrics["rules"]
    assert metrics["documents"] - metrics["kept"] == sum(rule["first"] for rule in rules.values())
    lost = sum(rule["bytes_lost"] for rule in rules.values())
    assert metrics["bytes"] - metrics["bytes_kept"] == lost
    for rule in rules.values():
        assert rule["evaluated"] >= rule["fires"] >= max(rule["fires_alone"], rule["first"])
        assert rule["fires"] == sum(group["fires"] for group in rule["by"].values())
    assert rules["too_short"]["evaluated"] == metrics["documents"]
    kept = sum(group["kept"] for group in metrics["kept_by"].values())
    assert kept == metrics["kept"] == len(texts(outcome.artifact))
    tables = json.loads((outcome.artifact.logs / "tables.json").read_text("utf-8"))
    for row in tables["rules"]:
        parts = [part for part in tables["rules_by_domain"] if part["rule"] == row["rule"]]
        for name in ("fires", "fires_alone", "first", "bytes_lost"):
            assert row[name] == sum(part[name] for part in parts)


def test_examples_show_dropped_and_borderline_texts(tmp_path: Path) -> None:
    documents = [{"text": "no " * n} for n in range(1, 5)] + [{"text": "It is on the river."}]
    outcome = run(tmp_path, documents, examples=2)
    examples = json.loads((outcome.artifact.logs / EXAMPLES).read_text("utf-8"))
    dropped = examples["dropped"]["too_short"]
    assert len(dropped) == 2
    assert all(len(row["excerpt"]) < 15 for row in dropped)
    assert all(len(rows) <= 2 for rows in examples["borderline"].values())
    # 19 characters where 15 are the least
    assert [row["value"] for row in examples["borderline"]["too_short"]] == [19]
    tables = json.loads((outcome.artifact.logs / "tables.json").read_text("utf-8"))
    shown = {row["rule"]: row["text"] for row in tables["borderline_examples"]}
    assert shown == {"too_short": "It is on the river."}
    assert [row["text"] for row in tables["dropped_examples"]] == [r["excerpt"] for r in dropped]


def test_a_bound_costs_no_new_statistics(tmp_path: Path) -> None:
    documents = [{"text": text} for text in GOOD["en"]]
    run(tmp_path, documents)
    outcome = run(tmp_path, documents, min_chars=60)
    assert outcome.record.metrics["shards"] == {"built": 0, "reused": 1}
    assert texts(outcome.artifact) == GOOD["en"][1:]


def test_rules_can_be_moved_and_switched_off(tmp_path: Path) -> None:
    menu = "\n".join(["Home", "About the shop", "Contact us here", "Login", "Search"])
    assert texts(run(tmp_path, [{"text": menu}]).artifact) == []
    off = run(tmp_path, [{"text": menu}], preset="none")
    assert texts(off.artifact) == [menu]
    moved = FilterConfig(bounds={"ended_lines": Bounds(minimum=0.5)})
    assert {r.minimum for r in moved.rules() if r.name == "ended_lines"} == {0.5}
    assert moved.identity() != FilterConfig().identity()
    with pytest.raises(ValueError, match="no rule mystery"):
        FilterConfig(off=("mystery",)).rules()


def test_rules_of_the_recipe_are_on_any_statistic(tmp_path: Path) -> None:
    sentences = Rule(name="talkative", statistic="sentences", maximum=2)
    outcome = run(tmp_path, [{"text": text} for text in GOOD["en"]], more_rules=(sentences,))
    # The third text has three sentences, the second two of them.
    assert texts(outcome.artifact) == GOOD["en"][:2]
    with pytest.raises(
        ValueError, match=r"about mystery, which is not counted; choose among .*bytes"
    ):
        run(tmp_path, [{"text": "a"}], more_rules=(Rule(name="x", statistic="mystery", minimum=1),))


@pytest.mark.parametrize(
    ("preset", "language", "kept"),
    [("en_published", "en", 0), ("zh_published", "zh", 0), ("en_published", "zh", 2)],
)
def test_published_bounds_drop_short_texts_of_their_language(
    tmp_path: Path, preset: Any, language: str, kept: int
) -> None:
    # No text has five sentences or 50 words (80 characters and as many words in Chinese).
    short = GOOD[language][:2]
    outcome = run(tmp_path, [{"text": text} for text in short], preset=preset)
    assert len(texts(outcome.artifact)) == kept


def test_plain_three_sigma_by_hand(tmp_path: Path) -> None:
    # ln of 20 characters 99 times and of 20 e^2 = 148 once: mean ln 20 + 0.02, deviation 0.2; the long
    # one is (2 - 0.02) / 0.2 = 9.9 deviations away.
    documents = [{"text": f"{n:02}".ljust(20, "a")} for n in range(99)] + [{"text": "b" * 148}]
    add_file(tmp_path, "a.jsonl", documents)
    sources = (spec("docs/*.jsonl", language="en"),)
    corpus = run_stage(extract, ExtractConfig(sources=sources), {}, tmp_path).artifact
    plainly = FilterConfig(preset="none", outlier_min_sigma=0.01, outlier_spread="plain")
    plain = run_stage(filter, plainly, {"corpus": corpus}, tmp_path)
    assert [reason for _, reason in reasons(plain.artifact)] == ["length_outlier"]
    [row] = json.loads((plain.artifact.files / "plain_lengths.json").read_text("utf-8"))
    assert row["deviation"] == pytest.approx(0.2, abs=0.002)
    wider = plainly.model_copy(update={"outlier_sigmas": 10.0})
    ten = run_stage(filter, wider, {"corpus": corpus}, tmp_path)
    assert reasons(ten.artifact) == []


def test_length_outliers_are_per_language_and_source(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["the", "boat", "was", "on", "a", "river", "and", "it", "had", "two", "men", "bread"]
    usual = [
        " ".join(rng.choices(words, k=rng.randint(45, 55))).capitalize() + "." for _ in range(120)
    ]
    long = " ".join(f"{' '.join(rng.choices(words, k=9))} {n}." for n in range(200))
    zh = GOOD["zh"][2]
    documents = [{"text": text} for text in [*usual, long, zh]]
    settings = {"preset": "none", "outlier_min_documents": 100}
    dropped = dict(reasons(run(tmp_path, documents, **settings).artifact))
    # One Chinese text is too few for a distribution of its own; it is not held against the English.
    assert dropped == {long: "length_outlier"}
    none = run(tmp_path, documents, preset="none", outlier_sigmas=None)
    assert len(texts(none.artifact)) == 122


def in_words(count: int, seed: int) -> str:
    """A sentence of that many words."""
    return " ".join(random.Random(seed).choices(["the", "boat", "on", "a", "river"], k=count)) + "."


def filtered(root: Path, pinned: Any = None, **spec_fields: Any) -> Any:
    sources = (spec("docs/*.jsonl", **spec_fields),)
    corpus = run_stage(extract, ExtractConfig(sources=sources, languages=()), {}, root)
    inputs = {"corpus": corpus.artifact} | ({"pinned": pinned} if pinned else {})
    return run_stage(filter, FilterConfig(preset="none"), inputs, root)


def add_file(root: Path, name: str, documents: list[dict[str, Any]]) -> None:
    (root / "docs").mkdir(exist_ok=True)
    lines = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents)
    (root / "docs" / name).write_text(lines, "utf-8")


def test_pinned_lengths_decide_about_new_shards_and_leave_old_ones_as_they_were(
    tmp_path: Path,
) -> None:
    usual = [in_words(50, seed) for seed in range(120)]
    long, longer = in_words(1500, 1), [in_words(1500, seed) for seed in range(2, 302)]
    add_file(tmp_path, "a.jsonl", [{"text": text} for text in [*usual, long]])
    first = filtered(tmp_path, language="en")
    assert dict(reasons(first.artifact)) == {long: "length_outlier"}
    add_file(tmp_path, "b.jsonl", [{"text": text} for text in longer])
    # 300 long texts among 421 make long the usual length: what was dropped first comes back.
    anew = filtered(tmp_path, language="en")
    assert long in texts(anew.artifact)
    pinned = filtered(tmp_path, first.artifact, language="en")
    assert pinned.record.metrics["shards"] == {"built": 0, "reused": 2}
    assert texts(pinned.artifact) == usual
    assert dict(reasons(pinned.artifact)) == dict.fromkeys([long, *longer], "length_outlier")
    # An extension can be extended: it holds the same figures.
    again = filtered(tmp_path, pinned.artifact, language="en")
    assert (again.artifact.files / LENGTHS).read_bytes() == (
        first.artifact.files / LENGTHS
    ).read_bytes()


def test_a_language_that_the_pinned_corpus_did_not_know_has_its_own_lengths(tmp_path: Path) -> None:
    add_file(tmp_path, "a.jsonl", [{"text": in_words(50, seed)} for seed in range(120)])
    first = filtered(tmp_path)
    long = "".join(f"第{n}条船在河上。" for n in range(999))
    zh = [f"第{n}条船在河上走了很久，天黑了才回到家里。" for n in range(120)]
    add_file(tmp_path, "b.jsonl", [{"text": text} for text in [*zh, long]])
    pinned = filtered(tmp_path, first.artifact)
    assert dict(reasons(pinned.artifact)) == {long: "length_outlier"}
    lengths = json.loads((pinned.artifact.files / LENGTHS).read_text("utf-8"))
    assert [(row["language"], row["documents"]) for row in lengths] == [("en", 120), ("zh", 121)]


def test_only_a_filtered_corpus_can_be_pinned(tmp_path: Path) -> None:
    add_file(tmp_path, "a.jsonl", [{"text": GOOD["en"][0]}])
    sources = (spec("docs/*.jsonl"),)
    corpus = run_stage(extract, ExtractConfig(sources=sources, languages=()), {}, tmp_path)
    with pytest.raises(ValueError, match=r"holds no lengths.json.*run once without --extend"):
        filtered(tmp_path, corpus.artifact)


def test_bad_word_lists_are_optional(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("boats\n", "utf-8")
    outcome = run(tmp_path, [{"text": text} for text in GOOD["en"]], bad_words=(spec("bad.txt"),))
    assert texts(outcome.artifact) == GOOD["en"][:2]
    assert outcome.record.metrics["rules"]["bad_words"]["first"] == 1


def test_empty_one_and_poisoned(tmp_path: Path) -> None:
    assert texts(run(tmp_path, []).artifact) == []
    one = run(tmp_path, [{"text": GOOD["zh"][0]}])
    assert texts(one.artifact) == [GOOD["zh"][0]]
    poison = [
        {"text": text} for text in ("\ufffd" * 500, "\n".join("." * 99), "9" * 10**6, "🙂" * 50)
    ]
    assert texts(run(tmp_path, poison).artifact) == []


def test_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    digests: list[str] = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        digests.append(run(tmp_path / name, [{"text": t} for t in GOOD["zh"]]).record.digest)
    assert digests[0] == digests[1]


def test_every_rule_of_a_preset_names_its_source() -> None:
    for rules in PRESETS.values():
        assert all(rule.source for rule in rules)
        assert all(rule.minimum is not None or rule.maximum is not None for rule in rules)


@pytest.mark.parametrize(
    ("name", "domain", "least"),
    [
        ("pretrain/en_c4_minimal/validation.jsonl.zst", "web", 0.85),
        ("pretrain/zh_csl_abstracts/abstracts.jsonl.zst", "papers", 0.95),
        ("pretrain/zh_mnbvc_sample/MNBVC_news.jsonl.zst", "news", 0.7),
    ],
)
def test_real_text_keeps_a_sensible_share(
    shared_data: Path, tmp_path: Path, name: str, domain: str, least: float
) -> None:
    sources = (spec(shared_data / name, domain=domain),)
    corpus = run_stage(extract, ExtractConfig(sources=sources), {}, tmp_path)
    outcome = run_stage(filter, FilterConfig(), {"corpus": corpus.artifact}, tmp_path)
    assert isinstance(outcome.artifact, Corpus)
    kept, documents = outcome.record.metrics["kept"], outcome.record.metrics["documents"]
    assert kept / documents >= least, outcome.record.metrics["rules"]
