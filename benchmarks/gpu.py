"""What the training core does on a CUDA device: `make bench-gpu`, or `python -m benchmarks.gpu [PART ...]`.

Parts: speed (tokens/s, share of peak, memory at 20m, 160m, 1b), packed (the same with rows of documents
that do not see one another, by a mask and by FlashAttention), precision (float16 with loss scale
against bfloat16 and float32), device (float32 losses against the CPU's), resume (kill -9 and go on,
the same bits), engines (ZeRO 1-3 and FSDP2 against plain), imports (what a worker loads). Writes
`gpu.json` and `gpu.md` into --out. With --tiny every part runs at toy size on whatever device is
there. Needs torch, numpy, safetensors, tokenizers and pydantic (and deepspeed for its engines).
"""

import argparse
import contextlib
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.distributions import closure, plain
from conf.contract import JobFile
from conf.launch import LaunchConfig
from conf.pretrain import PretrainConfig
from conf.shape import ShapeConfig
from model.batches import Batch
from model.engine import build_engine
from model.loop import accumulate
from model.optimizer import UpdateRule
from model.pretrain import pretrain_loss
from model.ranks import Ranks, be_deterministic
from model.speed import device_peak
from model.transformer import Transformer
from tests.model.small_tokens import documents, write_small_tokens

ROOT = Path(__file__).resolve().parents[1]
WORKER_NEEDS = ("torch", "numpy", "safetensors", "tokenizers", "pydantic")


@dataclass(frozen=True)
class Course:
    """One training whose speed is measured."""

    shape: str
    vocabulary: int
    rows: int
    """Of a micro-batch; halved until it fits."""
    steps: int
    goal_mfu: float = 0.0


FULL = (
    Course("20m", 24_000, 128, 20),
    Course("160m", 32_006, 64, 20, goal_mfu=0.50),
    Course("1b", 64_000, 16, 10, goal_mfu=0.55),
)
TINY = (Course("tiny", 512, 2, 2),)
DOCUMENT_TOKENS = 200
"""Of a document, on average."""
VARIANTS: Mapping[str, dict[str, Any]] = {
    "compiled, fused head": {"compile": True, "fused_head": True},
    "the same, kernels not deterministic": {
        "compile": True, "fused_head": True, "is_deterministic": False,
    },
    "compiled, fused head, activations recomputed": {
        "compile": True, "fused_head": True, "checkpoint_activations": True,
    },
    "fused head alone": {"compile": False, "fused_head": True},
    "neither": {"compile": False, "fused_head": False},
}  # fmt: skip


def main() -> None:
    """Run what is asked for, or all; a part that fails says so and the others go on."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("gpu-bench"), help="folder of the results")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on any device")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.tiny:
        raise SystemExit("no CUDA device is here; use --tiny to try the script itself")
    # Before the first product, as a worker does.
    be_deterministic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine(is_tiny=arguments.tiny)}
    for name in arguments.parts or PARTS:
        started = time.perf_counter()
        try:
            found[name] = PARTS[name](arguments.tiny)
        # Time on such a device is dear: a broken part must not cost the ones behind it.
        except Exception as error:  # noqa: BLE001
            found[name] = {"error": f"{type(error).__name__}: {error}"[:4000]}
        found.setdefault("seconds", {})[name] = round(time.perf_counter() - started, 1)
        (arguments.out / "gpu.json").write_text(json.dumps(found, indent=1), "utf-8")
        (arguments.out / "gpu.md").write_text(as_markdown(found), "utf-8")
        print(json.dumps({name: found[name]}), flush=True)
    failed = [name for name, part in found.items() if isinstance(part, dict) and "error" in part]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see {arguments.out / 'gpu.json'}")


def device() -> torch.device:
    """CUDA where it is, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(*, is_tiny: bool) -> dict[str, Any]:
    """What the figures were taken on: the two ceilings are measured, not quoted."""
    here = device()
    width, count = (256, 2) if is_tiny else (8192, 20)
    one = torch.randn(width, width, device=here, dtype=torch.bfloat16)
    product = _seconds(lambda: one @ one, count)
    source = torch.empty(width * width * (1 if is_tiny else 8), device=here)
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source), count)
    peak = device_peak(here, "bf16")
    return {
        "device": torch.cuda.get_device_name() if here.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "bf16_product_tflops": 2 * width**3 / product / 1e12,
        "copy_terabytes_per_second": 2 * source.numel() * 4 / copy / 1e12,
        "peak_tflops": peak.flops / 1e12,
        "peak_source": peak.source,
    }


