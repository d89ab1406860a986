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


def datatrove(path: Path, folder: Path) -> list[bool]:
    """The four steps of its pipeline, two workers where a step has tasks for two."""
    dedup: Any = importlib.import_module("datatrove.pipeline.dedup")
    minhash: Any = importlib.import_module("datatrove.pipeline.dedup.minhash")
    readers: Any = importlib.import_module("datatrove.pipeline.readers")
    writers: Any = importlib.import_module("datatrove.pipeline.writers")
    words: Any = importlib.import_module("datatrove.utils.word_tokenizers")
    executor: Any = importlib.import_module("datatrove.executor").LocalPipelineExecutor

    # A regular expression in place of spaCy, which would be five times slower.
    methods = {
        "word_tokenize": lambda _, text: TOKEN.findall(text),
        "sent_tokenize": lambda _, text: [text],
        "span_tokenize": lambda _, text: [(0, len(text))],
    }
    fast = type("Fast", (words.WordTokenizer,), methods)()
    config = minhash.MinhashConfig(
        n_grams=SHINGLE, num_buckets=BANDS, hashes_per_bucket=ROWS, seed=1
    )
    source = folder / "in"
    source.mkdir()
    lines = path.read_text("utf-8").splitlines()
    half = (len(lines) + 1) // 2
    for task, part in enumerate((lines[:half], lines[half:])):
        rows = [{"text": json.loads(line), "id": f"{task}/{n}"} for n, line in enumerate(part)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (source / f"{task}.jsonl").write_text(text, "utf-8")
    read = readers.JsonlReader(str(source))

    def run(steps: list[Any], name: str, tasks: int) -> None:
        logs = str(folder / "logs" / name)
        executor(pipeline=steps, tasks=tasks, workers=min(tasks, PROCESSES), logging_dir=logs).run()

    names = {name: str(folder / name) for name in ("signatures", "buckets", "removed", "out")}
    sign = dedup.MinhashDedupSignature(names["signatures"], config=config, language=fast)
    run([read, sign], "sign", 2)
    find = dedup.MinhashDedupBuckets(names["signatures"], names["buckets"], config=config)
    run([find], "find", BANDS)
    run([dedup.MinhashDedupCluster(names["buckets"], names["removed"], config=config)], "join", 1)
    write = writers.JsonlWriter(names["out"], compression=None)
    run([read, dedup.MinhashDedupFilter(names["removed"]), write], "filter", 2)
    kept: set[str] = set()
    for file in Path(names["out"]).glob("*.jsonl"):
        kept |= {json.loads(line)["id"] for line in file.read_text("utf-8").splitlines()}
    return [
        f"{task}/{n}" in kept for task in (0, 1) for n in range((half, len(lines) - half)[task])
    ]


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
            case "datatrove":
                keeps = datatrove(path, Path(folder))
            case "text-dedup":
                keeps = text_dedup(path, Path(folder))
            case _:
                raise SystemExit(f"no peer {peer}")
        seconds = time.perf_counter() - started
    answer.write_text(json.dumps({"seconds": seconds, "keeps": keeps}))


if __name__ == "__main__":
    main()
