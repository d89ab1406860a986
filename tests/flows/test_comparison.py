"""Runs side by side, model cards and plans as pages, from records made by hand."""

import re
from base64 import b64decode
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from conf.shape import ShapeConfig
from flows.comparison import compared, differences, recipe_changes, write_comparison
from flows.model_card import model_card
from flows.pictures import pictures
from flows.report import write_report
from flows.runs import Home, RunRecord, StageRecord
from storage.checkpoint import ModelCard
from storage.record import InputEntry, Record
from storage.scores import Figure, Scores
from storage.store import Store
from tests.browser import chromium, opened

SHAPE = ShapeConfig(dim=32, layers=1, heads=2, kv_heads=1)


def committed(store: Store, stage: str, kind: str, **fields: Any) -> Record:
    """An artifact whose folder `write` filled."""
    write = fields.pop("write")
    fingerprint = f"{len(list(store.records())) + 1:x}" * 64
    claim = store.claim(fingerprint)
    assert claim
    with claim:
        write(claim.path / "files")
        record = Record(
            fingerprint=fingerprint, kind=kind, stage=stage, digest="", node=fields.pop("node", stage),
            identity=fields.pop("identity", {}), created=datetime(2026, 1, 1, tzinfo=UTC).isoformat(),
            **fields,
        )  # fmt: skip
        store.commit(claim, record)
    found = store.record(fingerprint)
    assert found
    return found


def entry(record: Record) -> InputEntry:
    return InputEntry(fingerprint=record.fingerprint, digest=record.digest)


def write_policy(step: int) -> Any:
    def write(files: Path) -> None:
        card = ModelCard(
            shape=SHAPE, vocabulary=300, role="policy", tokenizer_digest="d", parameters=12345
        )
        card.write(files)
        (files / "model.safetensors").write_bytes(bytes([step]))

    return write


def add_run(home: Home, run_id: str, accuracy: float, rate: float, answer: str) -> list[Record]:
    """A run of a recipe with the learning rate, whose model scored so; its records."""
    store = home.store()
    policy = committed(
        store, "pretrain", "policy", write=write_policy(int(rate * 1000)), metrics={"loss": rate},
        identity={"settings": {"learning_rate": rate}},
    )  # fmt: skip
    figures = {
        "exam_letter/accuracy": Figure(
            value=accuracy, n=100, low=accuracy - 0.05, high=accuracy + 0.05, chance=0.25
        ),
        "bits_per_byte/all": Figure(value=1.5, n=9, low=1.4, high=1.6),
    }
    answers = [{"id": "prompt/0", "prompt": "你好", "answer": answer, "is_ended": True}]
    curve = [{"step": step, "exam_letter/accuracy": {"value": step / 10}} for step in (1, 2, 3)]
    scores = committed(
        store, "evaluate", "scores", inputs={"policy": entry(policy)},
        write=lambda files: Scores.write(files, figures, answers, curve),
    )  # fmt: skip
    judged = committed(
        store, "judge", "scores", inputs={"answers": {"a": entry(scores)}},
        write=lambda files: Scores.write(
            files, {"wins/dpo_over_sft": Figure(value=0.6, n=20, low=0.4, high=0.8, chance=0.5)}
        ),
    )  # fmt: skip
    records = {"pretrain": policy, "evaluate": scores, "judged": judged}
    stages = {
        name: StageRecord(
            node=name, stage=record.stage, kind=record.kind, flow="evaluation", status="built",
            fingerprint=record.fingerprint, metrics=record.metrics, seconds=1.0,
            path=str(store.find(record.fingerprint)),
        )
        for name, record in records.items()
    }  # fmt: skip
    run = RunRecord(
        run_id=run_id, recipe="hand", recipe_path="hand", status="done", stages=stages,
        composed={"stages": {"pretrain": {"learning_rate": rate, "tokens": 7}}},
    )  # fmt: skip
    run.write(home.run_folder(run_id))
    return list(records.values())


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    add_run(home, "20260101-1", 0.3, 0.001, "你也好")
    add_run(home, "20260102-2", 0.5, 0.002, "好 <b>啊</b>\ufffd")
    return home


def test_what_changed_in_recipe_and_figures(home: Home) -> None:
    sides = compared([], home)
    assert [side.run.run_id for side in sides] == ["20260101-1", "20260102-2"]
    assert recipe_changes(sides) == [("stages pretrain learning_rate", [0.001, 0.002])]
    found = {(item.node, item.name): item for item in differences(sides)}
    # 0.25 to 0.35 and 0.45 to 0.55 do not meet; bits per byte are the same.
    assert found["evaluate", "exam_letter/accuracy"].is_apart
    assert not found["evaluate", "bits_per_byte/all"].is_apart


