"""Keeping a home in order: checking artifacts, what gc must keep, new projects, copies out."""

import shutil
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flows.runs import Home, RunRecord
from storage.record import Record
from storage.store import Removed, Store
from storage.store_local import bytes_under

PROJECT = """\
# Run it with: bessemer run {name} data=data
# Everything that is not said here is as in the recipe `standard`; `bessemer plan` shows the whole.
defaults: [standard, _self_]
shape: tiny
stages:
  extract:
    sources:
      # Pages, documents or records to learn from; `domain` names their kind for mixtures and figures.
      - {{path: "${{data}}/raw/**/*", domain: web}}
  tokenizer: {{vocabulary: 8000}}
  chats:
    sources:
      # Conversations: alpaca, sharegpt, messages, firefly, moss or prompt/answer, as JSON or JSONL.
      - {{path: "${{data}}/chats/*.jsonl"}}
  pairs:
    sources:
      # Preferences: a prompt with a chosen and a rejected answer.
      - {{path: "${{data}}/preferences/*.jsonl"}}
"""


def check(
    store: Store, fingerprints: list[str] | None, *, is_full: bool
) -> tuple[int, list[dict[str, str]]]:
    """How many artifacts were checked, and what is wrong with which; those are set aside."""
    records = (
        [record for name in fingerprints if (record := store.record(name))]
        if fingerprints is not None
        else list(store.records())
    )
    unreadable = [
        {"fingerprint": name, "stage": "", "node": "", "kind": "", "wrong": reason}
        for name, reason in store.set_aside.items()
    ]
    damaged: list[dict[str, str]] = []
    for record in records:
        if wrong := store.verify(record.fingerprint, full=is_full):
            damaged.append(
                {
                    "fingerprint": record.fingerprint,
                    "stage": record.stage,
                    "node": record.node,
                    "kind": record.kind,
                    "wrong": "; ".join(wrong),
                }
            )
    for item in damaged:
        # An artifact whose part is missing is whole again when the part has been rebuilt.
        if not all(line.startswith("part ") for line in item["wrong"].split("; ")):
            store.quarantine(item["fingerprint"], item["wrong"])
    return len(records) + len(unreadable), [*unreadable, *damaged]


def kept_runs(home: Home, keep_runs: int, keep_days: float = 0.0) -> list[RunRecord]:
    """The newest runs, those that were started less than so many days ago, and those that go on.

    Of each recipe among them the newest complete run too, however many failed since: what `--extend`
    goes on from.
    """
    since = (datetime.now(UTC) - timedelta(days=keep_days)).isoformat(timespec="seconds")
    records = list(home.records())
    kept = {
        record.run_id
        for place, record in enumerate(records)
        if place < keep_runs or record.started > since or record.state == "running"
    }
    recipes = {record.recipe for record in records if record.run_id in kept}
    for record in records:
        if record.is_complete and record.recipe in recipes:
            recipes.remove(record.recipe)
            kept.add(record.run_id)
    return [record for record in records if record.run_id in kept]


def roots(kept: Iterable[RunRecord]) -> set[str]:
    """Fingerprints that runs ended with or took as given."""
    found: set[str] = set()
    for record in kept:
        found |= {stage.fingerprint for stage in record.stages.values() if stage.fingerprint}
        found |= set(record.frozen.values())
    return found


def forget_runs(home: Home, kept: Sequence[RunRecord], *, dry_run: bool) -> list[Removed]:
    """Remove the folders of all other runs: records, reports, what was told to MLflow.

    A report that a kept run shows is kept with its folder.
    """
    needed = {home.run_folder(record.run_id) for record in kept}
    needed |= {Path(record.report).parent for record in kept if record.report}
    removed: list[Removed] = []
    for record in home.records():
        folder = home.run_folder(record.run_id)
        if folder not in needed:
            size = bytes_under(folder)
            removed.append(Removed(what="run", fingerprint=record.run_id, kind="", size=size))
            if not dry_run:
                shutil.rmtree(folder)
    return removed


def new_project(folder: Path) -> Path:
    """A folder with a recipe and places for data. Raises ValueError where one is there already."""
    recipe = folder / "recipe.yaml"
    if recipe.exists():
        raise ValueError(f"{recipe} exists; choose another folder, or edit that recipe")
    for name in ("raw", "chats", "preferences"):
        (folder / "data" / name).mkdir(parents=True, exist_ok=True)
    recipe.write_text(PROJECT.format(name="recipe.yaml"), "utf-8")
    return recipe


def copy_out(record: Record, store: Store, target: Path) -> None:
    """Copy the files of an exported model. Raises ValueError for another kind, or a full target."""
    if record.kind != "export":
        raise ValueError(
            f"{record.stage} {record.fingerprint[:12]} is a {record.kind}, not an export; add a node "
            "`export: {from: {policy: NODE}}` to the recipe and name that"
        )
    path = store.find(record.fingerprint)
    if path is None:
        raise ValueError(f"{record.fingerprint} is damaged; run the recipe again")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; name a new folder")
    shutil.copytree(path / "files", target, dirs_exist_ok=True)