def speed(is_tiny: bool) -> dict[str, Any]:
    """Tokens per second, share of the peak and peak memory of every shape and variant."""
    found: dict[str, Any] = {}
    for course in TINY if is_tiny else FULL:
        for variant, options in VARIANTS.items():
            if is_tiny and options["compile"]:
                continue
            name = f"{course.shape}, {variant}"
            found[name] = _fitting(course, options)
            print(json.dumps({name: found[name]}), flush=True)
    return found


def packed(is_tiny: bool) -> dict[str, Any]:
    """Rows of documents that do not see one another: by a mask of T x T and without one."""
    is_cuda = device().type == "cuda"
    course = TINY[0] if is_tiny else FULL[1]
    found: dict[str, Any] = {
        attention: _fitting(course, {"attention": attention}, is_document_masked=True)
        for attention in ("sdpa", "flash" if is_cuda else "eager")
    }
    losses = [part["first_loss"] for part in found.values()]
    return found | {"difference_of_first_losses": abs(losses[0] - losses[1]), "allowed": 1e-2}


def _fitting(
    course: Course, options: dict[str, Any], *, is_document_masked: bool = False
) -> dict[str, Any]:
    rows = course.rows
    while rows:
        # What was measured before lies in circles of references, and an error holds what it was raised in.
        gc.collect()
        torch.cuda.empty_cache()
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return _measured(course, rows, options, is_document_masked)
        rows //= 2
    return {"error": "not one row fits"}


def _measured(
    course: Course, rows: int, options: dict[str, Any], is_document_masked: bool
) -> dict[str, Any]:
    here, shape = device(), _shape(course.shape)
    torch.compiler.reset()
    launch = LaunchConfig(**options)
    torch.use_deterministic_algorithms(
        here.type == "cuda" and launch.is_deterministic, warn_only=True
    )
    settings = PretrainConfig(
        shape=shape,
        precision="bf16",
        batch_tokens=rows * shape.context,
        launch=launch,
        is_document_masked=is_document_masked,
    )
    model = Transformer(shape, course.vocabulary)
    engine = build_engine(model, launch, Ranks(device=here), UpdateRule(precision="bf16"))
    loss, batch = pretrain_loss(settings), _batch(rows, shape.context, course.vocabulary)

    def step() -> float:
        figures, _ = accumulate(engine, loss, [batch])
        engine.step(1e-4)
        return figures["loss"]

    started = time.perf_counter()
    [first_loss, *_] = [step() for _ in range(3)]
    _wait()
    warm = time.perf_counter() - started
    if here.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _seconds(step, course.steps)
    tokens = rows * shape.context
    flops = shape.training_flops(course.vocabulary, shape.context)
    peak = device_peak(here, "bf16").flops
    return {
        "parameters": shape.parameters(course.vocabulary),
        "first_loss": first_loss,
        "micro_batch": rows,
        "context": shape.context,
        "vocabulary": course.vocabulary,
        "tokens_per_second": tokens / seconds,
        "mfu": flops * tokens / seconds / peak if peak else None,
        "goal_mfu": course.goal_mfu or None,
        "peak_memory_gib": _peak_memory(),
        "warm_up_seconds": warm,
        "steps": course.steps,
    }


def precision(is_tiny: bool) -> dict[str, Any]:
    """Losses of fp32, bf16 and fp16 with its loss scale over the same steps."""
    found: dict[str, Any] = {}
    for name in ("fp32", "bf16", "fp16"):
        figures = _worker_losses(_settings(is_tiny, precision=name))
        found[name] = {
            "first_loss": figures[0]["loss"],
            "last_loss": figures[-1]["loss"],
            "loss_scale": figures[-1].get("loss_scale"),
            "overflows": figures[-1].get("overflows"),
        }
    wanted = found["fp32"]["last_loss"]
    found["worst_difference"] = max(abs(found[n]["last_loss"] - wanted) for n in ("bf16", "fp16"))
    return found


def against_cpu(is_tiny: bool) -> dict[str, Any]:
    """Largest difference of float32 losses over 20 steps between this device and the CPU."""
    runs = {
        kind: [line["loss"] for line in _worker_losses(_settings(is_tiny), device=kind)]
        for kind in ("cpu", "auto")
    }
    worst = max(abs(a - b) for a, b in zip(runs["cpu"], runs["auto"], strict=True))
    return {"steps": len(runs["cpu"]), "worst_difference": worst, "allowed": 1e-3}


