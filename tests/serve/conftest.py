"""A real server with two small models of random weights, started once by the command line."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from conf.shape import ShapeConfig
from model.convert import write_hf
from model.transformer import Transformer
from model.weights import load_model, save_model
from storage.tokenizer import SPECIAL_TOKENS, ChatTokenizer
from tests.model.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ShapeConfig(dim=32, layers=2, heads=4, kv_heads=2, context=4096)
ROWS, WAITING = 4, 4


@dataclass(frozen=True)
class Running:
    """A server, and what it serves."""

    url: str
    pid: int
    preferences: Path
    files: Path
    """The policy `one`."""

    @property
    def model(self) -> Transformer:
        return load_model(self.files).requires_grad_(False)

    @property
    def tokenizer(self) -> ChatTokenizer:
        return ChatTokenizer(self.files / "tokenizer")


@pytest.fixture(scope="session")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`one`, the `files` of a policy whose answers are long, and `two`, an export for Hugging Face."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    for name, seed in (("one", 3), ("two", 4)):
        model = Transformer(SHAPE, tokenizer.vocabulary, seed=seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:  # larger weights: the choice of tokens must matter
                    parameter.mul_(12.0)
            model.embedding.weight[: len(SPECIAL_TOKENS)] = 0.0  # never likely: answers do not end
        save_model(folder / name, model, role="policy", tokenizer=folder / "tokenizer")
    write_hf(folder / "export", load_model(folder / "two"), folder / "two" / "tokenizer")
    return {"one": folder / "one", "two": folder / "export"}


@contextmanager
def serving(
    folder: Path, policies: dict[str, Path], *options: str, **extra: str
) -> Iterator[Running]:
    """A server in a process of its own until the block ends."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("BESSEMER_")}
    preferences = folder / "rated.jsonl"
    command = [
        sys.executable, "-c", "from flows.cli import main; main()", "serve",
        *(f"{name}={files}" for name, files in policies.items()), "--port", "0", "--threads", "1",
        "--preferences", str(preferences), *options,
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**kept, "BESSEMER_HOME": str(folder / "home"), "PYTHONUNBUFFERED": "1", **extra},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"page (http://\S+)/", line)
        assert found, line
        yield Running(found[1], process.pid, preferences, policies["one"])
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) is not None


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, policies: dict[str, Path]
) -> Iterator[Running]:
    """Models `one` and `two`; as many answers at a time and waiting as ROWS and WAITING say."""
    folder = tmp_path_factory.mktemp("server")
    options = ("--rows", str(ROWS), "--waiting", str(WAITING))
    with serving(folder, policies, *options) as running:
        yield running
