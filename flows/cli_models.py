"""The commands that talk to models: `bessemer serve` and `bessemer chat`."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from conf.serving import Serving
from flows.runs import Home, open_home
from flows.show import console

if TYPE_CHECKING:
    from flows.served import Served

PAIRS_FILE = Path("preferences") / "rated.jsonl"

Checkpoints = Annotated[
    list[str] | None,
    typer.Argument(
        help="Policies or exports: node of the newest run, RUN:NODE, fingerprint, or folder, also of "
        "a Hugging Face model; NAME=ARTIFACT names it. The newest run's best by default."
    ),
]
Pairs = Annotated[
    Path | None,
    typer.Option(help="File of rated pairs. By default preferences/rated.jsonl of the home."),
]
Precision = Annotated[
    Literal["fp32", "bf16"],
    typer.Option(
        help="bf16 rounds; on a CPU that has it, 8 answers at once are 1.5 times as fast."
    ),
]
Threads = Annotated[int, typer.Option(help="Threads of each model on the CPU; 0 shares the cores.")]
CacheTokens = Annotated[
    int, typer.Option(help="Most tokens held for attention, per model: answers x the longest.")
]


def serve(
    checkpoints: Checkpoints = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for a free one.")] = 8000,
    token_env: Annotated[
        str | None,
        typer.Option(help="Environment variable with the token that requests must show."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Answers computed at a time, per model.")] = 32,
    cache_tokens: CacheTokens = 65_536,
    waiting: Annotated[
        int, typer.Option(min=0, help="Answers that may wait, per model; more get status 429.")
    ] = 256,
    request_seconds: Annotated[
        float, typer.Option(min=1, help="Longest that one request is answered.")
    ] = 600.0,
    precision: Precision = "fp32",
    threads: Threads = 0,
    preferences: Pairs = None,
) -> None:
    """Serve checkpoints: OpenAI's API at /v1, and a page to chat and compare at /."""
    from flows.serve import Limits, read_token
    from flows.serve import serve as serve_all
    from flows.served import find_served

    home = open_home()
    limits = Limits(
        host=host,
        port=port,
        token=read_token(token_env, host),
        waiting=waiting,
        request_seconds=request_seconds,
    )
    served = find_served(checkpoints or [], home)

    def say(url: str) -> None:
        names = ", ".join(item.name for item in served)
        console().print(f"{names}: {url}/v1, page {url}/", highlight=False, soft_wrap=True)

    how = _serving(len(served), precision, threads, rows=rows, cache_tokens=cache_tokens)
    asyncio.run(serve_all(served, how, limits, _pairs(preferences, home), say))


def chat(
    checkpoints: Checkpoints = None,
    precision: Precision = "fp32",
    threads: Threads = 0,
    preferences: Pairs = None,
) -> None:
    """Talk to a checkpoint in the terminal; to several, and each answers."""
    from flows.chat import chat as talk
    from flows.served import find_served

    home = open_home()
    served = find_served(checkpoints or [], home)
    how = _serving(len(served), precision, threads, rows=1, cache_tokens=1)
    talk(served, how, _pairs(preferences, home))


def _serving(
    models: int, precision: Literal["fp32", "bf16"], threads: int, *, rows: int, cache_tokens: int
) -> "Callable[[Served], Serving]":
    """How each of so many models is computed."""
    own = threads or max(1, len(os.sched_getaffinity(0)) // models)

    def serving(served: "Served") -> Serving:
        return Serving(
            folder=str(served.folder),
            rows=rows,
            cache_tokens=cache_tokens,
            precision=precision,
            threads=own,
        )

    return serving


def _pairs(named: Path | None, home: Home) -> Path:
    return named or home.path / PAIRS_FILE
