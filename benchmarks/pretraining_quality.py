"""The `20m` shape trained for half an hour on two cores, by us and by litgpt's recipe: held-out bits per byte.

    python -m benchmarks.pretraining_quality --data DIR --out OUT [--side SIDE] [--seed N] [--minutes M]
    python -m benchmarks.pretraining_quality --out OUT --summary

Both sides train the same rows in the same order, with the same tokenizer, shape, batch and precision, and are
scored by the same code on the same held-out documents. Ours is a recipe of the product: stages from extract
to pretrain, the worker under its launcher, killed with SIGKILL once on the way. litgpt's runs in an
environment of its own (`peers/pretraining_quality.py`). Both go on where they stopped when called again;
--minutes ends a call after so long. A run takes TOKENS / speed: about half an hour on two idle cores.

Side `litgpt` has the values of litgpt's `config_hub/pretrain`, side `litgpt-defaults` those of the bare
command `litgpt pretrain` (0.5.13), which are torch's AdamW's. On so few tokens neither can keep 512 rows a
step (there would be 22 steps) and 2,000 steps of warm-up: both get our batch and our share of warm-up. Its
option `tie_embeddings` is on, since the shape is tied; nothing is compiled, on either side.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from benchmarks.peers.pretraining_quality import peak_bytes
from benchmarks.training_step import PACKAGES, WITHOUT_DEPENDENCIES
from benchmarks.work import WORKERS, environment
from conf.contract import PROGRESS
from conf.pretrain import PretrainConfig
from conf.shape import ShapeConfig
from flows.execution import Execution, Listener
from flows.plan import plan
from flows.preparation import Request, prepare
from flows.runs import Home
from model.pretrain import Samples
from model.ranks import Ranks
from model.transformer import Transformer, token_logprobs
from model.weights import load_model, load_tensors
from storage.tokens import TokenFiles
from tasks.launch import JobFailed
from tasks.rank import note_path
from tasks.stage import Job

TOKENS = 6_000_640
RECIPE = """
defaults: [{shape: 20m}, _self_]
stages:
  extract:
    sources: [{path: "${data}/pretrain/*/*", domain: "{folder}"}]
    max_document_chars: 20_000
  filter: {from: {corpus: extract}}
  dedup: {from: {corpus: filter}}
  tokenizer: {from: {corpus: dedup}, vocabulary: 24000, sample_bytes: 16_000_000}
  tokenize: {from: {corpus: dedup, tokenizer: tokenizer}}
  pretrain:
    from: {tokens: tokenize}
    batch_tokens: 4096
    learning_rate: 3.0e-3
    schedule: linear
    warmup: 0.05
    floor: 0.0
    optimizer: muon
    precision: bf16
    held_tokens: 4096  # of each of ten domains
    evaluate_every_steps: 200
    launch: {micro_batch: 4, threads: 2, checkpoint_seconds: 120, grace_seconds: 120}
"""
SHARED: dict[str, Any] = {
    "least_rate": 4e-5, "clip": 1.0, "warmup": 0.05, "micro_rows": 4, "save_seconds": 120, "threads": 2,
}  # fmt: skip
THEIRS: dict[str, dict[str, Any]] = {
    "litgpt": {"learning_rate": 4e-4, "betas": [0.9, 0.95], "weight_decay": 0.1},
    "litgpt-defaults": {"learning_rate": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.01},
}
SIDES = ("ours", *THEIRS)
SCORED_DOCUMENTS = 40
"""Held-out documents of each domain that both are scored on, at most."""
KILL_AT = 0.4
"""Share of the steps behind which our worker is killed."""
LARGEST_GAP = 1e-3
"""Of the logits of litgpt's weights here and there, in float32."""
LITGPT_NAMES = {
    "attention_norm": "norm_1", "attention_out": "attn.proj", "ffn_norm": "norm_2",
    "gate": "mlp.fc_1", "up": "mlp.fc_2", "ffn_out": "mlp.proj",
}  # fmt: skip
"""Our names within a block -> litgpt's."""


