"""One peer's near-duplicate removal: `python near_duplicates.py PEER TEXTS.jsonl ANSWER.json`.

Writes the seconds from text in memory (or in the file, where the peer reads files) to keep bits, and the
bits. Every peer gets 120 permutations as 20 x 6 bands and shingles of 5 tokens; a token is what ours
is, except where the peer insists on its own splitting. Imports are by name: these packages are no
dependencies of ours.
"""

import importlib
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PERMUTATIONS, BANDS, ROWS, SHINGLE = 120, 20, 6, 5
TOKEN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[a-z0-9_]+")
PROCESSES = 2


def shingles(text: str) -> list[str]:
    """Runs of 5 tokens; the whole text where it has fewer."""
    tokens = TOKEN.findall(text.lower())
    return [" ".join(tokens[i : i + SHINGLE]) for i in range(max(1, len(tokens) - SHINGLE + 1))]


def loop(texts: list[str]) -> list[bool]:
    """datasketch as its documentation shows it: update per shingle, query, insert."""
    datasketch = importlib.import_module("datasketch")
    index = datasketch.MinHashLSH(params=(BANDS, ROWS), num_perm=PERMUTATIONS)
    keeps: list[bool] = []
    for number, text in enumerate(texts):
        signature = datasketch.MinHash(num_perm=PERMUTATIONS)
        for shingle in shingles(text):
            signature.update(shingle.encode())
        keeps.append(not index.query(signature))
        index.insert(str(number), signature)
    return keeps


def bulk(texts: list[str]) -> list[bool]:
    """datasketch's fastest way: all shingles of a document in one call, its 32-bit scheme."""
    datasketch = importlib.import_module("datasketch")
    index = datasketch.MinHashLSH(params=(BANDS, ROWS), num_perm=PERMUTATIONS)
    signatures = datasketch.MinHash.generator(
        ([shingle.encode() for shingle in shingles(text)] for text in texts),
        num_perm=PERMUTATIONS,
        scheme="affine32",
    )
    keeps: list[bool] = []
    for number, signature in enumerate(signatures):
        keeps.append(not index.query(signature))
        index.insert(str(number), signature)
    return keeps


def rensa(texts: list[str]) -> list[bool]:
    """rensa's matrix of signatures in one call, then its index, the first of a group kept."""
    rensa = importlib.import_module("rensa")
    signatures = rensa.RMinHash.from_token_sets([shingles(text) for text in texts], PERMUTATIONS, 1)
    index = rensa.RMinHashLSH(0.8, PERMUTATIONS, BANDS)
    keeps: list[bool] = []
    for number, signature in enumerate(signatures):
        keeps.append(not index.query(signature))
        index.insert(number, signature)
    return keeps


def text_dedup(path: Path, folder: Path) -> list[bool]:
    """Its command, told the same parameters and to hash by xxh3, its fastest."""
    datasets: Any = importlib.import_module("datasets")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    data = datasets.Dataset.from_dict({"text": rows, "id": list(range(len(rows)))})
    data.save_to_disk(str(folder / "in"))
    main: Any = importlib.import_module("text_dedup.minhash").main
    options = {
        "path": folder / "in", "output": folder / "out", "cache_dir": folder / "cache",
        "column": "text", "ngram": SHINGLE, "min_length": 0, "num_perm": PERMUTATIONS,
        "b": BANDS, "r": ROWS, "hash_func": "xxh3", "hash_bits": 32, "num_proc": PROCESSES,
        "threshold": 0.8,
    }  # fmt: skip
    arguments = [item for name, value in options.items() for item in (f"--{name}", str(value))]
    main([*arguments, "--local"], standalone_mode=False)
    kept = set(datasets.load_from_disk(str(folder / "out"))["id"])
    return [number in kept for number in range(len(rows))]


def main() -> None:
    """Run the peer that is named."""
    peer, path, answer = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    texts = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        match peer:
            case "loop":
                keeps = loop(texts)
            case "bulk":
                keeps = bulk(texts)
            case "rensa":
                keeps = rensa(texts)
            case "text-dedup":
                keeps = text_dedup(path, Path(folder))
            case _:
                raise SystemExit(f"no peer {peer}")
        seconds = time.perf_counter() - started
    answer.write_text(json.dumps({"seconds": seconds, "keeps": keeps}))


if __name__ == "__main__":
    main()