def resume(is_tiny: bool) -> dict[str, Any]:
    """kill -9 in the middle, run again: the same bits as unbroken? With accumulation, dropout, phases."""
    found: dict[str, Any] = {}
    for name, options in (
        ("plain", {}),
        ("plain, bf16", {"precision": "bf16"}),
        ("plain, compiled", {"compile": True}),
    ):
        if is_tiny and "compile" in options:
            continue
        launch = {"micro_batch": 3, **{k: v for k, v in options.items() if k == "compile"}}
        settings = _settings(
            is_tiny,
            steps=30,
            **{k: v for k, v in options.items() if k != "compile"},
            checkpoint_every_steps=5,
        )
        with tempfile.TemporaryDirectory() as folder:
            whole, broken = Path(folder, "whole"), Path(folder, "broken")
            _finish(_start(whole, settings, **launch))
            job = _start(broken, settings, **launch)
            killed_after = _kill_after(job, broken, 12)
            _finish(_start(broken, settings, **launch))
            one, two = (path / "files/model.safetensors" for path in (whole, broken))
            found[name] = {
                "killed_after": killed_after,
                "same_bits": one.read_bytes() == two.read_bytes(),
            }
    return found


ENGINES = (
    ("fsdp", "none"), ("fsdp", "parameters"), ("zero1", "none"), ("zero2", "none"),
    ("zero2", "optimizer"), ("zero3", "none"), ("zero3", "parameters"),
)  # fmt: skip


def engines(is_tiny: bool) -> dict[str, Any]:
    """Each engine in one process: largest difference of its losses from plain's over 20 steps."""
    settings = _settings(is_tiny)
    wanted = [line["loss"] for line in _worker_losses(settings)]
    found: dict[str, Any] = {}
    for engine, offload in ENGINES:
        name = engine if offload == "none" else f"{engine}, {offload} offloaded"
        if engine.startswith("zero") and not _has("deepspeed"):
            found[name] = {"error": "deepspeed is not installed"}
            continue
        figures = _worker_losses(settings, engine=engine, offload=offload)
        losses = [line["loss"] for line in figures]
        worst = max(abs(a - b) for a, b in zip(losses, wanted, strict=True))
        found[name] = {"steps": len(losses), "worst_difference": worst, "allowed": 1e-3}
    return found


def imports(is_tiny: bool) -> dict[str, Any]:
    """Distributions a worker loads that are neither its five needs nor needed by one of them."""
    with tempfile.TemporaryDirectory() as folder:
        job = _job(Path(folder), _settings(is_tiny))
        program = (
            "import sys, runpy, json\n"
            f"sys.argv = ['model.pretrain', {str(job)!r}]\n"
            "runpy.run_module('model.pretrain', run_name='__main__')\n"
            "print('MODULES', json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))"
        )
        output = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=_environment(), check=True,
            capture_output=True, text=True,
        ).stdout  # fmt: skip
    modules = json.loads(output.rpartition("MODULES ")[2])
    by_module = metadata.packages_distributions()
    loaded = {plain(name) for module in modules for name in by_module.get(module, ())}
    foreign = loaded - closure(WORKER_NEEDS) - {"bessemer"}
    return {"needs": list(WORKER_NEEDS), "foreign": sorted(foreign)}


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "imports": imports,
    "device": against_cpu,
    "resume": resume,
    "precision": precision,
    "engines": engines,
    "speed": speed,
    "packed": packed,
}


