"""Two costs of a training beside its products: memory of the output head, and metrics.

The head takes loss and gradient of 4,096 labels at the vocabulary of baby-llama2-chinese, all logits at
once against ours, piece by piece; each in a process of its own, whose peak counts. Metrics are all that
a step writes, against the step of the smallest shape that is trained for real.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.work import Row, Work
from conf.launch import LaunchConfig
from conf.pretrain import PretrainConfig
from conf.shape import ShapeConfig
from model.batches import Batch
from model.engine import build_engine
from model.head import label_loss
from model.journal import Journal
from model.loop import LoopPlan, train
from model.optimizer import UpdateRule
from model.pretrain import pretrain_loss
from model.ranks import Ranks
from model.transformer import Transformer, token_logprobs
from model.weights import Checkpoints

VOCABULARY, WIDTH, LABELS = 64_793, 512, 4_096
HEADS = ("at once", "recomputed", "fused")
TINY = ShapeConfig(dim=128, layers=3, heads=4, kv_heads=2, ffn=344, context=128)
STEPS = 12


def measure(work: Work) -> list[Row]:
    """Labels per MB of peak memory, and the share of a step that is not metrics."""
    megabytes = {name: _peak(name) for name in HEADS}
    rows = [
        Row(
            f"{name} head, vocabulary {VOCABULARY:,}", "all logits at once",
            LABELS / megabytes[name], LABELS / megabytes["at once"], "labels/MB", 2, 1,
        )
        for name in HEADS[1:]
    ]  # fmt: skip
    return [
        *rows,
        Row("share of a step beside metrics", "1", _quiet_share(work), 1, "", 0.99, 0.99),
    ]


def main() -> None:
    """Peak of one way: `python -m benchmarks.training_costs HEAD` prints MB beyond weights and states."""
    name = sys.argv[1]
    torch.set_num_threads(1)
    weight = torch.randn(VOCABULARY, WIDTH).mul_(0.02).requires_grad_()
    hidden = torch.randn(LABELS, WIDTH, requires_grad=True)
    labels = torch.randint(VOCABULARY, (LABELS,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    match name:
        case "at once":
            loss = F.cross_entropy(F.linear(hidden, weight), labels)
        case "recomputed":
            loss = -token_logprobs(weight, hidden, labels).mean()
        case _:
            loss = label_loss(weight, hidden, labels) / LABELS
    loss.backward()
    assert weight.grad is not None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"megabytes": peak / 1024, "loss": loss.item()}))


def _peak(name: str) -> float:
    module = [sys.executable, "-m", "benchmarks.training_costs", name]
    told = subprocess.run(module, check=True, capture_output=True, text=True).stdout
    return json.loads(told)["megabytes"]


class _TimedJournal(Journal):
    """Counts the processor's seconds that writing takes."""

    seconds = 0.0

    def write(self, step: int, figures: object) -> None:
        self._time(lambda: super(_TimedJournal, self).write(step, figures))  # type: ignore[arg-type]

    def progress(self, *arguments: object, **options: object) -> None:
        self._time(lambda: super(_TimedJournal, self).progress(*arguments, **options))  # type: ignore[arg-type]

    def _time(self, write: Callable[[], None]) -> None:
        started = time.process_time()
        write()
        self.seconds += time.process_time() - started


def _quiet_share(work: Work) -> float:
    settings = PretrainConfig(shape=TINY, batch_tokens=16_384, launch=LaunchConfig(threads=1))
    engine = build_engine(Transformer(TINY, 512), settings.launch, Ranks(), UpdateRule())
    ids = torch.randint(512, (settings.batch_rows, TINY.context))
    rows = torch.arange(settings.batch_rows)
    batch = Batch({"ids": ids, "labels": ids, "rows": rows}, {"tokens": ids.numel()}, ids.numel())
    journal = _TimedJournal(work.folder / "logs")
    folder = Path(work.folder / "checkpoints")
    started = time.process_time()
    train(
        engine,
        batch_at=lambda _: [batch],
        loss=pretrain_loss(settings),
        plan=LoopPlan(steps=STEPS, learning_rate=lambda _: 1e-3, guard_sigmas=6.0),
        checkpoints=Checkpoints(folder, {}, Ranks()),
        journal=journal,
    )
    return 1 - journal.seconds / (time.process_time() - started)


if __name__ == "__main__":
    main()
