"""New data under --extend, with the real data stages: only what is new is worked on."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.execution import Execution
from flows.preparation import Request, prepare
from flows.runs import open_home
from storage.corpus import Corpus

RECIPE = """
data: more
seed: 0
stages:
  world: {warcs: 2, good_pages: 60, chats: 4, pairs: 4, held_pairs: 4}
  extract:
    sources:
      - {node: world, path: "crawl/*.warc.gz", domain: web}
      - {path: "${data}/*.jsonl", domain: web, is_optional: true}
  filter: {from: {corpus: extract}, outlier_min_documents: 20}
  dedup: {from: {corpus: filter}}
  decontaminate: {from: {corpus: dedup}, exams: [{node: world, path: "exam/val/*.csv"}]}
  tokenizer: {from: {corpus: decontaminate}, vocabulary: 400}
  tokenize: {from: {corpus: decontaminate, tokenizer: tokenizer}}
"""
MAPS = ("extract", "filter", "dedup", "decontaminate", "tokenize")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BESSEMER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BESSEMER_WORKERS", "1")
    (tmp_path / "small_world.yaml").write_text(RECIPE, "utf-8")
    return tmp_path


def run(folder: Path, *overrides: str, is_extension: bool = False) -> Execution:
    recipe = str(folder / "small_world.yaml")
    request = Request(recipe, list(overrides), is_extension=is_extension)
    execution = prepare(request, open_home(), base=folder)
    execution.start()
    while (name := execution.next_ready(execution.selected)) is not None:
        execution.run(name)
    execution.finish(0.0)
    assert execution.record.status == "done"
    return execution


def shards(execution: Execution) -> dict[str, tuple[int, int]]:
    """Parts that were built and reused, for each stage that goes by shards."""
    figures = {name: execution.record.stages[name].metrics["shards"] for name in MAPS}
    return {name: (figure["built"], figure["reused"]) for name, figure in figures.items()}


def landings(execution: Execution) -> dict[str, int]:
    return execution.record.stages["dedup"].metrics["landings"]


def built(execution: Execution) -> set[str]:
    return {name for name, node in execution.record.stages.items() if node.status == "built"}


def kept(execution: Execution, shard_count: int) -> list[list[str]]:
    corpus = execution.lookup.artifacts["decontaminate"]
    assert isinstance(corpus, Corpus)
    return [shard.read(["url"])["url"].to_list() for shard in corpus.shards[:shard_count]]


def test_new_files_cost_one_shard_each_and_change_no_earlier_decision(folder: Path) -> None:
    first = run(folder)
    assert shards(first) == dict.fromkeys(MAPS, (2, 0))
    assert landings(first) == {"built": 1, "reused": 0}

    # One more file of the world's own.
    grown = run(folder, "world.warcs=3", is_extension=True)
    assert built(grown) == {"world", *MAPS}
    assert shards(grown) == dict.fromkeys(MAPS, (1, 2))
    assert landings(grown) == {"built": 1, "reused": 1}
    assert kept(grown, 2) == kept(first, 2)
    assert sum(map(len, kept(grown, 3))) > sum(map(len, kept(first, 2)))
    was = first.record.stages
    assert grown.record.stages["tokenizer"].fingerprint == was["tokenizer"].fingerprint
    assert grown.record.frozen["filter.from.pinned"] == was["filter"].fingerprint

    again = run(folder, "world.warcs=3", is_extension=True)
    assert built(again) == set()

    # A file that the user puts beside them.
    (folder / "more").mkdir()
    texts = [
        "船在河上走了很久，天黑了才回到家里，大家都很高兴。",
        "The boat was on the river all day.",
    ]
    lines = [json.dumps({"text": text, "url": f"u{i}"}) for i, text in enumerate(texts)]
    (folder / "more" / "new.jsonl").write_text("\n".join(lines), "utf-8")
    more = run(folder, "world.warcs=3", is_extension=True)
    assert built(more) == set(MAPS)
    assert shards(more) == dict.fromkeys(MAPS, (1, 3))
    assert landings(more) == {"built": 1, "reused": 2}
    assert kept(more, 4) == [*kept(grown, 3), ["u0", "u1"]]
    is_same = grown.record.stages["filter"].fingerprint
    assert more.record.frozen["filter.from.pinned"] == is_same


def test_without_extend_the_same_files_are_one_corpus_with_new_statistics(folder: Path) -> None:
    run(folder)
    anew = run(folder, "world.warcs=3")
    # Texts, statistics and signatures of the old shards are reused all the same; the vocabulary is not.
    assert shards(anew)["extract"] == (1, 2)
    assert shards(anew)["filter"] == (1, 2)
    assert {"tokenizer", *MAPS} <= built(anew)
    assert shards(anew)["tokenize"] == (3, 0)


def test_cat_lists_what_each_stage_dropped_and_why(folder: Path) -> None:
    good = "The boat was on the river all day, and it came home with much fish."
    texts = [good, "menu home login", "船在河上走了很久，天黑了才回到家里，大家都很高兴。", good]
    rows = [json.dumps({"text": text, "url": f"u{i}"}) for i, text in enumerate(texts)]
    (folder / "pages.jsonl").write_text("\n".join(rows), "utf-8")
    (folder / "small_world.yaml").write_text(
        """
stages:
  extract: {sources: [{path: pages.jsonl, domain: web}]}
  filter: {from: {corpus: extract}, min_chars: 20}
  dedup: {from: {corpus: filter}}
""",
        "utf-8",
    )
    run(folder)

    def listed(*arguments: str) -> list[tuple[str, str | None]]:
        done = CliRunner().invoke(app, ["cat", *arguments], catch_exceptions=False)
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert [row["text"] for row in found] == [texts[int(row["url"][1])] for row in found]
        return [(row["url"], row.get("reason")) for row in found]

    assert listed("filter", "--dropped") == [("u1", "too_short")]
    assert listed("dedup", "--dropped") == [("u3", "exact_duplicate")]
    assert [url for url, _ in listed("dedup")] == ["u0", "u2"]
    assert [url for url, _ in listed("extract", "--limit", "1")] == ["u0"]
    assert listed("extract", "--dropped") == []
