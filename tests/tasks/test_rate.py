"""People rate pairs without names: by the table, by the page in a real browser, and back."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from conf.rate import RateConfig
from conf.settings import SourceSpec
from storage import scores
from storage.scores import Scores
from storage.source import HashCache, resolve
from tasks.rate import rate
from tasks.stage import Job
from tests.browser import chromium, opened
from tests.tasks.test_judge import scores_at
from tests.tasks.text_jobs import digest_of, job_at

ANSWERS = {
    "good": {"猫吃什么？": "猫吃鱼。", "Say </script> & \"x\"": "a, \"b\"\nc", "Same?": "yes"},
    "bad": {"猫吃什么？": "<b>走开</b>", "Say </script> & \"x\"": "Go away.", "Same?": "yes"},
}  # fmt: skip


@pytest.fixture
def answers(tmp_path: Path) -> dict[str, Scores]:
    return {name: scores_at(tmp_path / name, told) for name, told in ANSWERS.items()}


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here looks at the ends of an interval, which cost seconds."""
    monkeypatch.setattr(scores, "BOOTSTRAP_RESAMPLES", 20)


def made_by(
    root: Path, name: str, answers: dict[str, Scores], judge: Scores | None = None, **fields: Any
) -> tuple[Job, Scores]:
    settings = RateConfig(**fields)
    job = job_at(root, name)
    sources = {
        name: resolve(specs, artifacts={}, base=root, ledger=None, hashes=HashCache())
        for name, specs in settings.source_fields()
    }
    job = Job(node=name, stage="rate", path=job.path, store=job.store, sources=sources)
    return job, rate(job, answers=answers, settings=settings, judge=judge)


def table_of(job: Job) -> list[dict[str, str]]:
    with (job.files / "pairs.csv").open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def write_ratings(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def test_the_table_is_blind_and_comes_back(tmp_path: Path, answers: dict[str, Scores]) -> None:
    job, made = made_by(tmp_path, "made", answers)
    rows = table_of(job)
    assert made.figures() == {}
    assert {row["question"] for row in rows} == set(ANSWERS["good"]) - {"Same?"}
    for name in ("pairs.csv", "rate.html"):
        text = (job.files / name).read_text("utf-8-sig").replace("Equally good", "")
        assert "good" not in text
        assert "bad" not in text
    for row in rows:  # the good answers are preferred, whatever the side
        is_left = row["left"] == ANSWERS["good"][row["question"]]
        row["verdict"] = "left" if is_left else "right"
    write_ratings(tmp_path / "one.csv", rows)
    job, made = made_by(tmp_path, "rated", answers, ratings=(SourceSpec(path="*.csv"),))
    assert made.figures()["wins/bad_over_good"].value == 0
    assert made.figures()["wins/bad_over_good"].n == 2
    assert job.metrics == {"pairs": 2, "ratings": 2, "raters": 1, "stale": 0}
    again, _ = made_by(tmp_path, "again", answers, ratings=(SourceSpec(path="*.csv"),))
    assert digest_of(again.files) == digest_of(job.files)


def test_no_cell_of_the_table_is_a_formula(tmp_path: Path) -> None:
    told = {"x": {"=1+1": "- one\n- two"}, "y": {"=1+1": '=HYPERLINK("http://a")'}}
    answers = {name: scores_at(tmp_path / name, given) for name, given in told.items()}
    job, _ = made_by(tmp_path, "made", answers)
    (row,) = table_of(job)
    shown = {row["question"], row["left"], row["right"]}
    assert shown == {"'=1+1", "'- one\n- two", '\'=HYPERLINK("http://a")'}


def test_names_and_their_order_do_not_decide_the_sides(
    tmp_path: Path, answers: dict[str, Scores]
) -> None:
    one, _ = made_by(tmp_path, "one", answers)
    turned = {"a": answers["good"], "b": answers["bad"]}
    other, _ = made_by(tmp_path, "other", turned)
    assert table_of(one) == table_of(other)
    many = {
        name: scores_at(tmp_path / f"many{name}", {f"{i}?": f"{name}{i}" for i in range(200)})
        for name in ("x", "y")
    }
    job, _ = made_by(tmp_path, "many", many)
    left = sum(row["left"].startswith("x") for row in table_of(job))
    assert 70 < left < 130  # 100 +- 4 deviations


def test_raters_are_compared_with_the_judge(tmp_path: Path, answers: dict[str, Scores]) -> None:
    job, _ = made_by(tmp_path, "made", answers)
    rows = table_of(job)
    for row in rows:
        row["verdict"] = "Left " if row["left"] == ANSWERS["good"][row["question"]] else "right"
    write_ratings(tmp_path / "ann.csv", [{**row, "rater": "ann"} for row in rows])
    stale = {**rows[0], "id": "0" * 16, "rater": "bo"}
    empty = {**rows[1], "verdict": "", "rater": "bo"}
    tie = {**rows[0], "verdict": "tie", "rater": "bo"}
    write_ratings(tmp_path / "bo.csv", [stale, empty, {**rows[0], "rater": "bo"}, tie])
    judged = [
        {"question": row["question"], "one": "good", "other": "bad", "verdict": "one"}
        for row in made_by(tmp_path, "x", answers, ratings=(SourceSpec(path="ann.csv"),))[
            1
        ].judgements()
    ]
    (tmp_path / "judge" / "files").mkdir(parents=True)
    score = {"question": judged[0]["question"], "name": "good", "score": 9}
    Scores.write(tmp_path / "judge" / "files", {}, judgements=[score, *judged])
    job, made = made_by(
        tmp_path, "both", answers, Scores(tmp_path / "judge"), ratings=(SourceSpec(path="*.csv"),)
    )
    assert job.metrics == {"pairs": 2, "ratings": 3, "raters": 2, "stale": 1}
    figures = made.figures()
    assert figures["wins/bad_over_good"].value == pytest.approx(0.5 / 3)
    assert figures["agreement"].value == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [("id,verdict\nx,maybe\n", "line 2: verdict 'maybe'"), ("a,b\n1,2\n", "has the columns")],
)
def test_a_poisoned_rating_names_its_place(
    tmp_path: Path, answers: dict[str, Scores], text: str, message: str
) -> None:
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.csv.*" + message):
        made_by(tmp_path, "made", answers, ratings=(SourceSpec(path="bad.csv"),))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


