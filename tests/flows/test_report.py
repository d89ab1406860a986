"""The report of a run made by hand: what it says, what it does without, and of a run that failed."""

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from flows import charts
from flows.alignment_page import rewards
from flows.drawing import Mark, graph
from flows.headlines import headlines
from flows.page_parts import Section, Table, series_of, write_page
from flows.report import write_report
from flows.runs import RunRecord, StageRecord
from storage.record import Record
from storage.scores import Figure, Scores
from storage.store import Store, open_store

FIGURES = {
    "bits_per_byte/all": Figure(value=0.375, n=35, low=0.31, high=0.44, unit="bits/byte"),
    "xz/bits_per_byte/web": Figure(value=2.0, n=35, low=2.0, high=2.0),
    "bits_per_byte/web": Figure(value=0.375, n=35, low=0.31, high=0.44),
    "world/right": Figure(value=0.75, n=152, low=0.68, high=0.81),
    "exam_option/accuracy": Figure(value=0.5, n=20, low=0.3, high=0.7, chance=0.25),
    "exam_option/accuracy/animals": Figure(value=0.5, n=20, low=0.3, high=0.7, chance=0.25),
}
ANSWERS = [
    {"id": "q#0", "prompt": "猫住在哪里？", "answer": "猫住在山洞里。\ufffd", "is_ended": False},
    {"id": "r#0", "prompt": "Where?", "answer": "<b>In \ufffd</b> a cave.", "is_ended": True},
]


def stage(node: str, name: str, kind: str, **more: object) -> StageRecord:
    return StageRecord.model_validate(
        {"node": node, "stage": name, "kind": kind, "flow": "corpus", **more}
    )


def committed(store: Store, digit: str, name: str, kind: str, write: Callable[[Path], None]) -> str:
    """Fingerprint of an artifact whose folder `write` filled."""
    fingerprint = digit * 64
    claim = store.claim(fingerprint)
    assert claim
    with claim:
        (claim.path / "files" / "x").write_text("x")
        write(claim.path)
        record = Record(
            fingerprint=fingerprint, kind=kind, stage=name, digest="", identity={},
            created=datetime(2026, 1, 1, tzinfo=UTC).isoformat(),
        )  # fmt: skip
        store.commit(claim, record)
    return fingerprint


def write_curve(path: Path) -> None:
    (path / "logs").mkdir(exist_ok=True)
    rows = [{"step": step, "loss": 6 / (1 + step), "gradient_norm": 2.0} for step in range(50)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "logs" / "metrics.jsonl").write_text(text)


def write_scores(path: Path) -> None:
    Scores.write(path / "files", FIGURES, ANSWERS)


def write_tables(path: Path) -> None:
    (path / "logs").mkdir(exist_ok=True)
    table = {"compression": [{"language": "zh", "example": "铁|‹E5 B0›", "by": {"built": 8}}]}
    (path / "logs" / "tables.json").write_text(json.dumps(table))


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunRecord, Store]:
    store = open_store(str(tmp_path / "store"))
    tokenizer = committed(store, "a", "tokenizer", "tokenizer", write_tables)
    policy = committed(store, "b", "dpo", "policy", write_curve)
    scores = committed(
        store,
        "c",
        "evaluate",
        "scores",
        lambda path: Scores.write(path / "files", FIGURES, ANSWERS),
    )
    accuracy = Figure(value=0.9, n=600, low=0.87, high=0.92, chance=0.5).model_dump()
    stages = [
        stage("words", "tokenizer", "tokenizer", status="built", fingerprint=tokenizer),
        stage("dpo", "dpo", "policy", status="hit", fingerprint=policy, reads=["words"],
              metrics={"accuracy": accuracy, "loss": 0.5}),
        stage("reward", "reward", "reward_model", status="failed", reads=["dpo"],
              error="the loss is not finite at step 3\n损失不是有限数"),
        stage("ppo", "ppo", "policy", status="skipped", reads=["reward"]),
        stage("asked", "evaluate", "scores", status="built", seconds=1200.5,
              fingerprint=scores, reads=["dpo"]),
    ]  # fmt: skip
    for item in stages:
        if item.fingerprint:
            item.path = str(store.find(item.fingerprint))
    record = RunRecord(
        run_id="20260131-235959-1", recipe="handmade", recipe_path="handmade", status="failed",
        stages={item.node: item for item in stages},
    )  # fmt: skip
    return record, store


def page_of(run: tuple[RunRecord, Store], folder: Path) -> str:
    record, store = run
    record.write(folder)
    return write_report(folder, store).read_text("utf-8")


