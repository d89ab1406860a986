"""Pretraining by litgpt's recipe, or the rest of it: `python pretraining_quality.py FOLDER`.

FOLDER has `course.json` and `rows.npz` (`ids` and `labels`, (rows, T) each, in the order in which they are
trained on). Model, initialisation, learning rates, loss and optimizer are litgpt's own functions, called as
its `pretrain.py` calls them; precision is its `bf16-mixed` or `32-true`. State is saved every few minutes and
on SIGTERM; a call goes on from it. At the end `weights.safetensors`, `probe.npy` (logits of the first row) and
`answer.json` are there.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

STOPPED = 75
"""Exit code of a call that saved its state and ended early."""


def main() -> None:
    """Train what is left of the course."""
    folder = Path(sys.argv[1])
    course = json.loads((folder / "course.json").read_text("utf-8"))
    torch.set_num_threads(course["threads"])
    run = _Run(folder, course)
    signal.signal(signal.SIGTERM, run.stop)
    while run.state["step"] < run.steps and not run.is_stopping:
        run.advance()
    run.save()
    if run.is_stopping:
        sys.exit(STOPPED)
    run.finish()


class _Run:
    def __init__(self, folder: Path, course: dict[str, Any]) -> None:
        self.folder, self.course = folder, course
        rows = np.load(folder / "rows.npz")
        self.ids, self.labels = torch.from_numpy(rows["ids"]), torch.from_numpy(rows["labels"])
        self.steps = len(self.ids) // course["rows"]
        self.recipe, self.parts = (
            importlib.import_module("litgpt.pretrain"),
            importlib.import_module("litgpt.utils"),
        )
        self.model = self._model()
        options = {"lr": course["learning_rate"], "betas": tuple(course["betas"])}
        self.optimizer = self.parts.instantiate_torch_optimizer(
            {
                "class_path": "torch.optim.AdamW",
                "init_args": options | {"weight_decay": course["weight_decay"]},
            },
            self.model.parameters(),
            fused=False,
        )
        self.state: dict[str, Any] = {"step": 0, "losses": [], "seconds": 0.0, "cpu_seconds": 0.0}
        self.is_stopping = False
        self._load()
        self._saved = self._noted = time.perf_counter()
        self._cpu = time.process_time()

    def _model(self) -> nn.Module:
        """litgpt's GPT of the shape, as its `pretrain.main` makes it."""
        litgpt, fabric = importlib.import_module("litgpt"), importlib.import_module("lightning")
        beside = importlib.import_module("training_step")  # this file's neighbour
        config = beside.litgpt_config(self.course["shape"], self.course["vocabulary"])
        torch.manual_seed(self.course["seed"])
        model = litgpt.GPT(config)
        plain = fabric.Fabric(devices=1, accelerator="cpu")
        self.recipe.initialize_weights(plain, model, n_layer=config.n_layer, n_embd=config.n_embd)
        if self.course["shape"]["is_tied"]:
            model.transformer.wte.weight = model.lm_head.weight
        return model

    def advance(self) -> None:
        """One update."""
        course, step = self.course, self.state["step"]
        rows, micro = course["rows"], course["micro_rows"]
        pieces = range(step * rows, (step + 1) * rows, micro)
        loss = 0.0
        for place, first in enumerate(pieces, start=step * len(pieces)):
            rate = self.recipe.get_lr(
                course["learning_rate"],
                place,
                int(course["warmup"] * self.steps) * len(pieces),
                self.steps * len(pieces),
                course["least_rate"],
            )
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            nats = self._loss(self.ids[first : first + micro], self.labels[first : first + micro])
            (nats / len(pieces)).backward()
            loss += nats.item() / len(pieces)
        nn.utils.clip_grad_norm_(self.model.parameters(), course["clip"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state["step"] += 1
        self.state["losses"].append(loss)
        if time.perf_counter() - self._saved >= course["save_seconds"]:
            self.save()

    def _loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        is_half = self.course["precision"] == "bf16"
        with torch.autocast("cpu", torch.bfloat16) if is_half else contextlib.nullcontext():
            logits = self.model(ids.long())
            return self.parts.chunked_cross_entropy(logits, labels.long())

    def save(self) -> None:
        """Replace the state, with the time that went by."""
        now, cpu = time.perf_counter(), time.process_time()
        self.state["seconds"] += now - self._noted
        self.state["cpu_seconds"] += cpu - self._cpu
        self.state["peak_bytes"] = max(self.state.get("peak_bytes", 0), peak_bytes(os.getpid()))
        self._noted, self._cpu, self._saved = now, cpu, now
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        draft = self.folder / "state.draft"
        torch.save({**parts, "state": self.state}, draft)
        draft.replace(self.folder / "state.pt")
        print(f"step {self.state['step']} of {self.steps}, loss {self.state['losses'][-1:]}")

    def _load(self) -> None:
        path = self.folder / "state.pt"
        if path.exists():
            saved = torch.load(path, weights_only=True)  # noqa: TID251 (ours is not importable here)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.state = saved["state"]

    def stop(self, *_: object) -> None:
        """End after the step."""
        self.is_stopping = True

    def finish(self) -> None:
        """Write what the other side scores."""
        with torch.no_grad():
            np.save(self.folder / "probe.npy", self.model(self.ids[:1].long())[0].numpy())
        weights = {name: w.contiguous() for name, w in self.model.state_dict().items()}
        if self.course["shape"]["is_tied"]:
            del weights["transformer.wte.weight"]
        files = importlib.import_module("safetensors.torch")
        files.save_file(weights, self.folder / "weights.safetensors")
        draft = self.folder / "answer.draft"
        draft.write_text(json.dumps(self.state), "utf-8")
        draft.replace(self.folder / "answer.json")


def peak_bytes(process: int) -> int:
    """Most memory that a process ever held, as the kernel counts it."""
    status = Path(f"/proc/{process}/status").read_text("utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


if __name__ == "__main__":
    main()
