"""Memory of `bessemer serve` under load: `python -m benchmarks.serving_memory [--minutes N] [--clients N]`.

What the server and its model's process hold (resident) is read every few seconds while clients ask for
streamed answers. The first fifth of the time is left out of the slope: caches fill then. Ends with status 1
where the memory of one of them grew by more than 2 %.
"""

import argparse
import asyncio
import statistics
import tempfile
import threading
from pathlib import Path

import psutil

from benchmarks.serving import export_model, loaded, our_server, prompts_of
from benchmarks.work import Work, corpus_of

Sizes = tuple[float, int, int]
"""Minutes since the beginning, bytes of the server and of its model's process."""

EVERY_SECONDS = 5.0
SETTLED = 0.2
MOST_GROWTH = 0.02


def main() -> None:
    """Measure, and say whether memory stayed flat."""
    parser = argparse.ArgumentParser(prog="benchmarks.serving_memory", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0, help="of the server; 0 for all cores")
    parser.add_argument("--data", type=Path, help="folder of data; without it the demo's world")
    parser.add_argument("--megabytes", type=float, default=4.0, help="text of the tokenizer")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as folder:
        corpus, megabytes = corpus_of(Path(folder), given.data, given.megabytes)
        work = Work(Path(folder), given.data, corpus, megabytes)
        options = ["--threads", str(given.threads)] if given.threads else []
        with our_server(export_model(work), *options) as (url, name, process):
            sizes: list[Sizes] = []
            done = threading.Event()
            watcher = threading.Thread(target=_watch, args=(process, sizes, done))
            watcher.start()
            load = asyncio.run(
                loaded(url, name, given.clients, prompts_of(work), given.minutes * 60)
            )
            done.set()
            watcher.join()
    raise SystemExit(_told(sizes, given.clients, load.tokens_per_second))


def _watch(process: int, sizes: list[Sizes], done: threading.Event) -> None:
    server, passed = psutil.Process(process), 0.0
    [model] = server.children(recursive=True)
    while True:
        sizes.append((passed / 60, server.memory_info().rss, model.memory_info().rss))
        if done.wait(EVERY_SECONDS):
            return
        passed += EVERY_SECONDS


def _told(sizes: list[Sizes], clients: int, rate: float) -> int:
    print(f"{clients} clients, {sizes[-1][0]:.1f} minutes, {rate:.0f} tokens/s")
    minutes, server, model = zip(*sizes, strict=True)
    grown = [_grown("server", minutes, server), _grown("model", minutes, model)]
    return int(max(grown) > MOST_GROWTH)


def _grown(name: str, minutes: tuple[float, ...], held: tuple[int, ...]) -> float:
    """The share by which it grew once settled."""
    first = int(len(held) * SETTLED)
    slope = statistics.linear_regression(minutes[first:], held[first:]).slope
    grown = slope * (minutes[-1] - minutes[first]) / held[first]
    fifths = [held[int(place * (len(held) - 1) / 5)] for place in range(6)]
    told = ", ".join(f"{size / 2**20:.0f}" for size in fifths)
    print(
        f"{name}: {told} MiB at the start and after each fifth; {slope / 2**20:+.2f} MiB a minute after "
        f"the first ({grown:+.1%})"
    )
    return grown


if __name__ == "__main__":
    main()
