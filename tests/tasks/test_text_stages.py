"""extract, dedup, tokenizer and tokenize in one store: what a new landing costs, and a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.dedup import DedupConfig
from conf.extract import ExtractConfig
from conf.tokenize import TokenizeConfig
from conf.tokenizer import TokenizerConfig
from storage.tokens import Tokens
from tasks.dedup import dedup
from tasks.extract import extract
from tasks.stage import Outcome
from tasks.tokenize import tokenize
from tasks.tokenizer import tokenizer
from tests.tasks.corpus_runs import run_stage, spec
from tests.tasks.text_jobs import digest_of

SENTENCES = {
    "en": "Document number {} tells how the river {} runs from the hills down to the sea, and how people"
    " built bridge {} over it, long ago, with stones that they carried on their backs.",
    "zh": "第{}篇文章讲述河流{}怎样从山里流到海边，以及人们很久以前怎样用背来的石头在河上修建了第{}座桥梁。",
}


def write_shard(folder: Path, number: int, *, documents: int = 40) -> None:
    lines = [
        json.dumps(
            {"text": SENTENCES[language].format(i, i * i, i * 7 + number), "url": f"u{number}-{i}"}
        )
        for i in range(documents)
        for language in SENTENCES
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{number}.jsonl").write_text("\n".join(lines), "utf-8")


def run_all(root: Path, *, workers: int = 1, pinned: Outcome | None = None) -> dict[str, Outcome]:
    """The four stages; `pinned` is a tokenizer to use instead of learning one."""
    sources = (spec(root / "raw" / "*.jsonl", domain="web"),)
    found: dict[str, Outcome] = {}
    found["extract"] = run_stage(extract, ExtractConfig(sources=sources), {}, root, workers=workers)
    corpus = {"corpus": found["extract"].artifact}
    found["dedup"] = run_stage(dedup, DedupConfig(), corpus, root, workers=workers)
    corpus = {"corpus": found["dedup"].artifact}
    config = TokenizerConfig(vocabulary=500)
    found["tokenizer"] = pinned or run_stage(tokenizer, config, corpus, root)
    inputs = {**corpus, "tokenizer": found["tokenizer"].artifact}
    found["tokenize"] = run_stage(tokenize, TokenizeConfig(), inputs, root, workers=workers)
    return found


def test_a_new_file_costs_one_shard_and_reuses_the_prefix(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path / "raw", number)
    first = run_all(tmp_path)
    assert [outcome.status for outcome in first.values()] == ["built"] * 4
    again = run_all(tmp_path)
    assert [outcome.status for outcome in again.values()] == ["hit"] * 4
    write_shard(tmp_path / "raw", 3)
    second = run_all(tmp_path, pinned=first["tokenizer"])
    shards = {
        name: outcome.record.metrics["shards"]
        for name, outcome in second.items()
        if name != "tokenizer"
    }
    assert shards == {name: {"built": 1, "reused": 3} for name in ("extract", "dedup", "tokenize")}
    assert second["dedup"].record.metrics["landings"] == {"built": 1, "reused": 1}
    old, new = first["tokenize"].artifact, second["tokenize"].artifact
    assert isinstance(old, Tokens)
    assert isinstance(new, Tokens)
    for split in ("train", "held"):
        before, after = old.reader.tokens("web", split), new.reader.tokens("web", split)
        assert len(after) > len(before) > 0
        assert after[: len(before)].tolist() == before.tolist()


@pytest.mark.slow
def test_killed_anywhere_the_bytes_are_those_of_an_unbroken_run(tmp_path: Path) -> None:
    roots = [tmp_path / "unbroken", tmp_path / "broken"]
    for root in roots:
        for number in range(3):
            write_shard(root / "raw", number, documents=200)
    run_all(roots[0], workers=2)
    code = (
        "from pathlib import Path; from tests.tasks.test_text_stages import run_all;"
        f"run_all(Path({str(roots[1])!r}), workers=2)"
    )
    for seconds in (2.5, 4.5):
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            start_new_session=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    broken, unbroken = run_all(roots[1], workers=2), run_all(roots[0], workers=2)
    for name, outcome in unbroken.items():
        assert outcome.status == "hit"
        assert broken[name].record.fingerprint == outcome.record.fingerprint
        assert broken[name].record.digest == outcome.record.digest
        assert digest_of(broken[name].artifact.files) == digest_of(outcome.artifact.files)
