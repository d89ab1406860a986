"""What a run builds, finds, skips and mends, without Prefect: nodes are run one after another."""

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from conf.mistakes import RecipeError
from flows.execution import Execution, Listener
from flows.plan import contract, plan
from flows.preparation import Request, prepare
from flows.runs import RunRecord, find_artifact, open_home
from storage.lease_s3 import home_id
from tasks.processes import take_cpu
from tasks.stage import Job
from tests.flows.conftest import Place

ALL = ["blend", "coarse", "fine", "mine", "other"]


def start(place: Place, *overrides: str, **options: Any) -> Execution:
    request = Request(str(place.recipe), list(overrides), **options)
    return prepare(request, open_home(), base=place.folder)


def go(place: Place, *overrides: str, **options: Any) -> Execution:
    execution = start(place, *overrides, **options)
    execution.start()
    while (name := execution.next_ready(execution.selected)) is not None:
        execution.fingerprint(name)
        with contextlib.suppress(RuntimeError):
            execution.run(name)
    execution.finish(0.0)
    return execution


def statuses(execution: Execution) -> dict[str, str]:
    return {name: stage.status for name, stage in execution.record.stages.items()}


def test_the_second_run_builds_nothing_and_ends_with_the_same_bytes(place: Place) -> None:
    first = go(place)
    assert place.ran() == ALL
    second = go(place)
    assert place.ran() == []
    assert set(statuses(second).values()) == {"hit"}
    digests = [
        {name: stage.digest for name, stage in execution.record.stages.items()}
        for execution in (first, second)
    ]
    assert digests[0] == digests[1]


def test_a_reason_with_a_name_that_is_no_utf8_is_recorded(place: Place) -> None:
    def refuse(name: str, job: Job) -> None:
        raise ValueError("钢-\udcff.txt")

    execution = start(place)
    execution.listeners.append(Listener(on_job=refuse))
    execution.start()
    with pytest.raises(ValueError, match="钢"):
        execution.run("mine")
    execution.finish(0.0)
    assert RunRecord.read(execution.folder).stages["mine"].error == "ValueError: 钢-?.txt"


def test_a_node_whose_turn_nobody_takes_holds_up_no_other(place: Place) -> None:
    execution = start(place)
    execution.start()
    assert execution.next_ready(execution.selected) == "mine"
    execution.run("mine")
    # `coarse` is given out, and its task never begins: the server is gone.
    assert {execution.next_ready(execution.selected) for _ in range(2)} == {"coarse", "other"}
    execution.run("other")
    execution.abandon(["mine", "coarse", "other"])
    while name := execution.next_ready(execution.selected):
        execution.run(name)
    execution.finish(0.0)
    assert execution.record.status == "failed"
    assert statuses(execution) == {
        "mine": "built",
        "coarse": "failed",
        "fine": "skipped",
        "other": "built",
        "blend": "skipped",
    }
    assert "run again" in str(execution.record.stages["coarse"].error)
    assert place.ran() == ["mine", "other"]
    go(place)
    assert place.ran() == ["blend", "coarse", "fine"]


