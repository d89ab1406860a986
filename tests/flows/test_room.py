"""What fits on the store's disk: an estimate before each stage, and a refusal that costs nothing."""

import contextlib
import json
import random
from pathlib import Path

import pytest

from flows.execution import Execution
from flows.plan import contract, plan
from flows.preparation import Request, prepare
from flows.room import RESERVE, bytes_needed, foretell
from flows.runs import open_home
from tests.faults.disks import mount, mounted

RECIPE = """
seed: 0
store: disk
launch: {threads: 1}
shape: {dim: 32, layers: 1, heads: 2, kv_heads: 1, context: 64}
stages:
  extract: {sources: [{path: "texts/*.jsonl"}]}
  tokenizer: {from: {corpus: extract}, vocabulary: 300}
  tokenize: {from: {corpus: extract, tokenizer: tokenizer}}
  pretrain: {from: {tokens: tokenize}, tokens: 512, batch_tokens: 512}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BESSEMER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BESSEMER_WORKERS", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE, "utf-8")
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "one.jsonl", 100)
    return tmp_path


def write(file: Path, documents: int) -> int:
    """Documents of 200 words; bytes of the file."""
    chosen = random.Random(file.name)
    words = ["the", "fox", "and", "a", "bear", "went", "to", "their", "river", "when", "it", "was"]
    texts = [" ".join(chosen.choices(words, k=200)) for _ in range(50)]
    lines = (json.dumps({"text": texts[number % 50]}) + "\n" for number in range(documents))
    file.write_text("".join(lines), "utf-8")
    return file.stat().st_size


def run(folder: Path, *overrides: str) -> Execution:
    execution = prepare(Request("small.yaml", list(overrides)), open_home(), base=folder)
    execution.start()
    while (name := execution.next_ready(execution.selected)) is not None:
        # What is wrong is in the record.
        with contextlib.suppress(Exception):
            execution.run(name)
    execution.finish(0.0)
    return execution


def needed(folder: Path, name: str, *overrides: str) -> int:
    execution = prepare(Request("small.yaml", list(overrides)), open_home(), base=folder)
    lookup = execution.lookup
    for above in ("extract", "tokenizer", "tokenize"):
        if above != name:
            lookup.find(above)
    return bytes_needed(lookup, execution.graph.nodes[name], lookup.address(name))


def test_a_stage_that_cannot_fit_is_refused_before_it_writes(folder: Path) -> None:
    with mounted(folder / "disk", 8 << 20):
        wide = run(folder, "shape.dim=256", "shape.heads=4", "shape.kv_heads=4")
        statuses = {name: stage.status for name, stage in wide.record.stages.items()}
        assert statuses["tokenize"] == "built"
        error = wide.record.stages["pretrain"].error or ""
        # 300 x 256 + 4 x 256 x 256 + 3 x 256 x 704 + 3 x 256 parameters, of 4 bytes in the model and 12
        # in each of three checkpoints: 880,384 x 40.
        assert "pretrain will write about 35 MB" in error
        assert "launch.checkpoints_kept=1" in error
        assert not [*(folder / "disk").glob("attempts/*/*/state/job.json")]
        # More texts than the disk has room for.
        assert 0.35 * write(folder / "texts" / "two.jsonl", 30_000) > 8 << 20
        error = run(folder).record.stages["extract"].error or ""
        assert "extract will write about 9" in error
        assert "bessemer gc" in error
        mount("-o", f"remount,size={64 << 20}", folder / "disk")
        assert run(folder, "pretrain=null").record.status == "done"


def test_only_what_is_new_is_counted(folder: Path) -> None:
    assert needed(folder, "extract") == round(
        0.35 * (folder / "texts" / "one.jsonl").stat().st_size
    )
    run(folder, "pretrain=null")
    assert needed(folder, "extract") == 0
    size = write(folder / "texts" / "new.jsonl", 10)
    assert needed(folder, "extract") == round(0.35 * size)


def test_the_reserve_is_told_in_gigabytes_or_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RESERVE, "1e9")
    error = run(folder, "pretrain=null").record.stages["extract"].error or ""
    assert "extract will write about 3" in error
    assert f"stay in reserve (${RESERVE})" in error
    monkeypatch.setenv(RESERVE, "much")
    error = run(folder, "pretrain=null").record.stages["extract"].error or ""
    assert "much is no number of gigabytes" in error
    monkeypatch.setenv(RESERVE, "off")
    assert run(folder, "pretrain=null").record.stages["extract"].status == "built"


def shortages(folder: Path, *overrides: str) -> dict[str, str]:
    """What the plan says of the stages that lack room, and a run that begins."""
    execution = prepare(Request("small.yaml", list(overrides)), open_home(), base=folder)
    planned = plan(execution, folder)
    assert foretell(execution) == [item.shortage for item in planned if item.shortage]
    stages = contract(execution, planned)["stages"]
    return {name: stage["warnings"][-1] for name, stage in stages.items() if stage["warnings"]}


def test_a_plan_and_a_run_that_begins_tell_what_will_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 300 x 96 + 4 x 96 x 96 + 3 x 96 x 256 + 3 x 96 = 139,680 parameters: 5.6 MB while it trains, of
    # which 0.6 MB stay, so that the second of two alike finds no room where the first does.
    again = "  again: {uses: pretrain, from: {tokens: tokenize}, tokens: 1024, batch_tokens: 512}"
    (folder / "small.yaml").write_text(RECIPE + again, "utf-8")
    two = ["shape.dim=96", "shape.heads=4", "shape.kv_heads=4"]
    with mounted(folder / "disk", 5_900_000):
        told = shortages(folder, *two)
        assert told.keys() == {"again"}
        assert "again will write about 6 MB" in told["again"]
        assert "will then have 5 MB free" in told["again"]
        assert 0.35 * write(folder / "texts" / "two.jsonl", 20_000) > 5_900_000
        assert shortages(folder, *two).keys() == {"extract", "pretrain", "again"}
        monkeypatch.setenv(RESERVE, "off")
        assert shortages(folder, *two) == {}