def test_the_page_needs_nothing_from_outside_and_speaks_chinese(
    run: tuple[RunRecord, Store], tmp_path: Path
) -> None:
    page = page_of(run, tmp_path / "run")
    assert 'lang="en"' in page
    assert "utf-8" in page[:200]
    for text in ("猫住在哪里？", "猫住在山洞里。 …", "铁|‹E5 B0›", "损失不是有限数"):
        assert text in page
    assert "&lt;b&gt;In ‹?›&lt;/b&gt; a cave." in page  # text is text, also where it spells HTML
    assert "\ufffd" not in page
    # Only names of XML vocabularies are addresses; nothing is fetched.
    addresses = set(re.findall(r'https?://[^\s"<]+', page))
    assert addresses <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
        "http://purl.org/dc/elements/1.1/",
        "http://creativecommons.org/ns#",
        "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
        "http://purl.org/dc/dcmitype/StillImage",
    }
    assert not re.search(r"<(script|link rel=.stylesheet|img|iframe)", page)


def test_a_failed_run_says_what_failed_and_why(
    run: tuple[RunRecord, Store], tmp_path: Path
) -> None:
    page = page_of(run, tmp_path / "run")
    assert "<h1>handmade: reward failed</h1>" in page
    # What went wrong comes first, and is open: paper shows it as well.
    assert page.index('id="errors"') < page.index('id="effects"')
    assert "<details open><summary>reward</summary><pre>the loss is not finite at step 3" in page
    assert page.count('class="node failed"') == 1
    assert page.count('class="node skipped"') == 1


def test_a_cancelled_run_is_not_called_finished(tmp_path: Path) -> None:
    cut = stage("ppo", "ppo", "policy", status="skipped", error="the run was cancelled")
    record = RunRecord(
        run_id="1", recipe="handmade", recipe_path="handmade", status="cancelled",
        stages={"ppo": cut},
    )  # fmt: skip
    page = page_of((record, open_store(str(tmp_path / "store"))), tmp_path / "run")
    assert "<h1>handmade: cancelled</h1>" in page


def test_the_first_table_holds_what_the_stages_call_telling(
    run: tuple[RunRecord, Store], tmp_path: Path
) -> None:
    record, store = run
    paths = {"dpo": store.find("b" * 64), "asked": store.find("c" * 64)}
    found = headlines(record, {name: path for name, path in paths.items() if path})
    assert [(item.node, item.label, item.figure.value) for item in found] == [
        ("dpo", "held-out pairs preferred rightly", 0.9),
        # Judged right after what is judged, before stages that the recipe names earlier.
        ("asked", "bits per byte", 0.375),
        ("asked", "bits per byte, xz -9, web", 2.0),
        ("asked", "exam, whole options", 0.5),
        ("asked", "right answers", 0.75),
    ]
    page = page_of(run, tmp_path / "run")
    first = page[page.index('id="effects"') : page.index('id="graph"')]
    assert "0.680 to 0.810" in first
    assert ">152<" in first
    assert "animals" not in first


def test_a_curve_keeps_its_ends_and_one_step_is_one_point() -> None:
    rows = [{"step": step, "loss": -step} for step in range(1000)]
    x, y = series_of("loss", {"sft": rows})["sft"]
    assert (x[0], x[-1], y[-1]) == (0, 999, -999)
    assert len(x) == len(set(x)) <= 401
    assert series_of("loss", {"sft": rows[:1]}) == {"sft": ([0], [0])}  # drawn as a dot


def test_names_break_behind_underscores_and_stay_text(tmp_path: Path) -> None:
    section = Section("a", "A", tables=[Table("", ("held_loss",), [("evaluate_<b>",)])])
    told = write_page(tmp_path / "page.html", "t", "s", [section]).read_text("utf-8")
    assert "<th>held_<wbr>loss</th>" in told
    assert ">evaluate_<wbr>&lt;b&gt;<" in told


def test_nested_figures_are_words(run: tuple[RunRecord, Store], tmp_path: Path) -> None:
    page = page_of(run, tmp_path / "run")
    assert "built 8" in page
    assert "{&#34;" not in page


def test_a_run_without_a_stage_has_a_report_too(tmp_path: Path) -> None:
    record = RunRecord(run_id="1", recipe="empty", recipe_path="empty", status="done")
    record.write(tmp_path / "run")
    page = write_report(tmp_path / "run", open_store(str(tmp_path / "store"))).read_text("utf-8")
    assert "<h1>empty: finished</h1>" in page


def test_boxes_of_the_graph_do_not_overlap() -> None:
    nodes = [f"n{index}" for index in range(12)]
    edges = [("n0", node) for node in nodes[1:]] + [("n1", "n7"), ("n7", "n8"), ("n8", "n11")]
    drawn = graph(edges, {node: Mark("1 s", "built") for node in nodes})
    boxes = [
        tuple(float(value) for value in found)
        for found in re.findall(r'<rect x="([-\d.]+)" y="([-\d.]+)" width="([\d.]+)"', drawn)
    ]
    assert len(boxes) == 12
    for index, (x, y, width) in enumerate(boxes):
        assert all(abs(x - left) >= width for left, top, _ in boxes[:index] if top == y)
    # n0 is above n1, n1 above n7, n7 above n8, n8 above n11: five rows.
    assert len({y for _, y, _ in boxes}) == 5


