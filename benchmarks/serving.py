"""Tokens per second and time to the first token of `bessemer serve`, beside `transformers serve`.

Both serve the same weights (shape 20m, random, exported for Hugging Face) over loopback to 1, 8 and 32
clients that ask again as soon as they are answered. The special tokens are never likely, so that every
answer has as many tokens as it may have. The peer has an environment of its own under `.bench/`. Both
run with as many threads as there are cores, and one after the other, so that neither takes from the
other. `SECONDS_PER_LOAD=60` measures each load for so long; 10 by default.
"""

import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import yaml

from benchmarks.work import Row, Work, environment, run_stage, texts_of
from conf.shape import ShapeConfig
from conf.tokenizer import TokenizerConfig
from model.convert import write_hf
from model.transformer import Transformer
from storage.tokenizer import SPECIAL_TOKENS, Tokenizer
from tasks.command import free_port
from tasks.tokenizer import tokenizer

CLIENTS = (1, 8, 32)
VOCABULARY = 8_000
ANSWER_TOKENS = 64
PROMPT_CHARS = 120
START_SECONDS = 180.0
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Load:
    """What some clients got."""

    tokens_per_second: float
    first_token_seconds: float
    """Median."""


def measure(work: Work) -> list[Row]:
    """Rates under each load; for the first token, how many of them fit into a second."""
    export = export_model(work)
    prompts = prompts_of(work)
    seconds = float(os.environ.get("SECONDS_PER_LOAD", "10"))
    ours, theirs = (
        {clients: asyncio.run(loaded(url, name, clients, prompts, seconds)) for clients in CLIENTS}
        for url, name in _each(export)
    )
    rows: list[Row] = []
    for clients in CLIENTS:
        a, b = ours[clients], theirs[clients]
        named = f"serving, {clients} clients"
        rates = (a.tokens_per_second, b.tokens_per_second)
        rows.append(Row(named, "transformers serve", *rates, "tokens/s", 1.2, 0.9))
        rates = (1 / a.first_token_seconds, 1 / b.first_token_seconds)
        rows.append(Row(f"{named}: first tokens", "transformers serve", *rates, "1/s", 1.2, 0.9))
    return rows


def export_model(work: Work) -> Path:
    """The model that is served, as a Hugging Face folder."""
    settings = TokenizerConfig(vocabulary=VOCABULARY)
    made = run_stage(tokenizer, settings, {"corpus": work.corpus}, work.folder)
    assert isinstance(made, Tokenizer)
    shape = ShapeConfig.model_validate(yaml.safe_load((ROOT / "conf/shape/20m.yaml").read_text()))
    model = Transformer(shape, made.meta.vocabulary, seed=1)
    with torch.no_grad():
        model.embedding.weight[: len(SPECIAL_TOKENS)] = 0.0
    write_hf(work.folder / "served", model, made.files)
    return work.folder / "served"


def prompts_of(work: Work) -> list[str]:
    """What the clients say."""
    return [text[:PROMPT_CHARS] for text in texts_of(work.corpus)[:200]]


@contextmanager
def our_server(export: Path, *options: str) -> Generator[tuple[str, str, int]]:
    """Address of `bessemer serve`, what it calls the model, and its process, while it runs."""
    port = free_port()
    entry = "from flows.cli import main; main()"
    ours = [sys.executable, "-c", entry, "serve", f"m={export}", "--port", str(port)]
    with _server([*ours, *options], port, export.parent) as process:
        yield f"http://127.0.0.1:{port}", "m", process


def _each(export: Path) -> Iterator[tuple[str, str]]:
    """Address of each server, and what it calls the model, while it runs."""
    with our_server(export) as (url, name, _):
        yield url, name
    port = free_port()
    packages = [f"{name}=={metadata.version(name)}" for name in ("torch", "fastapi")]
    python = environment(
        "serving", [*packages, f"transformers[serving]=={metadata.version('transformers')}"]
    )
    theirs = [
        str(python.with_name("transformers")), "serve", str(export),
        "--continuous-batching", "--port", str(port), "--host", "127.0.0.1",
    ]  # fmt: skip
    with _server(theirs, port, export.parent):
        yield f"http://127.0.0.1:{port}", str(export)


@contextmanager
def _server(command: list[str], port: int, folder: Path) -> Generator[int]:
    """Runs until the block ends, which begins when something answers on the port; its process."""
    quiet = {"HF_HUB_OFFLINE": "1", "BESSEMER_HOME": str(folder / "home")}
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **quiet}, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not serve:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


async def loaded(url: str, name: str, clients: int, prompts: list[str], seconds: float) -> Load:
    """What clients get that ask for so long, after one answer each that does not count."""
    arrivals: list[float] = []
    firsts: list[float] = []

    async def answered(turn: int) -> None:
        asked = time.monotonic()
        times = [at async for at in _asked(url, name, prompts[turn % len(prompts)])]
        if times:
            firsts.append(times[0] - asked)
        else:  # its bytes made no character
            times = [time.monotonic()]
        # Text comes in pieces of one or more tokens: the tokens are spread over their times.
        arrivals.extend(
            times[place * len(times) // ANSWER_TOKENS] for place in range(ANSWER_TOKENS)
        )

    async def client(turn: int, end: float) -> None:
        while time.monotonic() < end:
            turn += clients
            await answered(turn)

    await asyncio.gather(*(answered(number) for number in range(clients)))
    arrivals.clear()
    firsts.clear()
    end = time.monotonic() + seconds
    await asyncio.gather(*(client(number, end) for number in range(clients)))
    return Load(sum(at < end for at in arrivals) / seconds, statistics.median(firsts))


async def _asked(url: str, name: str, prompt: str) -> AsyncIterator[float]:
    """The times at which text of one streamed answer came. Raises RuntimeError for an error."""
    host, port = re.findall(r"//(.*):(\d+)", url)[0]
    body = {
        "model": name, "messages": [{"role": "user", "content": prompt}], "stream": True,
        "max_tokens": ANSWER_TOKENS, "temperature": 0.7, "seed": 1,
    }  # fmt: skip
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    )
    writer.write(
        f"{head}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
    )
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{url} says {status!r} {await reader.read(2000)!r}")
    async for line in reader:
        if line.startswith(b"data: {") and re.search(rb'"content": ?"[^"]', line):
            yield time.monotonic()
    writer.close()