def test_the_page_is_rated_by_keyboard_and_its_file_comes_back(
    tmp_path: Path, answers: dict[str, Scores], browser: Browser
) -> None:
    job, _ = made_by(tmp_path, "made", answers)
    with opened(browser, (job.files / "rate.html").as_uri()) as page:
        expect(page.locator("#place")).to_have_text("Pair 1 of 2, 0 rated")
        page.locator("#rater").fill("王芳 1")  # digits in the name are no verdicts
        page.locator("#place").click()
        for _ in range(2):
            question = page.locator("#question").inner_text()
            is_left = page.locator("#left").inner_text() == ANSWERS["good"][question]
            page.keyboard.press("1" if is_left else "3")
        expect(page.locator("#place")).to_have_text("Pair 2 of 2, 2 rated")
        # Back, undecided after all; what was said is there after a reload.
        page.keyboard.press("ArrowLeft")
        page.reload()
        expect(page.locator("#place")).to_have_text("Pair 1 of 2, 2 rated")
        expect(page.locator("[aria-pressed=true]")).to_have_count(1)
        page.locator("[data-verdict=tie]").click()
        with page.expect_download() as download:
            page.locator("#save").click()
        assert page.evaluate("[shown('=1'), shown('1=')]") == ["'=1", "1="]
        assert download.value.suggested_filename == "ratings-王芳_1.csv"
        download.value.save_as(tmp_path / "saved.csv")
    job, made = made_by(tmp_path, "rated", answers, ratings=(SourceSpec(path="saved.csv"),))
    assert job.metrics == {"pairs": 2, "ratings": 2, "raters": 1, "stale": 0}
    assert sorted(row["verdict"] for row in made.judgements()) == ["other", "tie"]
    assert {row["rater"] for row in made.judgements()} == {"王芳 1"}


def test_the_page_fits_a_phone(
    tmp_path: Path, answers: dict[str, Scores], browser: Browser
) -> None:
    job, _ = made_by(tmp_path, "made", answers)
    with opened(browser, (job.files / "rate.html").as_uri(), width=400) as page:
        page.locator("[data-verdict=left]").click()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 400
