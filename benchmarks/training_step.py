"""A training step, forward to update, against transformers' Llama, litgpt's and nanoGPT's GPT of the same shape.

Eager in float32 and compiled in bfloat16, one thread, each in a process of its own, by turns; seconds
are those of the processor. nanoGPT is no package: its rows are measured where a clone of its repository
lies in `.bench/nanoGPT`, with as many heads of keys as of queries and a tied output on both sides.
Ours keeps freed memory, as a worker does (`keep_freed_memory`); theirs run as they are installed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.training_step import timed
from benchmarks.work import Row, Work, environment, run_own, run_peer
from conf.launch import LaunchConfig
from conf.pretrain import PretrainConfig
from conf.shape import ShapeConfig
from model.batches import Batch
from model.engine import build_engine
from model.optimizer import UpdateRule
from model.pretrain import pretrain_loss
from model.ranks import Ranks
from model.transformer import Transformer
from model.worker import keep_freed_memory

LLAMAS = ("transformers", "litgpt")
NANOGPT = Path(".bench/nanoGPT")
PACKAGES = (
    "torch==2.13.0", "transformers==5.23.0", "litgpt==0.5.13", "lightning", "jsonargparse", "psutil", "numpy",
)  # fmt: skip
WITHOUT_DEPENDENCIES = ("litgpt==0.5.13",)
"""Its requirements are those of its data sets and servers."""
SHAPES: dict[str, dict[str, Any]] = {
    "20m": {
        "vocabulary": 24_000, "rows": 2,
        "shape": {"dim": 384, "layers": 8, "heads": 6, "kv_heads": 2, "ffn": 1024, "context": 512},
    },
    "6m": {
        "vocabulary": 8192, "rows": 8,
        "shape": {"dim": 256, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 688, "context": 256},
    },
}  # fmt: skip
TURNS = 2
"""Of everybody; the better one counts."""


def measure(work: Work) -> list[Row]:
    """For each shape and precision one row against each peer, in tokens per second of the processor."""
    python = environment("training_step", PACKAGES, without_dependencies=WITHOUT_DEPENDENCIES)
    rows: list[Row] = []
    for name, fields in SHAPES.items():
        for kind in ("fp32", "bf16 compiled"):
            course: dict[str, Any] = {**fields, "is_compiled": kind == "bf16 compiled"}
            if work.has(name, kind, *LLAMAS):
                rows += _rows(f"{name}, {kind}", course, LLAMAS, python, work.folder)
            if work.has(name, kind, "nanogpt") and NANOGPT.exists():
                heads = course["shape"]["heads"]
                course["shape"] = {**course["shape"], "kv_heads": heads, "is_tied": True}
                course["nanogpt"] = str(NANOGPT.absolute())
                rows += _rows(f"{name}, tied, {kind}", course, ("nanogpt",), python, work.folder)
    return rows


def _rows(
    name: str, course: dict[str, Any], peers: tuple[str, ...], python: Path, folder: Path
) -> list[Row]:
    path = folder / "course.json"
    path.write_text(json.dumps(course), "utf-8")
    seconds = dict.fromkeys(("ours", *peers), float("inf"))
    for _ in range(TURNS):
        own = run_own("training_step", folder, [str(path)])
        seconds["ours"] = min(seconds["ours"], own["processor"])
        for peer in peers:
            theirs = run_peer(python, "training_step", folder, [peer, str(path)])
            seconds[peer] = min(seconds[peer], theirs["processor"])
    tokens = course["rows"] * course["shape"]["context"]
    goal, floor = (1.1, 1.0) if course["is_compiled"] else (1.05, 0.98)
    return [
        Row(f"training step, {name}", peer, tokens / seconds["ours"], tokens / seconds[peer],
            "tok/s", goal, floor)
        for peer in peers
    ]  # fmt: skip


def main() -> None:
    """Measure our own steps: `python -m benchmarks.training_step COURSE.json ANSWER.json`."""
    course, answer = sys.argv[1:]
    settings = json.loads(Path(course).read_text("utf-8"))
    torch.set_num_threads(1)
    keep_freed_memory()
    found = timed(_Steps(settings), settings)
    Path(answer).write_text(json.dumps(found), "utf-8")


class _Steps:
    def __init__(self, settings: dict[str, Any]) -> None:
        is_compiled = settings["is_compiled"]
        launch = LaunchConfig(compile=is_compiled, threads=1)
        shape = ShapeConfig.model_validate({"is_tied": False, **settings["shape"]})
        rule = UpdateRule(precision="bf16" if is_compiled else "fp32")
        model = Transformer(shape, settings["vocabulary"])
        self._engine = build_engine(model, launch, Ranks(), rule)
        self._loss = pretrain_loss(
            PretrainConfig(
                shape=shape,
                batch_tokens=settings["rows"] * shape.context,
                precision=rule.precision,
                launch=launch,
            )
        )

    def __call__(self, ids: Tensor, labels: Tensor) -> None:
        rows = torch.arange(len(ids))
        batch = Batch({"ids": ids, "labels": labels, "rows": rows}, {}, ids.numel())
        self._engine.backward(self._loss, batch, {"tokens": ids.numel()}, is_last=True)
        self._engine.step(1e-4)


if __name__ == "__main__":
    main()
