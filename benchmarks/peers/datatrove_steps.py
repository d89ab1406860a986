"""datatrove's pipelines: `datatrove_steps.py near TEXTS.jsonl ANSWER.json`, `... chain PARQUET_FOLDER TOKENIZER ANSWER.json`.

`near` writes the seconds and the keep bits of its MinHash deduplication, `chain` the seconds from Parquet
files to token files and what is left of the text. Imports are by name: these packages are no dependencies
of ours.
"""

import importlib
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BANDS, ROWS, SHINGLE = 20, 6, 5
TOKEN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[a-z0-9_]+")
STOPS = (".", "!", "?", '"', "\u201d", "\u2019", "。", "！", "？", "…", "；")
PROCESSES = 2


class Pipelines:
    """Its steps, with two workers where a step has tasks for two; all files are under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.readers = _part("pipeline.readers")
        self.writers = _part("pipeline.writers")
        self._dedup = _part("pipeline.dedup")
        self._config = _part("pipeline.dedup.minhash").MinhashConfig(
            n_grams=SHINGLE, num_buckets=BANDS, hashes_per_bucket=ROWS, seed=1
        )

    def at(self, name: str) -> str:
        """A folder of one step."""
        return str(self.folder / name)

    def run(self, steps: list[Any], name: str, tasks: int) -> None:
        """One pipeline, to its end."""
        executor = _part("executor").LocalPipelineExecutor
        workers = min(tasks, PROCESSES)
        executor(
            pipeline=steps, tasks=tasks, workers=workers, logging_dir=self.at(f"logs/{name}")
        ).run()

    def remove_copies(self, read: Any, after: list[Any]) -> None:
        """Signatures, buckets, clusters, and then what comes after its filter."""
        dedup, config = self._dedup, self._config
        signed, matched, removed = self.at("signatures"), self.at("buckets"), self.at("removed")
        sign = dedup.MinhashDedupSignature(signed, config=config, language=fast_words())
        self.run([read, sign], "sign", PROCESSES)
        self.run([dedup.MinhashDedupBuckets(signed, matched, config=config)], "find", BANDS)
        self.run([dedup.MinhashDedupCluster(matched, removed, config=config)], "join", 1)
        self.run([read, dedup.MinhashDedupFilter(removed), *after], "filter", PROCESSES)


def _part(name: str) -> Any:
    return importlib.import_module(f"datatrove.{name}")


def fast_words() -> Any:
    """A regular expression in place of its spaCy, which would be five times slower; a Han character is a word."""

    class Fast(_part("utils.word_tokenizers").WordTokenizer):
        """What its filters ask of a tokenizer."""

        def word_tokenize(self, text: str) -> list[str]:
            return TOKEN.findall(text.lower())

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    return Fast()


def near(path: Path, folder: Path) -> list[bool]:
    """The four steps of its MinHash deduplication; which texts stay."""
    pipelines = Pipelines(folder)
    source = folder / "in"
    source.mkdir()
    lines = path.read_text("utf-8").splitlines()
    half = (len(lines) + 1) // 2
    for task, part in enumerate((lines[:half], lines[half:])):
        rows = [{"text": json.loads(line), "id": f"{task}/{n}"} for n, line in enumerate(part)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (source / f"{task}.jsonl").write_text(text, "utf-8")
    write = pipelines.writers.JsonlWriter(pipelines.at("out"), compression=None)
    pipelines.remove_copies(pipelines.readers.JsonlReader(str(source)), [write])
    kept: set[str] = set()
    for file in (folder / "out").glob("*.jsonl"):
        kept |= {json.loads(line)["id"] for line in file.read_text("utf-8").splitlines()}
    return [
        f"{task}/{n}" in kept for task in (0, 1) for n in range((half, len(lines) - half)[task])
    ]


def chain(parquet: str, tokenizer: str, folder: Path) -> None:
    """Its rules of Gopher, C4 and FineWeb, then MinHash deduplication, then its tokenizer, without shuffling.

    Rules that only hold for English are off: its stop words, the length of words, sentences and words of a
    line (C4).
    """
    rules, words = _part("pipeline.filters"), fast_words()
    pipelines = Pipelines(folder)
    write = pipelines.writers.JsonlWriter(pipelines.at("good"), compression=None)
    good = [
        rules.GopherRepetitionFilter(language=words),
        rules.GopherQualityFilter(language=words, min_stop_words=None, min_avg_word_length=None),
        rules.C4QualityFilter(
            language=words,
            filter_no_terminal_punct=False,
            min_num_sentences=-1,
            min_words_per_line=-1,
        ),
        rules.FineWebQualityFilter(language=words, stop_chars=STOPS),
    ]
    pipelines.run([pipelines.readers.ParquetReader(parquet), *good, write], "good", PROCESSES)
    write_tokens = _part("pipeline.tokens").DocumentTokenizer(
        pipelines.at("tokens"), tokenizer, shuffle_documents=False, eos_token="<|eos|>"
    )
    pipelines.remove_copies(pipelines.readers.JsonlReader(pipelines.at("good")), [write_tokens])


def main() -> None:
    """Run what is named."""
    what, *arguments, answer = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), dict[str, Any]()
        started = time.perf_counter()
        if what == "near":
            found["keeps"] = near(Path(arguments[0]), folder)
        else:
            chain(arguments[0], arguments[1], folder)
        found["seconds"] = time.perf_counter() - started
        files = (folder / "tokens").glob("*.ds")
        found["tokens"] = sum(path.stat().st_size for path in files) // 2
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