def main() -> None:
    """Train one side and score it, or print what the runs in OUT have come to."""
    parser = argparse.ArgumentParser(prog="benchmarks.pretraining_quality", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of data; its pretrain/ is read")
    parser.add_argument("--out", type=Path, required=True, help="where runs live and go on")
    parser.add_argument("--side", choices=SIDES, help="ours, then litgpt by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="to train on; %(default)s")
    parser.add_argument("--minutes", type=float, default=0.0, help="end this call after so long")
    parser.add_argument("--summary", action="store_true", help="print the runs in OUT, train none")
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    if arguments.summary:
        print(summary(out))
        return
    if arguments.data is None:
        raise SystemExit("--data is missing: the folder whose pretrain/ holds text")
    # Its lock is what trainings on one processor wait for.
    os.environ |= {"BESSEMER_HOME": str(out / "home"), "BESSEMER_WORKERS": str(WORKERS)}
    for asked in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(asked, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 60 * arguments.minutes)
    run = Run(out, arguments.data.absolute(), arguments.seed, arguments.tokens)
    for side in [arguments.side] if arguments.side else SIDES[:2]:
        run.train(side)
    print(summary(out))


@dataclass(frozen=True)
class Run:
    """All sides of one seed."""

    out: Path
    data: Path
    seed: int
    tokens: int

    def train(self, side: str) -> None:
        """Train and score a side, unless that is done already."""
        folder = self.out / f"{side}-{self.seed}"
        if (folder / "result.json").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        files = TokenFiles(self._built("tokenize") / "files")
        if side == "ours":
            model, figures = self._ours(folder)
        else:
            model, figures = self._litgpt(folder, files, THEIRS[side])
        about = {"side": side, "seed": self.seed, "tokens": self.tokens}
        _write(folder / "result.json", {**about, **figures, "bits_per_byte": scores(model, files)})

    def _ours(self, folder: Path) -> tuple[Transformer, dict[str, Any]]:
        if not (folder / "plan.json").exists():
            _write(folder / "plan.json", self._planned())
        watch, artifact = Watch(folder / "watch.json"), None
        while artifact is None:
            try:
                artifact = self._built("pretrain", watch)
            except JobFailed:
                if not watch.has_just_killed:
                    raise
        metrics = json.loads((artifact / "record.json").read_text("utf-8"))["metrics"]
        told = json.loads((folder / "plan.json").read_text("utf-8"))
        figures = {**watch.figures(), "seconds": metrics["seconds"], "loss": metrics["loss"]}
        return load_model(artifact / "files"), {**figures, "plan": told}

    def _planned(self) -> dict[str, Any]:
        """What `bessemer plan` says of the training."""
        [item] = [x for x in plan(self._prepared("pretrain"), self.out) if x.node == "pretrain"]
        assert item.costs is not None
        return {**item.expected, "rate_source": item.costs.rate_source}

    def _litgpt(
        self, folder: Path, files: TokenFiles, recipe: dict[str, Any]
    ) -> tuple[Transformer, dict[str, Any]]:
        settings = self._prepared("pretrain").graph.nodes["pretrain"].settings
        assert isinstance(settings, PretrainConfig)
        shape, vocabulary = settings.shape, files.meta.vocabulary
        if not (folder / "rows.npz").exists():
            write_rows(folder / "rows.npz", files, settings)
        own = {
            "shape": {**shape.model_dump(), "ffn": shape.ffn_width},
            "vocabulary": vocabulary,
            "rows": settings.batch_rows,
            "precision": settings.precision,
            "seed": self.seed,
        }
        _write(folder / "course.json", {**SHARED, **recipe, **own})
        run_peer(folder)
        model = Transformer(shape, vocabulary)
        model.load_state_dict(of_litgpt(load_tensors(folder / "weights.safetensors"), shape))
        check_logits(model, folder)
        answer = json.loads((folder / "answer.json").read_text("utf-8"))
        return model, {name: answer[name] for name in ("seconds", "cpu_seconds", "peak_bytes")}

    def _built(self, node: str, watch: "Watch | None" = None) -> Path:
        """The artifact of a node of the recipe, built where it is not there, without Prefect."""
        execution = self._prepared(node)
        if watch:
            execution.listeners.append(Listener(on_job=watch.begin))
        started = time.perf_counter()
        execution.start()
        try:
            while (name := execution.next_ready(execution.selected)) is not None:
                execution.run(name)
        finally:
            execution.finish(time.perf_counter() - started)
        return Path(str(execution.record.stages[node].path))

    def _prepared(self, node: str) -> Execution:
        recipe = self.out / "recipe.yaml"
        self.out.mkdir(parents=True, exist_ok=True)
        recipe.write_text(RECIPE, "utf-8")
        given = [f"data={self.data}", f"seed={self.seed}", f"pretrain.tokens={self.tokens}"]
        request = Request(str(recipe), given, until=node)
        return prepare(request, Home(self.out / "home"), base=self.out)


class Watch:
    """Follows our worker from outside: what it costs, and its end by SIGKILL, once."""

    def __init__(self, path: Path) -> None:
        self._path, self.has_just_killed = path, False
        told = json.loads(path.read_text("utf-8")) if path.exists() else {}
        self._killed_at: int | None = told.get("killed_at_step")
        self._processes: dict[str, dict[str, float]] = told.get("processes", {})

    def begin(self, node: str, job: Job) -> None:
        """A node is about to be built."""
        self.has_just_killed = False
        if job.stage == "pretrain":
            threading.Thread(target=self._follow, args=(job,), daemon=True).start()

    def figures(self) -> dict[str, Any]:
        """Of all processes that worked on the training."""
        processes = self._processes.values()
        return {
            "cpu_seconds": sum(process["cpu_seconds"] for process in processes),
            "peak_bytes": max(process["peak_bytes"] for process in processes),
            "starts": len(processes),
            "killed_at_step": self._killed_at,
        }

    def _follow(self, job: Job) -> None:
        while job.path.exists() and not self.has_just_killed:
            # The worker may end at any time: then there is nothing to look at any more.
            with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
                self._look(job)
            time.sleep(1)

    def _look(self, job: Job) -> None:
        pid = json.loads(note_path(job.state, 0).read_text("utf-8"))["pid"]
        process = psutil.Process(pid)
        times, peak = process.cpu_times(), peak_bytes(pid)
        name = f"{pid} since {process.create_time():.0f}"
        self._processes[name] = {"cpu_seconds": times.user + times.system, "peak_bytes": peak}
        place = json.loads((job.logs / PROGRESS).read_text("utf-8"))
        is_due = 0 < KILL_AT * place["total"] <= place["step"]
        has_saved = any((job.state / "checkpoints").glob("step_*"))
        if self._killed_at is None and is_due and has_saved:
            self._killed_at, self.has_just_killed = place["step"], True
            process.kill()
        _write(self._path, {"killed_at_step": self._killed_at, "processes": self._processes})


def write_rows(path: Path, files: TokenFiles, settings: PretrainConfig) -> None:
    """The rows that our training reads, in its order: `ids` and `labels`, (rows, T) each."""
    plan = settings.plan({name: files.count(name, "train").tokens for name in files.domains})
    samples = Samples(files, settings, plan, Ranks(), 0)
    batches = [batch for step in range(plan.steps) for batch in samples.at(step)]
    labels = torch.cat([batch["labels"] for batch in batches])
    ids = torch.cat([batch["ids"] for batch in batches])
    # What torch's cross-entropy leaves out by default, and litgpt's.
    labels[labels < 0] = -100
    draft = path.with_suffix(".draft.npz")
    np.savez(draft, ids=ids.numpy().astype(np.uint16), labels=labels.numpy().astype(np.int32))
    draft.replace(path)


def run_peer(folder: Path) -> None:
    """Train litgpt's side to its end, or stop it where this call ends before."""
    python = environment("training_step", PACKAGES, without_dependencies=WITHOUT_DEPENDENCIES)
    script = Path(__file__).parent / "peers" / "pretraining_quality.py"
    with (folder / "output.log").open("a", encoding="utf-8") as log:
        worker = subprocess.Popen([python, script, folder], stdout=log, stderr=log)
        try:
            code = worker.wait()
        finally:
            worker.terminate()
            worker.wait()
    if code:
        raise RuntimeError(f"litgpt's side ended with {code}; see {folder / 'output.log'}")


def of_litgpt(weights: Mapping[str, Tensor], shape: ShapeConfig) -> dict[str, Tensor]:
    """litgpt's weights of a tied model by our names; its matrix of queries, keys and values is cut."""
    query, key = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    ours = {
        "embedding.weight": weights["lm_head.weight"],
        "norm.weight": weights["transformer.ln_f.weight"],
    }
    for layer in range(shape.layers):
        theirs, block = f"transformer.h.{layer}", f"blocks.{layer}"
        parts = weights[f"{theirs}.attn.qkv.weight"].split((query, key, key))
        for name, part in zip(("query", "key", "value"), parts, strict=True):
            ours[f"{block}.{name}.weight"] = part.contiguous()
        for name, other in LITGPT_NAMES.items():
            ours[f"{block}.{name}.weight"] = weights[f"{theirs}.{other}.weight"]
    return ours


def check_logits(model: Transformer, folder: Path) -> None:
    """Raise RuntimeError unless the model gives the logits that litgpt gave for the first row."""
    ids = torch.from_numpy(np.load(folder / "rows.npz")["ids"][:1].astype(np.int64))
    with torch.inference_mode():
        found = model.logits(model.hidden(ids))[0]
    gap = (found - torch.from_numpy(np.load(folder / "probe.npy"))).abs().max().item()
    if gap > LARGEST_GAP:
        raise RuntimeError(f"litgpt's logits and those of its weights here differ by {gap:.2g}")


def scores(model: Transformer, files: TokenFiles) -> dict[str, float]:
    """Held-out bits per byte of each domain and of all their bytes together."""
    torch.set_num_threads(WORKERS)
    sums: dict[str, list[float]] = {}
    for domain in files.domains:
        for ids, size in files.held_documents(domain, SCORED_DOCUMENTS):
            nats = nats_of(model, [files.meta.eos, *ids.tolist()])
            for name in (domain, "all"):
                total = sums.setdefault(name, [0.0, 0.0])
                sums[name] = [total[0] + nats, total[1] + size]
    return {name: nats / size / math.log(2) for name, (nats, size) in sums.items()}


@torch.inference_mode()
def nats_of(model: Transformer, tokens: Sequence[int]) -> float:
    """-ln P of all tokens but the first, each scored once, in windows of the context side by side (our
    evaluate's stride=1.0); a shorter last window reaches back."""
    context = model.shape.context
    total, scored = 0.0, 1
    while scored < len(tokens):
        end = min(len(tokens), scored + context)
        window = torch.tensor([tokens[max(0, end - context - 1) : end]])
        labels = window[:, 1:].clone()
        labels[:, : labels.shape[1] - (end - scored)] = -1
        hidden = model.hidden(window[:, :-1])
        total -= token_logprobs(model.head_weight, hidden, labels).double().sum().item()
        scored = end
    return total


def summary(out: Path) -> str:
    """What the runs in the folder have come to, as text."""
    runs = [json.loads(path.read_text("utf-8")) for path in sorted(out.glob("*-*/result.json"))]
    by_side = {side: [run for run in runs if run["side"] == side] for side in SIDES}
    ours = by_side["ours"]
    lines = [_run_line(run) for run in runs] + [_plan_line(run) for run in ours]
    for side in THEIRS:
        if ours and (theirs := by_side[side]):
            lines.append(f"held-out bits per byte, medians, ours against {side}:")
            for name in ours[0]["bits_per_byte"]:
                here, there = (
                    statistics.median(run["bits_per_byte"][name] for run in some)
                    for some in (ours, theirs)
                )
                lines.append(f"  {name:28} {here:.4f} / {there:.4f} = {here / there:.4f}")
    return "\n".join(lines) or "no run has ended yet"


def _run_line(run: dict[str, Any]) -> str:
    killed = run.get("killed_at_step")
    return (
        f"{run['side']} seed {run['seed']}: {run['bits_per_byte']['all']:.4f} bits per byte after "
        f"{run['tokens']:,} tokens, {run['seconds'] / 60:.1f} minutes, {run['cpu_seconds']:,.0f} CPU s, "
        f"peak {run['peak_bytes'] / 1e6:,.0f} MB" + (f", killed at step {killed}" if killed else "")
    )


def _plan_line(run: dict[str, Any]) -> str:
    told = run["plan"]
    return (
        f"plan of seed {run['seed']}: memory {told['memory_bytes'] / 1e6:,.0f} MB "
        f"({told['memory_bytes'] / run['peak_bytes']:.3f} of the peak), {told['seconds'] / 60:.1f} minutes "
        f"({told['seconds'] / run['seconds']:.3f} of the clock, "
        f"{WORKERS * told['seconds'] / run['cpu_seconds']:.3f} of the processor; {told['rate_source']})"
    )


def _write(path: Path, content: dict[str, Any]) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(content, indent=1), "utf-8")
    draft.replace(path)


if __name__ == "__main__":
    main()
