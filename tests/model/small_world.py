"""A tiny bilingual world for the workers: tokenizer, policy, conversations, preferences, job files."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from conf.contract import JobFile
from conf.launch import LaunchConfig
from conf.settings import Settings
from conf.shape import ShapeConfig
from model.journal import Journal
from model.ranks import Ranks
from model.transformer import Transformer
from model.weights import save_model
from storage.jsonl import SplitWriter
from storage.tokenizer import SPECIAL_TOKENS, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ShapeConfig(dim=32, layers=2, heads=2, kv_heads=1, context=96)
ANIMALS = [
    ("cat", "猫"),
    ("dog", "狗"),
    ("cow", "牛"),
    ("pig", "猪"),
    ("fox", "狐"),
    ("bear", "熊"),
]
FOODS = [
    ("fish", "鱼"),
    ("bones", "骨头"),
    ("grass", "草"),
    ("corn", "玉米"),
    ("eggs", "蛋"),
    ("honey", "蜜"),
]


def facts() -> list[tuple[str, str]]:
    """Questions and right answers, in both languages."""
    rows: list[tuple[str, str]] = []
    for (animal, 动物), (food, 食物) in zip(ANIMALS, FOODS, strict=True):
        rows += [(f"What does the {animal} eat?", f"The {animal} eats {food}.")]
        rows += [(f"Tell me the food of the {animal}.", f"It eats {food}.")]
        rows += [(f"{动物}吃什么？", f"{动物}吃{食物}。"), (f"{动物}的食物？", f"是{食物}。")]
    return rows


def write_world(folder: Path, *, repeats: int = 4, shape: ShapeConfig = SHAPE) -> None:
    """Write `policy/`, `conversations/` and `preferences/`, each a `files` folder of an artifact.

    The better answer of a pair is the right one, the worse one is rude. Every fifth fact is held out.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for fact in facts() for text in fact] + [
        "user\n",
        "assistant\n",
        "Go away. 走开。",
    ]
    tokenizer.train_from_iterator(texts * 3, trainer)
    (folder / "tokenizer").mkdir(parents=True)
    meta = write_tokenizer(folder / "tokenizer", tokenizer, "gpt-2")
    model = Transformer(shape, meta.vocabulary, seed=1)
    save_model(folder / "policy", model, role="policy", tokenizer=folder / "tokenizer")
    with (
        SplitWriter(folder / "conversations") as chats,
        SplitWriter(folder / "preferences") as pairs,
    ):
        for number, (question, answer) in enumerate(facts() * repeats):
            split = "held" if number % len(facts()) % 5 == 3 else "train"
            prompt = [{"role": "user", "content": question}]
            chats.write(
                split,
                {
                    "id": f"c{number}",
                    "messages": [*prompt, {"role": "assistant", "content": answer}],
                    "domain": "en" if question.isascii() else "zh",
                    "source": "",
                    "language": "en" if question.isascii() else "zh",
                },
            )
            rude = "Go away." if question.isascii() else "走开。"
            pairs.write(
                split,
                {
                    "id": f"p{number}",
                    "prompt": prompt,
                    "chosen": answer,
                    "rejected": f"{answer} {rude}" if number % 2 else rude,
                    "margin": 0.5 + number % 2,
                    "domain": "food",
                },
            )


def make_job(
    folder: Path,
    stage: str,
    settings: Settings,
    inputs: dict[str, Path],
    launch: LaunchConfig | None = None,
    sources: dict[str, Path] | None = None,
) -> JobFile:
    """A job in a fresh attempt folder."""
    job = JobFile(
        stage=stage,
        node=stage,
        settings=settings.model_dump(mode="json"),
        inputs={name: str(path) for name, path in inputs.items()},
        sources={name: [str(path)] for name, path in (sources or {}).items()},
        files=folder / "files",
        logs=folder / "logs",
        state=folder / "state",
        launch=launch or LaunchConfig(threads=1),
    )
    for path in (job.files, job.logs, job.state):
        path.mkdir(parents=True, exist_ok=True)
    (job.state / "job.json").write_text(job.model_dump_json(), "utf-8")
    return job


def function_file(path: Path, score: str) -> Path:
    """A user's file whose function `score(answer)` gives what the expression says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"def score(answer):\n    return {score}\n", "utf-8")
    return path


def without_held_pairs(world: Path, folder: Path) -> Path:
    """The world's preferences in a folder of their own, none of them held out."""
    copy = folder / "preferences"
    shutil.copytree(world / "preferences", copy)
    (copy / "held.jsonl").write_text("", "utf-8")
    return copy


def run_here(work: Any, job: JobFile) -> dict[str, Any]:
    """Do the job in this process; its figures."""
    return work(job, Ranks(), Journal(job.logs))


def start_worker(job: JobFile) -> "subprocess.Popen[bytes]":
    """Start the job as its own process, or ranks of one under torchrun."""
    command = [sys.executable, "-m"]
    if job.launch.processes > 1:
        command += [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={job.launch.processes}",
            "-m",
        ]
    with (job.logs / "output.log").open("ab") as output:
        return subprocess.Popen(
            [*command, f"model.{job.stage}", str(job.state / "job.json")],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def kill_at(job: JobFile, lines: int) -> None:
    """Start the job and kill it with SIGKILL once it has written so many lines of metrics."""
    worker = start_worker(job)
    path = job.logs / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert worker.poll() is None, (job.logs / "output.log").read_text("utf-8")[-2000:]
        time.sleep(0.005)
    worker.kill()
    worker.wait()
    assert not (job.logs / "result.json").exists(), "it ended before it was killed"


def metrics(job: JobFile) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [
        json.loads(line) for line in (job.logs / "metrics.jsonl").read_text("utf-8").splitlines()
    ]


def same_metrics(job: JobFile) -> list[dict[str, float]]:
    """The lines without what the clock decides."""
    clocks = ("time", "tokens_per_second", "data_wait_share", "peak_memory_bytes")
    return [{k: v for k, v in line.items() if k not in clocks} for line in metrics(job)]
