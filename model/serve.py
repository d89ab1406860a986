"""Answers of one model for a server, as tokens. Worker: `python -m model.serve SERVING`.

Reads lines of Asked from its standard input and writes lines of Told to its standard output, after
one line of Ready; it ends when its input does.
"""

import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from conf.serving import Ask, Asked, Ready, Serving
from model.huggingface import read_hf
from model.slots import Slots
from model.transformer import Transformer
from model.weights import load_model
from storage.checkpoint import TOKENIZER


def main() -> None:
    """Entry of the worker."""
    serving = Serving.model_validate_json(sys.argv[1])
    out = _own_output()
    torch.set_num_threads(serving.threads)
    model = open_model(Path(serving.folder))
    model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False).eval()
    if serving.precision == "bf16":
        for weight in model.parameters():  # not the buffers: positions need their digits
            weight.data = weight.data.bfloat16()
    parameters = sum(weight.numel() for weight in model.parameters())
    slots = Slots(model, rows=serving.rows, tokens=max(serving.cache_tokens, model.shape.context))
    # What torch does but once must not be the first reader's to wait for.
    slots.add(Ask(key=-1, prompt=(0,), max_new_tokens=2, stops=frozenset(), temperature=1.0))
    while not slots.is_idle:
        slots.step()
    _write(out, Ready(context=model.shape.context, parameters=parameters).model_dump_json())
    for told in answer(slots, _lines(sys.stdin.buffer)):
        _write(out, told)
    os._exit(0)  # nothing is left to do, and Python's own end takes torch most of a second


def open_model(folder: Path) -> Transformer:
    """The model of a policy's `files`, or of a Hugging Face folder."""
    if (folder / TOKENIZER).is_dir():
        return load_model(folder, is_scalar=False)
    return read_hf(folder)


def answer(slots: Slots, lines: "queue.SimpleQueue[bytes | None]") -> Iterator[str]:
    """What is told after each step, until the lines end."""
    while True:
        while slots.is_idle or not lines.empty():
            line = lines.get()
            if line is None:
                return
            asked = Asked.model_validate_json(line)
            if asked.ask is not None:
                slots.add(asked.ask)
            if asked.drop is not None:
                slots.drop(asked.drop)
        if told := slots.step():
            yield json.dumps(told)


def _lines(stream: BinaryIO) -> "queue.SimpleQueue[bytes | None]":
    """The lines as they come; none when there will be no more."""
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _own_output() -> BinaryIO:
    """The standard output for us alone: what a library prints goes to standard error."""
    own = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return own


def _write(out: BinaryIO, line: str) -> None:
    out.write(line.encode("utf-8") + b"\n")
    out.flush()


if __name__ == "__main__":
    main()
