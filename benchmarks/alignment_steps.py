"""A step of SFT, reward and DPO, batch to update, against TRL's trainers at the same shape.

Rows of one length (256 tokens, half of them the answer), and rows as long as those of real pairs (of
DATA/preference, else the demo's world). Each side goes over the same 32 rows twice, 8 a step, one thread,
in a process of its own, by turns; counted are the seconds of the processor of the second time. `reference
known` leaves the reference's pass out on both sides; else ours is the one before the training, theirs the
one in each step. Parts: `equal` or `real`, and the stage (`sft`, `reward`, `dpo`, `dpo_known`).
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.work import Row, Work, environment, run_own, run_peer, run_stage
from conf.dpo import DpoConfig
from conf.launch import LaunchConfig
from conf.pairs import PairsConfig
from conf.reward import RewardConfig
from conf.settings import SourceSpec
from conf.sft import SftConfig
from conf.shape import ShapeConfig
from conf.world import WorldConfig
from model import dpo, reward, sft
from model.batches import Batch
from model.dialogues import BucketedOrder, Dialogue, Pair
from model.engine import Engine, Loss, build_engine
from model.loop import accumulate
from model.optimizer import UpdateRule
from model.ranks import Ranks
from model.transformer import Transformer
from model.worker import keep_freed_memory
from storage.preferences import Preferences
from tasks.pairs import pairs
from tasks.world import world

PACKAGES = (
    "torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "datasets", "accelerate", "psutil", "numpy",
)  # fmt: skip
SHAPE = {"dim": 256, "layers": 6, "heads": 4, "kv_heads": 4, "ffn": 688, "context": 512}
VOCABULARY, EOS = 8192, 1
ROWS, BATCH_ROWS = 32, 8
BYTES_A_TOKEN = 3
KINDS = {
    "sft": ("SFT step", 2.0, 1.4),
    "reward": ("reward step", 1.5, 1.1),
    "dpo": ("DPO step", 3.0, 2.0),
    "dpo_known": ("DPO step, reference known", 3.0, 2.0),
}
"""Name, goal and floor."""
TURNS = 2
"""Of both; the better one counts."""

Lengths = tuple[int, int, int]
"""Tokens of prompt, chosen and rejected answer."""


def measure(work: Work) -> list[Row]:
    """For each length and stage one row, in rows (pairs) per second of the processor."""
    python = environment("alignment_steps", PACKAGES)
    wanted = [
        (lengths, kind)
        for lengths in ("equal", "real")
        for kind in KINDS
        if work.has(lengths, kind)
    ]
    rows: list[Row] = []
    for name, kind in wanted:
        lengths = real_lengths(work) if name == "real" else [(128, 128, 128)] * ROWS
        course = work.folder / "course.json"
        fields = {"shape": SHAPE, "vocabulary": VOCABULARY, "batch_rows": BATCH_ROWS}
        folder = str(work.folder / "trl")
        course.write_text(json.dumps({**fields, "rows": drawn(lengths), "folder": folder}), "utf-8")
        asked = [kind, str(course)]
        ours, theirs = float("inf"), float("inf")
        for _ in range(TURNS):
            ours = min(ours, run_own("alignment_steps", work.folder, asked)["processor"])
            found = run_peer(python, "alignment_steps", work.folder, asked)
            theirs = min(theirs, found["processor"])
        title, goal, floor = KINDS[kind]
        rates = (ROWS / ours, ROWS / theirs)
        rows.append(Row(f"{title}, {name} lengths", "TRL 1.16", *rates, "rows/s", goal, floor))
    return rows


def real_lengths(work: Work) -> list[Lengths]:
    """Lengths of pairs drawn from real ones that fit the context, a token for every three bytes."""
    if work.data is None:
        inputs = {"world": run_stage(world, WorldConfig(), {}, work.folder)}
        specs = (SourceSpec(node="world", path="preferences/train.jsonl"),)
    else:
        inputs = {}
        specs = (SourceSpec(path=str(work.data.absolute() / "preference/*/dpo_*")),)
    found = run_stage(pairs, PairsConfig(sources=specs), inputs, work.folder)
    assert isinstance(found, Preferences)
    lengths = [
        (
            _tokens("".join(message["content"] for message in row["prompt"])),
            _tokens(row["chosen"]),
            _tokens(row["rejected"]),
        )
        for row in found.rows("train")
    ]
    fitting = [item for item in lengths if item[0] + max(item[1:]) <= SHAPE["context"]]
    chosen = np.random.default_rng(0).permutation(len(fitting))[:ROWS]
    return [fitting[row] for row in chosen]


def drawn(lengths: Sequence[Lengths]) -> list[dict[str, list[int]]]:
    """Rows of such lengths, of tokens drawn at random; answers end with the end token."""
    source = np.random.default_rng(1)

    def ids(count: int) -> list[int]:
        return source.integers(2, VOCABULARY, count).tolist()

    return [
        {"prompt": ids(p), "chosen": [*ids(c - 1), EOS], "rejected": [*ids(r - 1), EOS]}
        for p, c, r in lengths
    ]


def _tokens(text: str) -> int:
    return max(2, len(text.encode()) // BYTES_A_TOKEN)


def main() -> None:
    """Measure our own steps: `python -m benchmarks.alignment_steps KIND COURSE.json ANSWER.json`."""
    kind, course, answer = sys.argv[1:]
    settings = json.loads(Path(course).read_text("utf-8"))
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = [
        Pair(row["prompt"], row["chosen"], row["rejected"], 0.0, str(number))
        for number, row in enumerate(settings["rows"])
    ]
    model = Transformer(
        ShapeConfig(**settings["shape"], is_tied=False),
        settings["vocabulary"],
        is_scalar=kind == "reward",
    )
    engine = build_engine(model, LaunchConfig(threads=1), Ranks(), UpdateRule())
    Path(answer).write_text(json.dumps({"processor": timed(kind, engine, rows)}), "utf-8")


def timed(kind: str, engine: Engine, rows: Sequence[Pair]) -> float:
    """Seconds of the processor for the second time over all rows, and for the reference's pass."""
    order = BucketedOrder([row.length for row in rows], BATCH_ROWS, seed=0)
    steps = len(rows) // BATCH_ROWS
    batch_of, loss, before = _stage(kind, engine, rows)
    started = 0.0
    for step in range(2 * steps):
        if step == steps:
            started = time.process_time()
        accumulate(engine, loss, [batch_of(order.rows_at(step))])
        engine.step(1e-4)
    return time.process_time() - started + before


def _stage(
    kind: str, engine: Engine, rows: Sequence[Pair]
) -> tuple[Callable[[list[int]], Batch], Loss, float]:
    """Batches and loss of a stage, and the seconds of what it does before its first step."""
    if kind == "sft":
        whole = [
            Dialogue(
                [*r.prompt, *r.chosen], [n >= len(r.prompt) for n in range(r.length)], r.name, ""
            )
            for r in (row._replace(rejected=row.chosen) for row in rows)
        ]
        return lambda part: sft.sft_batch([whole[n] for n in part]), sft.step_loss(SftConfig()), 0.0
    if kind == "reward":
        settings = RewardConfig()
        return (
            lambda part: reward.reward_batch([rows[n] for n in part]),
            reward.step_loss(settings),
            0.0,
        )
    settings = DpoConfig(rpo_alpha=0.0)
    scorer = dpo.Scorer(engine, settings, Ranks())
    scorer.logprobs(rows)
    started = time.process_time()
    reference = scorer.logprobs(rows)
    seconds = time.process_time() - started
    return (
        lambda part: dpo.dpo_batch([rows[n] for n in part], reference[part]),
        dpo.step_loss(settings),
        seconds if kind == "dpo" else 0.0,
    )


if __name__ == "__main__":
    main()
