"""The model card of an export, as Markdown: what it is, how it was made, how good it is, how to use it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from flows.headlines import headlines
from flows.page_parts import flat
from flows.runs import Home, RunRecord
from storage.checkpoint import ModelCard
from storage.record import InputEntry, Record
from storage.scores import Scores
from storage.store import Store

LANGUAGES = ("zh", "en")
MOST_SETTING_CHARS = 80
USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
messages = [{"role": "user", "content": "你好！"}]
asked = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**asked, max_new_tokens=64)[0]))
```"""
GGUF_USE = "`llama-cli -m FOLDER/*.gguf`"


def model_card(export: Record, store: Store, home: Home) -> str:
    """From records and scores alone. Raises ValueError for an export whose policy is gone."""
    entry = export.inputs.get("policy")
    policy = store.record(entry.fingerprint) if isinstance(entry, InputEntry) else None
    path = store.find(policy.fingerprint) if policy else None
    if policy is None or path is None:
        raise ValueError(
            f"the policy of export {export.fingerprint[:12]} is not stored any more; run the recipe again"
        )
    card = ModelCard.read(path / "files")
    made = list(_ancestors(policy, store))
    target = export.identity.get("settings", {}).get("target", "hf")
    parts = [
        _front(target),
        f"# {policy.node}",
        f"A language model of {card.parameters:,} parameters, made with Bessemer. The model of "
        f"artifact `{policy.fingerprint[:12]}`, digest `{policy.digest[:12]}`.",
        "## Shape",
        _table(
            ("setting", "value"), [*flat(card.shape.model_dump()), ("vocabulary", card.vocabulary)]
        ),
        "## How it was made",
        "Each stage with the settings that decide its result.",
        *(_stage(record) for record in made),
        "## How good it is",
        *_measured(policy, store, home),
        "## How to use it",
        GGUF_USE if target == "gguf" else USE,
    ]
    return "\n\n".join(parts) + "\n"


def _front(target: str) -> str:
    lines = ["---", "language:", *(f"- {name}" for name in LANGUAGES)]
    library = "gguf" if target == "gguf" else "transformers"
    lines += [
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags:",
        "- bessemer",
        "---",
    ]
    return "\n".join(lines)


def _ancestors(record: Record, store: Store) -> Iterator[Record]:
    """What the model was made from, each once, what comes first first, the model last."""
    seen: dict[str, Record] = {}

    def visit(item: Record) -> None:
        for entry in item.inputs.values():
            for one in [entry] if isinstance(entry, InputEntry) else entry.values():
                found = store.record(one.fingerprint)
                if found and found.fingerprint not in seen:
                    visit(found)
        seen[item.fingerprint] = item

    visit(record)
    yield from seen.values()


def _stage(record: Record) -> str:
    settings = [
        (place, value)
        for place, value in flat(record.identity.get("settings", {}))
        if value not in ("", "()") and len(str(value)) <= MOST_SETTING_CHARS
    ]
    files = sum(
        len(landing) for of in record.identity.get("sources", {}).values() for landing in of
    )
    read = f", read from {files} files" if files else ""
    return (
        f"<details><summary>{record.node}: {record.stage}{_size(record.metrics)}{read}</summary>\n\n"
        f"{_table(('setting', 'value'), settings)}\n\n</details>"
    )


def _size(metrics: Mapping[str, Any]) -> str:
    """How much a stage made or read, where it tells."""
    known = [(name, metrics.get(name)) for name in ("documents", "kept", "tokens", "steps")]
    told = [f"{value:,} {name}" for name, value in known if isinstance(value, int)]
    return f", {', '.join(told)}" if told else ""


def _measured(policy: Record, store: Store, home: Home) -> Iterator[str]:
    """What the evaluations of this very model say, newest first, each once."""
    seen: set[str] = set()
    for run in home.records():
        for node, stage in run.stages.items():
            if stage.kind != Scores.kind or not stage.fingerprint or stage.fingerprint in seen:
                continue
            record, path = store.record(stage.fingerprint), store.find(stage.fingerprint)
            entry = record.inputs.get("policy") if record else None
            if path and isinstance(entry, InputEntry) and entry.digest == policy.digest:
                seen.add(stage.fingerprint)
                alone = RunRecord(
                    run_id=run.run_id, recipe=run.recipe, recipe_path="", stages={node: stage}
                )
                rows = [
                    (item.label, f"{item.figure.value:.3f}",
                     f"{item.figure.low:.3f} to {item.figure.high:.3f}", item.figure.n,
                     "" if item.figure.chance is None else f"{item.figure.chance:.3g}")
                    for item in headlines(alone, {node: path})
                ]  # fmt: skip
                yield f"{node} of run {run.run_id}:"
                yield _table(("figure", "value", "95 % interval", "n", "chance"), rows)
    if not seen:
        yield "Not measured: no evaluation in the store reads this model."


def _table(columns: tuple[str, ...], rows: Any) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = (
            cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False) for cell in row
        )
        escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines)