def as_markdown(found: dict[str, Any]) -> str:
    """The results for people."""
    here = found["machine"]
    lines = [
        f"# {here['device']}, torch {here['torch']}",
        f"bf16 product {here['bf16_product_tflops']:.0f} TFLOP/s, copy "
        f"{here['copy_terabytes_per_second']:.2f} TB/s; mfu refers to {here['peak_tflops']:.0f} "
        f"TFLOP/s ({here['peak_source']}).",
    ]
    if "speed" in found and "error" not in found["speed"]:
        lines += [
            "",
            "| training | rows x context | tokens/s | MFU | goal | GiB |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in found["speed"].items():
            if "error" in row:
                lines.append(f"| {name} | {row['error']} | | | | |")
                continue
            mfu = f"{row['mfu']:.1%}" if row["mfu"] else ""
            goal = f"{row['goal_mfu']:.0%}" if row["goal_mfu"] else ""
            lines.append(
                f"| {name} | {row['micro_batch']} x {row['context']} | {row['tokens_per_second']:,.0f} "
                f"| {mfu} | {goal} | {row['peak_memory_gib']:.1f} |"
            )
    rest = {name: part for name, part in found.items() if name not in ("machine", "speed")}
    return "\n".join([*lines, "", "```json", json.dumps(rest, indent=1), "```", ""])


def _shape(name: str) -> ShapeConfig:
    lines = (ROOT / "conf" / "shape" / f"{name}.yaml").read_text("utf-8").splitlines()
    fields = dict(line.split(": ", 1) for line in lines if not line.startswith("#"))
    return ShapeConfig.model_validate(fields)


def _batch(rows: int, context: int, vocabulary: int) -> Batch:
    ids = torch.randint(vocabulary, (rows, context + 1), generator=torch.Generator().manual_seed(0))
    tensors = {
        "ids": ids[:, :-1].contiguous(),
        "labels": ids[:, 1:].contiguous(),
        "is_start": ids[:, :-1] % DOCUMENT_TOKENS == 0,
    }
    return Batch(tensors, {"tokens": float(rows * context)}, rows * context)


def _settings(is_tiny: bool, *, steps: int = 20, **options: Any) -> PretrainConfig:
    shape = (
        ShapeConfig(dim=32, layers=2, heads=2, kv_heads=1, context=32, dropout=0.1)
        if is_tiny
        else ShapeConfig(dim=256, layers=4, heads=4, kv_heads=2, context=128, dropout=0.1)
    )
    fixed: dict[str, Any] = {
        "shape": shape, "batch_tokens": 8 * shape.context, "tokens": steps * 8 * shape.context,
        "learning_rate": 1e-3, "evaluate_every_steps": 0,
        "phases": [{"tokens": 0.6, "mix": {"en": 0.7, "zh": 0.3}}, {"tokens": 0.4}],
    }  # fmt: skip
    return PretrainConfig.model_validate(fixed | options)


def _job(attempt: Path, settings: PretrainConfig, **launch: Any) -> Path:
    tokens = attempt / "tokens"
    if not tokens.exists():
        write_small_tokens(tokens, documents(400))
    for name in ("files", "logs", "state"):
        (attempt / name).mkdir(parents=True, exist_ok=True)
    job = JobFile(
        stage="pretrain",
        node="pretrain",
        settings=settings.model_dump(mode="json"),
        inputs={"tokens": str(tokens)},
        sources={},
        files=attempt / "files",
        logs=attempt / "logs",
        state=attempt / "state",
        launch=LaunchConfig.model_validate({"micro_batch": 3, **launch}),
    )
    path = attempt / "state" / "job.json"
    path.write_text(job.model_dump_json(), "utf-8")
    return path


def _start(attempt: Path, settings: PretrainConfig, **launch: Any) -> "subprocess.Popen[str]":
    job = _job(attempt, settings, **launch)
    return subprocess.Popen(
        [sys.executable, "-m", "model.pretrain", str(job)],
        cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def _environment() -> dict[str, str]:
    """Of a job of one process, as a launcher would set it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return (
        os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"} | place | address
    )


def _finish(job: "subprocess.Popen[str]") -> None:
    output, _ = job.communicate(timeout=400)
    if job.returncode:
        raise RuntimeError(f"the worker ended with {job.returncode}: {output[-1500:]}")


def _kill_after(job: "subprocess.Popen[str]", attempt: Path, steps: int) -> int:
    while len(_lines(attempt)) < steps:
        if job.poll() is not None:
            raise RuntimeError(f"the worker ended before step {steps}: {job.communicate()[0]}")
        time.sleep(0.001)
    job.kill()
    job.communicate()
    return len(_lines(attempt))


def _lines(attempt: Path) -> list[dict[str, Any]]:
    path = attempt / "logs" / "metrics.jsonl"
    text = path.read_text("utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _worker_losses(settings: PretrainConfig, **launch: Any) -> list[dict[str, Any]]:
    folder = Path(tempfile.mkdtemp())
    try:
        _finish(_start(folder, settings, **launch))
        return _lines(folder)
    finally:
        shutil.rmtree(folder)


def _seconds(work: Callable[[], object], count: int) -> float:
    """Median seconds of one call, on a warm device."""
    work()
    _wait()
    marks = [time.perf_counter()]
    for _ in range(count):
        work()
        _wait()
        marks.append(time.perf_counter())
    taken = sorted(b - a for a, b in pairwise(marks))
    return taken[len(taken) // 2]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_memory() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def _has(name: str) -> bool:
    return name in metadata.packages_distributions()


if __name__ == "__main__":
    main()