def test_the_comparison_says_it_on_one_page(home: Home, tmp_path: Path) -> None:
    path = write_comparison(compared([], home), tmp_path / "c.html")
    page = path.read_text("utf-8").replace("<wbr>", "")
    assert "stages pretrain learning_rate" in page
    assert ">0.200<" in page  # 0.5 - 0.3
    assert "你也好" in page
    assert "&lt;b&gt;啊&lt;/b&gt;‹?›" in page
    assert page.count(">apart<") == 2  # among the headlines, and among all
    assert ">loss<" in page  # a number without interval that differs


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["2026"], "2 runs have an id"),
        (["nothing"], "0 runs have an id"),
        (["20260101"], "name two or more"),
        (["20260101", "20260101"], "name two or more"),
    ],
)
def test_runs_that_cannot_be_compared(home: Home, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compared(names, home)


def test_a_model_card_says_what_made_it_and_how_good_it_is(home: Home) -> None:
    store = home.store()
    policy = next(
        r for r in store.records() if r.identity.get("settings") == {"learning_rate": 0.002}
    )
    export = committed(
        store, "export", "export", inputs={"policy": entry(policy)},
        write=lambda files: (files / "x").write_text("x"),
    )  # fmt: skip
    card = model_card(export, store, home)
    assert card.startswith("---\nlanguage:\n- zh\n- en\nlibrary_name: transformers\n")
    assert "12,345 parameters" in card
    assert "| learning_rate | 0.002 |" in card
    assert "| exam, letters | 0.500 | 0.450 to 0.550 | 100 | 0.25 |" in card
    assert "0.300" not in card  # the other model's score
    for row in re.findall(r"^\|.*\|$", card, re.M):
        assert row.count("|") in (3, 6)


def test_a_card_without_its_policy_is_refused(home: Home) -> None:
    store = home.store()
    gone = InputEntry(fingerprint="f" * 64, digest="d")
    export = committed(
        store, "export", "export", inputs={"policy": gone},
        write=lambda files: (files / "x").write_text("x"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="not stored any more"):
        model_card(export, store, home)


def test_the_report_has_curves_over_checkpoints_and_judgements(home: Home) -> None:
    folder = home.run_folder("20260101-1")
    page = write_report(folder, home.store()).read_text("utf-8")
    assert 'id="checkpoints"' in page
    judged = page[page.index('id="judged"') :]
    assert "dpo over sft" in judged


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


def test_report_and_comparison_in_a_browser(home: Home, tmp_path: Path, browser: Browser) -> None:
    report = write_report(home.run_folder("20260101-1"), home.store())
    page_of_two = write_comparison(compared([], home), tmp_path / "c.html")
    for path in (report, page_of_two):
        for width in (1200, 400):
            with opened(browser, path.as_uri(), width=width) as page:
                link = page.locator("nav a").last
                section = page.locator(str(link.get_attribute("href")))
                link.click()
                expect(section).to_be_in_viewport()
                for fold in page.locator("summary").all():
                    fold.click()
                    expect(fold.locator("xpath=..").locator("table").first).to_be_visible()
                # Wide tables scroll in their own frame, the page itself does not.
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                for name in page.locator("svg.graph text:first-of-type").all():
                    assert page.evaluate("e => e.getScreenCTM().a", name.element_handle()) == 1
                if width == 1200:
                    page.emulate_media(media="print", color_scheme="dark")
                    ink = page.evaluate("getComputedStyle(document.body).color")
                    assert ink == "rgb(28, 33, 39)"


def test_curves_are_images_that_need_nothing(tmp_path: Path, browser: Browser) -> None:
    (tmp_path / "logs").mkdir()
    rows = "".join(f'{{"step": {step}, "loss": {1 / (step + 1)}}}\n' for step in range(9))
    (tmp_path / "logs" / "metrics.jsonl").write_text(rows)
    (tmp_path / "files").mkdir()
    half = Figure(value=0.5, n=4, low=0.2, high=0.8, chance=0.25)
    names = ("exam_option/accuracy", "bits_per_byte/web", "wins/dpo_over_sft", "world/kl")
    Scores.write(tmp_path / "files", dict.fromkeys(names, half))
    (title, address), *others = pictures("预训练", tmp_path)
    assert title == "loss"
    # In the order of their names; the KL is of no kind that has an image.
    assert [title for title, _ in others] == ["bits per byte", "accuracy", "wins"]
    drawn = [b64decode(image.partition(",")[2]).decode() for _, image in others]
    for chart, label in zip(drawn, ("web", "exam option", "dpo over sft"), strict=True):
        assert f">{label}<" in chart
    with opened(browser, "about:blank") as page:
        page.set_content(f'<img src="{address}">')
        page.wait_for_function("document.images[0].complete")
        assert page.evaluate("document.images[0].naturalWidth") == 640
    assert list(pictures("none", tmp_path / "nothing")) == []
