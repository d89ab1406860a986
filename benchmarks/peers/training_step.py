"""Training steps of another program: `python training_step.py PROGRAM COURSE.json ANSWER.json`.

Runs in an environment with torch, transformers and litgpt, which are imported by name, and nanoGPT's
folder, which the course names. `timed` is what both sides are measured by.
"""

import contextlib
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP, STEPS = 3, 5
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def main() -> None:
    """Measure, and write the seconds of a step."""
    program, course, answer = sys.argv[1:]
    settings = json.loads(Path(course).read_text("utf-8"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if program == "nanogpt":
        sys.path.insert(0, settings["nanogpt"])
    build = {
        "transformers": transformers_llama, "litgpt": litgpt_model, "nanogpt": nanogpt_model,
    }[program]  # fmt: skip
    model, loss = build(settings["shape"], settings["vocabulary"])
    if settings["is_compiled"]:
        model.compile()
    found = timed(_step(model, loss, is_bf16=settings["is_compiled"]), settings)
    Path(answer).write_text(json.dumps(found), "utf-8")


def timed(step: Callable[[Tensor, Tensor], None], settings: dict[str, Any]) -> dict[str, float]:
    """Median seconds of a step, of the processor and by the clock; ids and labels (B, T) are given."""
    shape = (settings["rows"], settings["shape"]["context"] + 1)
    ids = torch.randint(settings["vocabulary"], shape, generator=torch.Generator().manual_seed(0))
    processor: list[float] = []
    clock: list[float] = []
    for number in range(WARM_UP + STEPS):
        started = time.process_time(), time.perf_counter()
        step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        if number >= WARM_UP:
            processor.append(time.process_time() - started[0])
            clock.append(time.perf_counter() - started[1])
    return {"processor": statistics.median(processor), "clock": statistics.median(clock)}


def transformers_llama(shape: dict[str, Any], vocabulary: int) -> tuple[nn.Module, Loss]:
    """Its Llama with its own loss; labels are given as they stand, beside their ids."""
    transformers = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape["dim"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=shape["context"],
        tie_word_embeddings=False,
        use_cache=False,
    )

    def loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=ids, labels=labels, shift_labels=labels).loss

    return transformers.LlamaForCausalLM(config), loss


def litgpt_config(shape: dict[str, Any], vocabulary: int) -> Any:
    """Its settings of a Llama of the shape."""
    return importlib.import_module("litgpt").Config(
        block_size=shape["context"],
        n_layer=shape["layers"],
        n_embd=shape["dim"],
        n_head=shape["heads"],
        n_query_groups=shape["kv_heads"],
        intermediate_size=shape["ffn"],
        padded_vocab_size=vocabulary,
        vocab_size=vocabulary,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )


def litgpt_model(shape: dict[str, Any], vocabulary: int) -> tuple[nn.Module, Loss]:
    """Its GPT as a Llama, with the loss of its pretraining."""
    litgpt = importlib.import_module("litgpt")
    utils = importlib.import_module("litgpt.utils")

    def loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        return utils.chunked_cross_entropy(model(ids), labels)

    return litgpt.GPT(litgpt_config(shape, vocabulary)), loss


def nanogpt_model(shape: dict[str, Any], vocabulary: int) -> tuple[nn.Module, Loss]:
    """Its GPT-2 without biases, with the loss that its forward gives; the feed-forward is 4 times as wide."""
    program = importlib.import_module("model")  # of a clone whose folder is on the path

    def loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        return model(ids, labels)[1]

    config = program.GPTConfig(
        block_size=shape["context"],
        vocab_size=vocabulary,
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_embd=shape["dim"],
        bias=False,
    )
    return program.GPT(config), loss


def _step(model: nn.Module, loss: Loss, *, is_bf16: bool) -> Callable[[Tensor, Tensor], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step(ids: Tensor, labels: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16) if is_bf16 else contextlib.nullcontext():
            nats = loss(model, ids, labels)
        nats.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
