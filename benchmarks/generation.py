"""Answers of 32 rows at a time, sampled, against transformers' `generate` with the same weights.

At equal lengths every prompt and every answer has as many tokens; at unequal ones prompts have 8 to 128 and
an answer ends with a chance of about 1 in 50 at every token, so that both sides get lengths of one
distribution. One thread, each in a process of its own, by turns; rates are tokens of answers per second of
the processor.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.work import Row, Work, environment, run_own, run_peer
from conf.shape import ShapeConfig
from model.generate import generate
from model.huggingface import from_hf, to_hf
from model.transformer import Transformer
from model.worker import keep_freed_memory

PACKAGES = ("torch==2.13.0", "transformers==5.23.0", "numpy", "safetensors")
VOCABULARY, PAD, END = 8192, 0, 3
SHAPE = ShapeConfig(dim=256, layers=6, heads=4, kv_heads=2, ffn=688, context=512, is_tied=False)
AT_ONCE, PROMPTS, NEW_TOKENS = 32, 96, 128
END_LOGIT = 5.1
"""Over all others: a chance of about 1 in 50 among 8192 tokens."""
TURNS = 3
"""Of either side; the rate is that of all of them together."""


def measure(work: Work) -> list[Row]:
    """A row for equal and one for unequal lengths."""
    python = environment("generation", PACKAGES)
    rows: list[Row] = []
    for kind in ("equal", "unequal"):
        course, weights = work.folder / "course.json", work.folder / "weights.safetensors"
        course.write_text(json.dumps(course_of(kind)), "utf-8")
        save_file(to_hf(model_of(kind).state_dict()), weights)
        found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        for turn in range(TURNS):
            asked = [str(course), str(weights), str(turn)]
            found["ours"].append(run_own("generation", work.folder, asked))
            found["theirs"].append(run_peer(python, "generation", work.folder, asked))
        ours, theirs = (
            sum(turn["tokens"] for turn in turns) / sum(turn["processor"] for turn in turns)
            for turns in found.values()
        )
        rows.append(
            Row(f"generation, {kind} lengths", "transformers", ours, theirs, "tok/s", 2.0, 1.1)
        )
    return rows


def course_of(kind: str) -> dict[str, Any]:
    """Prompts, and what else both sides are told."""
    generator = torch.Generator().manual_seed(1)
    lengths = [128] * PROMPTS
    if kind == "unequal":
        lengths = torch.randint(8, 129, (PROMPTS,), generator=generator).tolist()
    return {
        "shape": SHAPE.model_dump(mode="json"),
        "ffn": SHAPE.ffn_width,
        "vocabulary": VOCABULARY,
        "pad": PAD,
        "end": END,
        "at_once": AT_ONCE,
        "new_tokens": NEW_TOKENS,
        "prompts": [
            torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()
            for length in lengths
        ],
    }


@torch.no_grad()
def model_of(kind: str) -> Transformer:
    """Random weights; at unequal lengths the end is about as likely after any tokens."""
    model = Transformer(SHAPE, VOCABULARY, seed=1)
    assert model.head is not None
    model.embedding.weight[:, 0] = 0.3
    states = model.hidden(torch.arange(4, 132)[None])
    model.head.weight[:, 0] = 0.0
    model.head.weight[END] = 0.0
    logit = END_LOGIT if kind == "unequal" else -30.0
    model.head.weight[END, 0] = logit / float(states[0, :, 0].mean())
    return model


def main() -> None:
    """Measure ours: `python -m benchmarks.generation COURSE.json WEIGHTS TURN ANSWER.json`."""
    course, weights, turn, answer = sys.argv[1:]
    told = json.loads(Path(course).read_text("utf-8"))
    torch.set_num_threads(1)
    keep_freed_memory()
    model = Transformer(ShapeConfig(**told["shape"]), told["vocabulary"])
    model.load_state_dict(from_hf(load_file(weights)))
    started = time.process_time()
    found = generate(
        model,
        told["prompts"],
        at_once=told["at_once"],
        max_new_tokens=told["new_tokens"],
        temperature=1.0,
        seed=int(turn),
        eos=told["end"],
        pad=told["pad"],
    )
    seconds = time.process_time() - started
    tokens = int(found.lengths.sum())
    Path(answer).write_text(json.dumps({"tokens": tokens, "processor": seconds}), "utf-8")


if __name__ == "__main__":
    main()
