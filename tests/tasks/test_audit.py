"""The audit counts by hand-made truth: what each stage was right and wrong about."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from conf.audit import AuditConfig
from storage.corpus import Corpus, ShardEntry, ShardWriter, document_of
from storage.scores import Figure
from storage.world import World
from tasks.audit import audit
from tasks.stage import Job

GOOD = "one two three four five six seven eight nine ten"
OTHER = "猫住在山洞里狗住在河边鸟住在森林里"
# 10 words give 6 shingles; with one word more at the end 7, of which 6 are shared: J = 6/7.
NEAR = GOOD + " eleven"
# 3 shingles shared (first 7 words), 3 + 3 not: J = 3/9 -- but planted as 0.65, which the truth file says.
DISTINCT = "one two three four five six seven red blue white"


def page(url: str, kind: str, text: str, **more: Any) -> dict[str, Any]:
    return {"url": url, "kind": kind, "text": text, "of_url": None, "jaccard": None, **more}


TRUTH = [
    page("a", "good", GOOD),
    page("b", "good", OTHER),
    page("c", "near_copy", NEAR, of_url="a", jaccard=6 / 7),
    page("d", "near_copy", DISTINCT, of_url="b", jaccard=0.65),
    page("e", "exact_copy", OTHER, of_url="b", jaccard=1.0),
    page("f", "short", "hi"),
    page("g", "garbage", "%&/("),
    page("h", "blocked", "spam spam spam spam spam"),
    page("i", "leak", "what is the question of the exam that nobody may see before"),
]
ALL = [entry["url"] for entry in TRUTH]


class Desk:
    """A folder of artifacts with a world of nine pages and corpora over them."""

    def __init__(self, root: Path, truth: Sequence[Mapping[str, Any]] = TRUTH) -> None:
        self.root = root
        self.texts = {entry["url"]: entry["text"] for entry in truth}
        path = root / "world"
        (path / "files" / "truth").mkdir(parents=True)
        rows = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in truth)
        (path / "files" / "truth" / "pages.jsonl").write_text(rows, "utf-8")
        self.world = World(path)

    def extracted(self, urls: Sequence[str]) -> Corpus:
        shard = self.root / "part" / "files" / "shard.parquet"
        with ShardWriter(shard) as writer:
            for url in urls:
                writer.append(document_of(self.texts[url], source="web", url=url))
        corpus = Corpus(self.root / "extract")
        entry = ShardEntry("part", "0", len(urls), 0, "part")
        Corpus.write_shards(corpus.files, [entry], "extract")
        return corpus

    def derived(self, upstream: Corpus, stage: str, dropped: Sequence[str]) -> Corpus:
        corpus = Corpus(self.root / stage)
        corpus.files.mkdir(parents=True)
        keeps = [
            pl.DataFrame(
                {
                    "keep": [url not in dropped for url in frame["url"]],
                    "reason": ["rule" if url in dropped else None for url in frame["url"]],
                },
                schema={"keep": pl.Boolean, "reason": pl.String},
            )
            for frame in upstream.scan(["url"], kept_only=False)
        ]
        Corpus.write(corpus.files, upstream, keeps, stage)
        return corpus

    def audit(self, corpora: dict[str, Corpus]) -> tuple[dict[str, Figure], Job]:
        path = self.root / "audit"
        (path / "files").mkdir(parents=True)
        # The stage reads its inputs only, so it needs no store.
        job = Job(node="audit", stage="audit", path=path, store=None)  # type: ignore[arg-type]
        return audit(job, self.world, corpora, AuditConfig()).figures(), job


def chain(desk: Desk, *drops: Sequence[str], extracted: Sequence[str]) -> dict[str, Corpus]:
    corpora = {"extract": desk.extracted(extracted)}
    upstream = corpora["extract"]
    for stage, dropped in zip(("filter", "dedup", "decontaminate"), drops, strict=True):
        upstream = corpora[stage] = desk.derived(upstream, stage, dropped)
    return corpora


def test_flawless_stages_score_one(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    read = [url for url in ALL if url != "h"]
    figures, job = desk.audit(chain(desk, ["f", "g"], ["c", "e"], ["i"], extracted=read))
    counts = {name: (figure.value, figure.n) for name, figure in figures.items()}
    assert counts["extract/sound_found"] == (1, 6)
    assert counts["extract/text_f1"] == (1, 6)
    assert counts["junk/removed"] == (1, 3)
    assert counts["junk/blocked_removed"] == (1, 1)
    assert counts["sound/lost"] == (0, 6)
    assert counts["copies/exact_removed"] == (1, 1)
    assert counts["copies/near_removed"] == (1, 1)
    assert counts["copies/distinct_kept"] == (1, 1)
    assert counts["copies/precision"] == (1, 2)
    assert counts["copies/alone"] == (1, 4)
    assert counts["leaks/removed"] == (1, 1)
    assert counts["leaks/recall"] == (1, 1)
    assert counts["leaks/others_kept"] == (1, 3)
    funnel = {row["kind"]: row for row in job.tables["pages"]}
    assert funnel["near_copy"] == {
        "kind": "near_copy",
        "planted": 2,
        "extract": 2,
        "filter": 2,
        "dedup": 1,
        "decontaminate": 1,
    }
    assert (job.logs / "mistakes.jsonl").read_text("utf-8") == ""


def test_every_mistake_is_counted_where_it_was_made(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    # The blocked page is read; the filter keeps the garbage and loses b; dedup drops d, which is a copy
    # of nothing, and keeps both a and c; the leak stays and decontaminate drops c.
    figures, job = desk.audit(chain(desk, ["f", "b"], ["d"], ["c"], extracted=ALL))
    counts = {name: (figure.value, figure.n) for name, figure in figures.items()}
    assert counts["junk/removed"] == (pytest.approx(1 / 3), 3)
    assert counts["junk/garbage_removed"] == (0, 1)
    assert counts["junk/blocked_removed"] == (0, 1)
    assert counts["sound/lost"] == (pytest.approx(1 / 6), 6)
    assert counts["copies/near_removed"] == (0, 1)
    # b was lost before, so neither its copy e nor the pair with d reached dedup as a pair.
    assert counts["copies/exact_removed"][1] == 0
    assert counts["copies/distinct_kept"][1] == 0
    assert counts["copies/precision"] == (0, 1)
    # a and c are copies of each other among a, c, e, g, h, i.
    assert counts["copies/alone"] == (pytest.approx(4 / 6), 6)
    assert counts["leaks/removed"] == (0, 1)
    assert counts["leaks/others_kept"] == (pytest.approx(4 / 5), 5)
    mistakes = [json.loads(line) for line in (job.logs / "mistakes.jsonl").open(encoding="utf-8")]
    assert {(row["figure"], row["url"]) for row in mistakes} == {
        ("junk/removed", "g"),
        ("junk/removed", "h"),
        ("sound/kept", "b"),
        ("copies/near_removed", "c"),
        ("copies/precision", "d"),
        ("copies/alone", "a"),
        ("copies/alone", "c"),
        ("leaks/removed", "i"),
        ("leaks/others_kept", "c"),
    }


def test_copy_counts_as_removed_when_the_original_went_instead(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    figures, _ = desk.audit(chain(desk, [], ["a", "b"], [], extracted=ALL))
    assert figures["copies/near_removed"].value == 1
    assert figures["copies/exact_removed"].value == 1
    assert figures["copies/precision"].value == 1


def test_interval_of_a_share_is_wilsons(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    figures, _ = desk.audit({"extract": desk.extracted(["a", "b", "c"])})
    found = figures["extract/sound_found"]
    # p = 3/6, z = 1.96: centre 1/2, half width z / (1 + z^2/6) * sqrt(1/24 + z^2/144) = 0.3123.
    assert (found.value, found.n) == (0.5, 6)
    assert found.low == pytest.approx(0.1876, abs=1e-3)
    assert found.high == pytest.approx(0.8124, abs=1e-3)


def test_stages_that_are_not_given_are_not_judged(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    figures, _ = desk.audit({"extract": desk.extracted(ALL)})
    assert not [name for name in figures if name.startswith(("copies/", "leaks/"))]
    # Without a filter, junk is what extraction let through.
    assert figures["junk/removed"].value == 0


def test_empty_corpus_has_lost_everything(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    figures, _ = desk.audit(chain(desk, [], [], [], extracted=[]))
    assert figures["extract/sound_found"].value == 0
    assert figures["junk/removed"].value == 1
    assert figures["sound/lost"].value == 1
    assert figures["copies/precision"].n == 0


def test_page_that_the_world_did_not_plant_is_no_accident(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.texts["z"] = "a page of somebody else"
    figures, _ = desk.audit(chain(desk, [], ["z"], [], extracted=[*ALL, "z"]))
    assert figures["copies/precision"].value == 0
    assert figures["extract/sound_found"].value == 1


def test_unknown_role_is_refused(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    with pytest.raises(ValueError, match=r"names final; expected some of extract, filter"):
        desk.audit({"final": desk.extracted(ALL)})


def test_audit_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    written: list[bytes] = []
    for name in ("x", "y"):
        desk = Desk(tmp_path / name)
        _, job = desk.audit(chain(desk, ["f"], ["c"], ["i"], extracted=ALL))
        written.append((job.files / "scores.json").read_bytes())
    assert written[0] == written[1]


def test_without_dedup_the_copies_are_found_to_survive(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    corpora = chain(desk, ["f", "g"], [], ["i"], extracted=[url for url in ALL if url != "h"])
    del corpora["dedup"]
    figures, _ = desk.audit(corpora)
    counts = {name: (figure.value, figure.n) for name, figure in figures.items()}
    assert counts["copies/exact_removed"] == (0, 1)
    assert counts["copies/near_removed"] == (0, 1)
    assert counts["copies/distinct_kept"] == (1, 1)
    assert counts["leaks/removed"] == (1, 1)
    assert "copies/precision" not in counts
