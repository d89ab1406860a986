"""Which checkpoint a name stands for, and what is said of a name that stands for none."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from flows.runs import Home, RunRecord, StageRecord
from flows.served import find_served
from storage.record import Record
from storage.store import open_store


@pytest.fixture
def home(tmp_path: Path, policies: dict[str, Path]) -> Home:
    """One run: a corpus, the policy `sft` and the policy `mine` of the stage ppo."""
    home = Home(tmp_path / "home")
    store = open_store(str(home.path / "store"))
    nodes = {
        "extract": ("extract", "corpus"),
        "sft": ("sft", "policy"),
        "mine": ("ppo", "policy"),
        "out": ("export", "export"),
    }
    stages: dict[str, StageRecord] = {}
    for digit, (node, (name, kind)) in zip("abcd", nodes.items(), strict=True):
        claim = store.claim(digit * 64)
        assert claim
        with claim:
            shutil.copytree(
                policies["two" if kind == "export" else "one"],
                claim.path / "files",
                dirs_exist_ok=True,
            )
            record = Record(
                fingerprint=digit * 64, kind=kind, stage=name, digest="", identity={},
                created=datetime(2026, 1, 1, tzinfo=UTC).isoformat(),
            )  # fmt: skip
            store.commit(claim, record)
        stages[node] = StageRecord(
            node=node,
            stage=name,
            kind=kind,
            flow="alignment",
            status="built",
            fingerprint=digit * 64,
        )
    run = RunRecord(run_id="1", recipe="r", recipe_path="r", status="done", stages=stages)
    run.write(home.run_folder("1"))
    return home


def test_without_a_name_it_is_the_newest_runs_best(home: Home) -> None:
    (served,) = find_served([], home)
    assert served.name == "mine"
    assert "c" * 64 in str(served.folder)


def test_nodes_fingerprints_exports_and_folders_are_found_under_their_names(
    home: Home, policies: dict[str, Path]
) -> None:
    asked = ["sft", f"better={'c' * 8}", "1:out", str(policies["two"])]
    served = find_served(asked, home)
    assert [item.name for item in served] == ["sft", "better", "1:out", "export"]
    ids = [item.tokenizer.encode("猫是红色的。") for item in served]
    assert ids == [ids[0]] * 4
    one, two = served[0].tokenizer, served[3].tokenizer
    assert (one.eos, one.im_start, one.im_end) == (two.eos, two.im_start, two.im_end)
    assert one.vocabulary == two.vocabulary


def test_what_cannot_be_served_is_said(
    home: Home, policies: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no run has made a model"):
        find_served([], Home(tmp_path / "empty"))
    with pytest.raises(ValueError, match="extract is a corpus; name a policy"):
        find_served(["extract"], home)
    with pytest.raises(ValueError, match="no run has such a node"):
        find_served(["nix"], home)
    with pytest.raises(ValueError, match=r"called alike .*NAME=ARTIFACT"):
        find_served(["sft", "sft"], home)
    foreign = tmp_path / "foreign"
    shutil.copytree(policies["two"], foreign)
    parsed = json.loads((foreign / "tokenizer.json").read_text("utf-8"))
    parsed["added_tokens"] = parsed["added_tokens"][:2]
    (foreign / "tokenizer.json").write_text(json.dumps(parsed), "utf-8")
    with pytest.raises(ValueError, match="by the stage adopt"):
        find_served([str(foreign)], home)
    (foreign / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; .* by the stage adopt"):
        find_served([str(foreign)], home)
