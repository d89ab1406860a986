"""An iteration of PPO, answers and updates, against the PPO of TRL 1.12 (its last release with one).

16 prompts, two passes over their answers in minibatches of 8, four models with the same shape and weights.
At equal lengths prompt and answer have 128 tokens each; at unequal ones they are those of
`benchmarks.generation`. One thread, each in a process of its own; rates are answers per second of the
processor, after a first iteration that does not count. (Not tokens: TRL makes 128 of each answer and cuts
them, so that its rate in tokens would be what length its few answers happen to have.)
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file

from benchmarks.generation import END, PAD, VOCABULARY, course_of, model_of
from benchmarks.work import Row, Work, environment, run_own, run_peer
from conf.contract import JobFile
from conf.launch import LaunchConfig
from conf.ppo import PpoConfig
from conf.shape import ShapeConfig
from model.huggingface import from_hf, to_hf
from model.journal import Journal
from model.ppo import Trainer
from model.ranks import Ranks
from model.rollouts import Models, Prompt
from model.transformer import Transformer
from model.worker import keep_freed_memory
from storage.checkpoint import RewardScale
from storage.conversations import Conversation
from storage.tokenizer import ChatTokenizer

PACKAGES = (
    "torch==2.13.0", "transformers==5.23.0", "trl==1.12.0", "accelerate", "datasets", "numpy",
)  # fmt: skip
ITERATIONS, ROWS = 2, 16
SETTINGS: dict[str, Any] = {
    "iterations": ITERATIONS,
    "rollout_rows": ROWS,
    "minibatch_rows": 8,
    "epochs": 2,
    "learning_rate": 1e-6,
    "value_learning_rate": 1e-6,
}


def measure(work: Work) -> list[Row]:
    """A row for equal and one for unequal lengths."""
    python = environment("ppo_step", PACKAGES)
    rows: list[Row] = []
    for kind in ("equal", "unequal"):
        told = {**course_of(kind), **SETTINGS, "folder": str(work.folder / "trl")}
        course, weights = work.folder / "course.json", work.folder / "weights.safetensors"
        course.write_text(json.dumps(told), "utf-8")
        save_file(to_hf(model_of(kind).state_dict()), weights)
        asked = [str(course), str(weights)]
        ours, theirs = (
            (ITERATIONS - 1) * ROWS / found["processor"]
            for found in (
                run_own("ppo_step", work.folder, asked),
                run_peer(python, "ppo_step", work.folder, asked),
            )
        )
        goal = 2.0 if kind == "unequal" else 1.25
        rows.append(
            Row(f"PPO step, {kind} lengths", "TRL 1.12", ours, theirs, "answers/s", goal, 1.25)
        )
    return rows


def main() -> None:
    """Measure ours: `python -m benchmarks.ppo_step COURSE.json WEIGHTS ANSWER.json`."""
    course, weights, answer = sys.argv[1:]
    told = json.loads(Path(course).read_text("utf-8"))
    torch.set_num_threads(1)
    keep_freed_memory()
    settings = PpoConfig(
        **{name: told[name] for name in SETTINGS}, max_new_tokens=told["new_tokens"]
    )
    trainer = _trainer(told, weights, settings, Path(answer).parent / "ours")
    trainer.iterate(0)
    started = time.process_time()
    for iteration in range(1, ITERATIONS):
        trainer.iterate(iteration)
    found = {"processor": time.process_time() - started}
    Path(answer).write_text(json.dumps(found), "utf-8")


def _trainer(told: dict[str, Any], weights: str, settings: PpoConfig, folder: Path) -> Trainer:
    shape = ShapeConfig(**told["shape"])
    policy, reference = (Transformer(shape, VOCABULARY) for _ in range(2))
    for model in (policy, reference):
        model.load_state_dict(from_hf(load_file(weights)))
    models = Models(
        policy=policy,
        reference=reference.requires_grad_(False),
        value=Transformer(shape, VOCABULARY, is_scalar=True, seed=2),
        reward=Transformer(shape, VOCABULARY, is_scalar=True, seed=3).requires_grad_(False),
        scale=RewardScale(mean=0.0, std=1.0),
    )
    job = JobFile(
        stage="ppo",
        node="ppo",
        settings=settings.model_dump(mode="json"),
        inputs={},
        sources={},
        files=folder / "files",
        logs=folder / "logs",
        state=folder / "state",
        launch=LaunchConfig(threads=1),
    )
    row: Conversation = {"id": "", "messages": [], "domain": "", "source": "", "language": ""}
    prompts = [Prompt(ids, row) for ids in told["prompts"]]
    # No text is read or written: the two tokens that generation asks for are all of a tokenizer.
    tokenizer = cast("ChatTokenizer", SimpleNamespace(im_end=END, pad=PAD))
    return Trainer(models, prompts, tokenizer, settings, job, Ranks(), Journal(job.logs))


if __name__ == "__main__":
    main()