def test_before_and_after_has_a_chart_for_each_kind_of_figure(
    run: tuple[RunRecord, Store], tmp_path: Path
) -> None:
    record, store = run
    figures = {
        "wins/by_reward_model/dpo": Figure(value=0.7, n=9, low=0.6, high=0.8, chance=0.5),
        "wins/by_truth/dpo": Figure(value=0.6, n=9, low=0.5, high=0.8, chance=0.5),
        "change/bits_per_byte/all/dpo": Figure(value=0.1, n=9, low=0.05, high=0.2),
        "change/bits_per_byte/zh/dpo": Figure(value=0.1, n=4, low=0.05, high=0.2),
        "change/exam_option/accuracy/dpo": Figure(value=-0.1, n=9, low=-0.2, high=0.1),
        "change/answer_tokens/dpo": Figure(value=3.0, n=9, low=2.0, high=4.0),
    }

    def write(path: Path) -> None:
        Scores.write(path / "files", figures)
        (path / "logs").mkdir(exist_ok=True)
        tables = {
            "other": [{"figure": "no"}],
            "answers before and after": [{"answer after": "在山上。"}],
        }
        (path / "logs" / "tables.json").write_text(json.dumps(tables))

    fingerprint = committed(store, "d", "effect", "scores", write)
    record.stages["effect"] = stage(
        "effect", "effect", "scores", status="built", reads=["asked"], fingerprint=fingerprint,
        path=str(store.find(fingerprint)),
    )  # fmt: skip
    page = page_of(run, tmp_path / "run")
    section = page[page.index('id="change"') : page.index('id="samples"')]
    titles = re.findall(r"<dc:title>([^<]*)</dc:title>|<title>([^<]*)</title>", section)
    names = list(dict.fromkeys(one or other for one, other in titles))
    assert names == [
        "answers that are better", "answer tokens", "bits per byte", "exam option accuracy"
    ]  # fmt: skip
    for row in ("dpo, by truth", "在山上。"):
        assert row in section
    # Changes of bits per byte are no bits per byte.
    assert "change" not in page[page.index('id="bits"') : page.index('id="exams"')]
    assert "better by the reward model, dpo" in page[page.index('id="effects"') :]


def test_checkpoints_are_points_of_reward_against_kl(
    run: tuple[RunRecord, Store], tmp_path: Path
) -> None:
    record, store = run
    for digit, node, kl in (("e", "one", 0.5), ("f", "two", 2.0)):
        figures = {
            name: Figure(value=value, n=9, low=value, high=value)
            for name, value in (("world/kl", kl), ("world/reward", 1.5))
        }

        def write(path: Path, figures: dict[str, Figure] = figures) -> None:
            Scores.write(path / "files", figures)

        fingerprint = committed(store, digit, "evaluate", "scores", write)
        record.stages[node] = stage(
            node, "evaluate", "scores", status="built", fingerprint=fingerprint
        )
    page = page_of(run, tmp_path / "run")
    assert "true reward against KL" in page
    assert "reward model against KL" not in page


def test_halves_of_characters_do_not_cost_the_report(
    run: tuple[RunRecord, Store], tmp_path: Path
) -> None:
    tables = Path(str(run[0].stages["words"].path)) / "logs" / "tables.json"
    tables.write_text(json.dumps({"examples": [{"text": "猫\ud83d"}]}))
    assert '<td class="short">猫?</td>' in page_of(run, tmp_path / "run")


def test_names_with_dollar_signs_are_no_formulas() -> None:
    name = "x$\\frac$"
    for chart in (
        charts.bars([name], [1], title=name, across=name),
        charts.intervals([(name, 1, 0, 2, None)], title=name, across=name),
        charts.lines({name: ([1], [1]), "y": ([1], [1])}, title=name, across=name, up=name),
    ):
        assert chart.count(f">{name}<") >= 3


def test_models_stand_before_what_they_are_compared_with(
    run: tuple[RunRecord, Store], tmp_path: Path
) -> None:
    page = page_of(run, tmp_path / "run")
    held = page[page.index('id="bits"') : page.index('id="exams"')]
    assert "learnt by heart" not in held  # no figure of training documents is there
    assert held.index(">asked<") < held.index(">xz<")
    assert "exam option" in page[page.index('id="exams"') :]


def test_rewards_are_drawn_with_the_truth_over_steps_and_over_kl() -> None:
    rows = [
        {"step": 0, "held_truth": 0.5, "held_kl": 0.0, "held_reward": 0.1},
        {"step": 1, "reward": 0.2, "kl": 0.1, "held_truth": 0.6, "held_kl": 0.2, "held_reward": 0.3},
        {"step": 2, "reward": 0.4, "kl": 0.3},
    ]  # fmt: skip
    over_steps, over_kl = rewards({"ppo": rows})
    for chart in (over_steps, over_kl):
        for name in ("held truth", "held reward", ">reward<"):
            assert name in chart
    assert "KL, nats" in over_kl
    assert list(rewards({"ppo": [{"step": 1, "loss": 2.0}]})) == []
