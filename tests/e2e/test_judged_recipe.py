"""A whole recipe from crawl to answers that a judge and people compare, and the report that says it."""

import csv
import re
from pathlib import Path

import pytest

from flows.execution import Execution
from flows.preparation import Request, prepare
from flows.report import write_report
from flows.runs import open_home
from storage.scores import Scores
from tasks.answer_pairs import answered_by_all
from tests.tasks.endpoint_stand_in import Reply, completion, endpoint

RECIPE = """
seed: 0
launch: {threads: 1}
shape: {dim: 32, layers: 1, heads: 2, kv_heads: 1, context: 128}
stages:
  world: {warcs: 1, good_pages: 24, animals: 6, chats: 60, pairs: 60, held_pairs: 10}
  extract: {sources: [{node: world, path: "crawl/*.warc.gz", domain: web}]}
  tokenizer: {from: {corpus: extract}, vocabulary: 300}
  tokenize: {from: {corpus: extract, tokenizer: tokenizer}}
  pretrain: {from: {tokens: tokenize}, tokens: 10240, batch_tokens: 512, held_tokens: 1000}
  chats: {sources: [{node: world, path: chats/train.jsonl}]}
  sft: {from: {policy: pretrain, conversations: chats}, max_steps: 20, batch_rows: 8, held_rows: 4}
  pairs: {sources: [{node: world, path: preferences/train.jsonl}]}
  dpo: {from: {policy: sft, preferences: pairs}, max_steps: 20, batch_rows: 8, learning_rate: 1.0e-2}
  evaluate_sft: {uses: evaluate, from: {policy: sft}, prompts: &asked ["猫吃什么？", "What is a fox?", "写一句话。"]}
  evaluate_dpo: {uses: evaluate, from: {policy: dpo, reference: sft}, prompts: *asked}
  judge: {from: {answers: {sft: evaluate_sft, dpo: evaluate_dpo}}, model: m, base_url: URL}
  rate:
    from: {answers: {sft: evaluate_sft, dpo: evaluate_dpo}, judge: judge}
    ratings: [{path: ratings.csv, is_optional: true}]
"""
HEADING = r"\[(?:问题|回答|助手 . 的回答|Question|Answer|Answer of assistant .)\]\n"
"""What stands before the question and before each answer in the judge's prompts."""


def longer_is_better(prompt: str, times: int) -> Reply:
    """A judge without a bias for an order: of two answers it likes the one with more letters."""
    _, _, *answers = re.split(HEADING, prompt)
    sizes = [len(answer.removesuffix("\n\n")) for answer in answers]
    if len(sizes) == 1:
        return completion(f"[[{min(10, 1 + sizes[0] // 20)}]]")
    first, second = sizes
    return completion(f"[[{'C' if first == second else 'A' if first > second else 'B'}]]")


def run(folder: Path) -> Execution:
    execution = prepare(Request(str(folder / "judged.yaml"), []), open_home(), base=folder)
    execution.start()
    while (name := execution.next_ready(execution.selected)) is not None:
        execution.run(name)
    execution.finish(0.0)
    assert execution.record.status == "done"
    return execution


def scores_of(execution: Execution, name: str) -> Scores:
    scores = execution.lookup.artifacts[name]
    assert isinstance(scores, Scores)
    return scores


def text_of(page: Path) -> str:
    """Without the places where names may break."""
    return page.read_text("utf-8").replace("<wbr>", "")


@pytest.mark.soak
def test_answers_are_judged_and_rated_and_the_report_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESSEMER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BESSEMER_WORKERS", "1")
    with endpoint(longer_is_better) as (url, asked):
        (tmp_path / "judged.yaml").write_text(RECIPE.replace("URL", url), "utf-8")
        first = run(tmp_path)
        evaluations = {name: scores_of(first, f"evaluate_{name}") for name in ("sft", "dpo")}
        answered = answered_by_all(evaluations)
        sizes = [(len(item.answers["sft"]), len(item.answers["dpo"])) for item in answered]
        assert len(sizes) == 3
        # Two scores and two orders a question; equal questions to the judge are asked once.
        assert 0 < len(asked) <= 4 * len(sizes)
        assert set(asked.values()) == {1}

        figures = scores_of(first, "judge").figures()
        won = [1.0 if sft > dpo else 0.5 if sft == dpo else 0.0 for sft, dpo in sizes]
        name = "sft_over_dpo" if "wins/sft_over_dpo" in figures else "dpo_over_sft"
        expected = sum(won) / 3 if name == "sft_over_dpo" else 1 - sum(won) / 3
        assert figures[f"wins/{name}"].value == pytest.approx(expected)
        assert figures[f"consistent/{name}"].value == 1.0

        page = write_report(first.folder, first.lookup.store)
        told = text_of(page)
        assert f"judged better, {name}" in told
        (address,) = re.findall(r'href="([^"]*rate\.html)"', told)
        assert (page.parent / address).read_text("utf-8").startswith("<!doctype html>")

        # People say what the judge said of the pairs that differ.
        rating_page = (page.parent / address).parent
        with (rating_page / "pairs.csv").open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream))
        for row in rows:
            more = len(row["left"]) - len(row["right"])
            row["verdict"] = "left" if more > 0 else "right" if more else "tie"
        with (tmp_path / "ratings.csv").open("w", encoding="utf-8", newline="") as stream:
            table = csv.DictWriter(stream, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        second = run(tmp_path)
        built = [n for n, stage in second.record.stages.items() if stage.status == "built"]
        assert built == ["rate"]
        assert set(asked.values()) == {1}
    rated = scores_of(second, "rate").figures()
    assert rated["agreement"].value == 1.0
    told = text_of(write_report(second.folder, second.lookup.store))
    assert f"preferred by people, {name}" in told
    assert f"({len(rows)} ratings so far)" in told