def test_runs_from_the_page_and_from_a_terminal_wait_for_the_same_processor(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = place.folder / "home"
    monkeypatch.setattr("tempfile.tempdir", str(place.folder))
    monkeypatch.setenv("BESSEMER_HOME", str(home))  # as the worker of `bessemer up` has it
    start(place).start()
    lock = take_cpu()
    assert lock is not None
    monkeypatch.delenv("BESSEMER_HOME")
    (place.folder / ".bessemer").symlink_to(home)
    start(place).start()
    assert take_cpu() is None
    lock.release()


def test_a_run_tells_the_store_what_other_homes_must_keep(place: Place) -> None:
    execution = go(place)
    fingerprints = {stage.fingerprint for stage in execution.record.stages.values()}
    assert execution.lookup.store.noted_by_others("another home") == fingerprints
    assert execution.lookup.store.noted_by_others(home_id(open_home().path)) == set()


def test_a_long_run_is_told_to_the_store_however_many_others_end_meanwhile(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.store.NOTED_RUNS", 1)
    long = start(place, "mine.sources=[{path: raw/one.txt}]")
    long.start()
    long.run("mine")
    made = long.record.stages["mine"].fingerprint
    go(place)
    assert made in long.lookup.store.noted_by_others("another home")
    long.finish(0.0)
    go(place)
    assert made not in long.lookup.store.noted_by_others("another home")


def test_a_setting_rebuilds_what_it_changes_and_stops_where_bytes_are_equal(place: Place) -> None:
    go(place)
    place.ran()
    # 8 lines: 0.5 and 0.55 of them are both 4, so nothing below `coarse` has other input.
    changed = go(place, "coarse.heat=0.55")
    assert place.ran() == ["coarse"]
    assert statuses(changed)["fine"] == "hit"
    go(place, "coarse.heat=0.25")
    assert place.ran() == ["blend", "coarse", "fine"]


def test_a_runtime_setting_rebuilds_nothing(place: Place) -> None:
    go(place)
    place.ran()
    go(place, "coarse.threads=7")
    assert place.ran() == []


def test_the_record_says_what_happened_and_is_the_contract(place: Place) -> None:
    execution = go(place)
    record = RunRecord.read(execution.folder)
    assert record.status == "done"
    assert record.is_complete
    assert record.stages["blend"].reads == ["fine", "other"]
    told = json.loads(json.dumps(record.contract()))
    assert list(told) == ["recipe", "run_id", "report", "stages"]
    assert list(told["stages"]["mine"]) == [
        "stage", "status", "kind", "fingerprint", "digest", "path", "seconds", "metrics", "error",
    ]  # fmt: skip
    assert told["stages"]["mine"]["metrics"]["lines"] == 8
    tables = Path(told["stages"]["mine"]["path"]) / "logs" / "tables.json"
    assert json.loads(tables.read_text("utf-8")) == {
        "files": [{"file": "one.txt"}, {"file": "two.txt"}]
    }


def test_a_failure_leaves_other_branches_alone_and_skips_what_is_below(place: Place) -> None:
    fault = place.folder / "fault"
    fault.touch()
    execution = go(place, f"coarse.fails={fault}")
    assert statuses(execution) == {
        "mine": "built",
        "coarse": "failed",
        "fine": "skipped",
        "other": "built",
        "blend": "skipped",
    }
    assert execution.record.stages["coarse"].error == "RuntimeError: the furnace is cold"
    assert execution.record.stages["fine"].error == "coarse has no artifact"
    assert execution.record.status == "failed"
    fault.unlink()
    place.ran()
    # `fails` is no part of identity: the same artifact is built now, the rest is found.
    assert set(statuses(go(place, f"coarse.fails={fault}")).values()) == {"hit", "built"}
    assert place.ran() == ["blend", "coarse", "fine"]


def test_until_runs_what_is_needed_and_no_more(place: Place) -> None:
    execution = go(place, until="coarse")
    assert place.ran() == ["coarse", "mine"]
    assert statuses(execution)["blend"] == "skipped"
    assert not execution.record.is_complete


def test_a_part_takes_its_nodes_and_what_they_need(place: Place) -> None:
    # As the form of a deployment asks. The tiny stages make neither corpus nor policy.
    assert go(place, part="alignment").selected == tuple(start(place).graph.nodes)
    with pytest.raises(RecipeError, match="no node of tiny belongs to corpus"):
        start(place, part="corpus")


def test_force_builds_again_and_equal_bytes_stop_it_there(place: Place) -> None:
    go(place)
    place.ran()
    go(place, force=("coarse",))
    assert place.ran() == ["coarse"]


def test_from_needs_all_above_and_builds_all_below(place: Place) -> None:
    with pytest.raises(RecipeError, match="mine: is not in the store"):
        start(place, start="coarse")
    assert not open_home().runs.exists()
    go(place)
    place.ran()
    execution = go(place, start="fine")
    assert place.ran() == ["blend", "fine"]
    assert statuses(execution)["other"] == "hit"


def test_only_takes_what_is_above_from_the_store(place: Place) -> None:
    with pytest.raises(RecipeError, match="--from and --only"):
        start(place, only="fine")
    go(place, until="coarse")
    place.ran()
    execution = go(place, only="fine")
    assert place.ran() == ["fine"]
    assert statuses(execution)["other"] == "skipped"


def test_a_pin_takes_an_existing_artifact_and_is_frozen(place: Place) -> None:
    first = go(place)
    place.ran()
    run_id = first.record.run_id
    execution = go(place, f"coarse.pin='{run_id}:other'")
    pinned = first.record.stages["other"].fingerprint
    assert execution.record.stages["coarse"].fingerprint == pinned
    assert execution.record.frozen == {"coarse.pin": pinned}
    # `fine` now reads the same 8 lines as `other`, with the same settings: its artifact is there.
    assert place.ran() == ["blend"]
    with pytest.raises(RecipeError, match=r"coarse.pin.*no run has such a node"):
        start(place, "coarse.pin=nothing")
    with pytest.raises(RecipeError, match="is a steel, a ore is needed"):
        start(place, "coarse.pin=blend")


def test_an_input_may_be_an_artifact(place: Place) -> None:
    go(place)
    place.ran()
    execution = go(place, "fine.from.ore='artifact:other'")
    assert execution.graph.nodes["fine"].upstream == []
    assert place.ran() == ["blend"]


def test_a_new_file_is_a_new_landing_and_only_its_part_is_built(place: Place) -> None:
    go(place)
    (place.folder / "raw" / "all.txt").write_text("new 矿\n", "utf-8")
    execution = go(place)
    shards = execution.record.stages["mine"].metrics["shards"]
    assert shards == {"built": 1, "reused": 2}
    # `all.txt` sorts before the others, but arrived later.
    mined = Path(str(execution.record.stages["mine"].path)) / "files" / "ore.txt"
    assert mined.read_text("utf-8").splitlines()[-1] == "new 矿"


def test_machines_that_share_a_store_on_s3_find_the_work_of_one_another(
    place: Place, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESSEMER_STORE", f"{s3_server}/{place.folder.name}")
    go(place)
    (place.folder / "raw" / "a_new.txt").write_text("new\n", "utf-8")
    here = go(place)
    place.ran()
    # Another machine sees all three files at once; two of them came before the third.
    monkeypatch.setenv("BESSEMER_HOME", str(place.folder / "elsewhere"))
    there = go(place)
    sources = here.record.stages["mine"].sources
    assert there.record.stages["mine"].sources == sources
    assert [len(landing) for landing in sources["sources"]] == [2, 1]
    assert set(statuses(there).values()) == {"hit"}
    assert place.ran() == []


def test_planning_records_no_landing_and_writes_no_run(place: Place) -> None:
    planned = plan(start(place), place.folder)
    assert [item.status for item in planned] == ["miss"] * 5
    assert [item.why for item in planned][:2] == ["never built", "waits for mine"]
    assert not list((open_home().path / "store").glob("sources/*.json"))
    assert not open_home().runs.exists()


def test_a_plan_says_hit_or_in_which_field_it_differs(place: Place) -> None:
    go(place)
    execution = start(place, "coarse.heat=0.25", force=("other",))
    told = contract(execution, plan(execution, place.folder))["stages"]
    assert told["mine"]["status"] == "hit"
    assert told["mine"]["path"]
    assert told["coarse"]["status"] == "miss"
    assert told["coarse"]["why"] == "settings.heat: 0.5 -> 0.25"
    assert told["fine"]["why"] == "waits for coarse"
    assert told["other"]["why"] == "forced"


def test_a_damaged_input_is_rebuilt_before_it_is_read(place: Place) -> None:
    first = go(place)
    place.ran()
    stage = first.record.stages["mine"]
    part = first.lookup.artifacts["mine"].record.parts[0]
    file = open_home().path / "store" / "artifacts" / str(stage.fingerprint) / "files" / "ore.txt"
    file.write_bytes(file.read_bytes()[:-2] + b"X\n")
    execution = go(place, "coarse.heat=0.25")
    # The damage is found when `coarse` really runs; `mine` is built again, from parts that are sound.
    assert place.ran() == ["blend", "coarse", "fine", "mine"]
    assert execution.record.status == "done"
    assert execution.record.stages["mine"].digest == stage.digest
    assert part in execution.lookup.artifacts["mine"].record.parts


def test_a_damaged_source_of_another_node_is_rebuilt_too(place: Place) -> None:
    text = "  again: {uses: mine, sources: [{node: mine, path: ore.txt}]}\n"
    place.recipe.write_text(place.recipe.read_text("utf-8") + text, "utf-8")
    first = go(place, until="mine")
    place.ran()
    file = Path(str(first.record.stages["mine"].path)) / "files" / "ore.txt"
    file.write_bytes(b"X" + file.read_bytes()[1:])
    execution = go(place, until="again")
    assert place.ran() == ["again", "mine"]
    assert execution.record.stages["again"].digest == first.record.stages["mine"].digest


def test_a_node_that_waits_is_woken_by_another_flow(place: Place) -> None:
    execution = start(place)
    execution.start()
    got: list[str | None] = []
    waiting = threading.Thread(target=lambda: got.append(execution.next_ready(["coarse"])))
    waiting.start()
    time.sleep(0.05)
    assert got == []
    name = execution.next_ready(["mine"])
    assert name == "mine"
    execution.run(name)
    waiting.join(5)
    assert got == ["coarse"]
    assert execution.next_ready(["mine", "coarse"]) is None


def test_cancelling_stops_the_running_node_and_skips_the_rest(place: Place) -> None:
    execution = start(place, "coarse.seconds=60")
    execution.start()
    execution.run(str(execution.next_ready(["mine"])))

    def work() -> None:
        with pytest.raises(KeyboardInterrupt):
            execution.run("coarse")

    worker = threading.Thread(target=work)
    worker.start()
    while execution.record.stages["coarse"].status != "running":
        time.sleep(0.01)
    time.sleep(0.2)
    started = time.monotonic()
    assert execution.cancel(10)
    worker.join(5)
    assert time.monotonic() - started < 5
    for name in ("fine", "other", "blend"):
        assert execution.run(name).status == "skipped"
    execution.finish(1.0)
    assert execution.record.status == "cancelled"
    assert "run again" in str(execution.record.stages["coarse"].error)


def test_extending_pins_the_vocabulary_and_carries_statistics_on(place: Place) -> None:
    text = place.recipe.read_text("utf-8")
    text += "  tokenizer: {from: {ore: coarse}}\n"
    place.recipe.write_text(text, "utf-8")
    with pytest.raises(RecipeError, match="run it once without --extend"):
        start(place, is_extension=True)
    first = go(place).record.stages
    (place.folder / "raw" / "three.txt").write_text("3\n" * 8, "utf-8")
    place.ran()
    extended = go(place, is_extension=True)
    assert extended.record.frozen == {
        "tokenizer.pin": first["tokenizer"].fingerprint,
        "coarse.from.pinned": first["coarse"].fingerprint,
        "fine.from.pinned": first["fine"].fingerprint,
        "other.from.pinned": first["other"].fingerprint,
    }
    assert extended.record.stages["tokenizer"].fingerprint == first["tokenizer"].fingerprint
    assert place.ran() == ALL
    # The same sources extended again: what the first extension froze stays, nothing is built.
    again = go(place, is_extension=True)
    assert again.record.frozen == extended.record.frozen
    assert place.ran() == []
    # New files extend the extension.
    (place.folder / "raw" / "four.txt").write_text("4\n" * 8, "utf-8")
    more = go(place, is_extension=True)
    assert more.record.frozen["coarse.from.pinned"] == extended.record.stages["coarse"].fingerprint


def test_names_of_artifacts(place: Place) -> None:
    record = go(place).record
    home = open_home()
    store = home.store()
    mine = record.stages["mine"]
    for name in ("mine", f"{record.run_id}:mine", str(mine.fingerprint), str(mine.fingerprint)[:8]):
        assert find_artifact(name, home, store).fingerprint == mine.fingerprint
    assert find_artifact(str(mine.path), home, store).fingerprint == mine.fingerprint
    for wrong in ("mien", "20000101:mine", "0" * 64):
        with pytest.raises(ValueError, match="bessemer runs"):
            find_artifact(wrong, home, store)


def test_a_run_whose_process_is_gone_has_died(place: Place) -> None:
    execution = go(place)
    execution.record.status = "running"
    assert execution.record.state == "running"
    execution.record.pid = 2**22 + 1
    assert execution.record.state == "died"
