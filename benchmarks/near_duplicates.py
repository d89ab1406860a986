"""Near-duplicate removal with exact check, text in, keep bits out, against five others; speed and quality.

The text is the corpus cut to pages, with planted copies of three pages of four (up to four per cent
of their words changed). Peers are so slow that a part tells their rate: it is stated in the row.
"""

import json
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.work import WORKERS, Row, Work, environment, run_peer, texts_of
from conf.dedup import DedupConfig
from storage.corpus import Corpus, ShardEntry, ShardWriter, document_of
from storage.identity import hash_file
from storage.store import Store
from tasks.dedup import dedup
from tasks.stage import Job

PEERS = ("loop", "bulk", "rensa", "datatrove", "text-dedup")
PACKAGES = (
    "datasketch==2.0.0", "rensa==0.5.0", "datatrove==0.10.1", "xxhash<4", "tokenizers", "orjson",
    "nltk", "text-dedup==0.4.0", "datasets", "click", "click-option-group", "rich", "regex", "scipy",
)  # fmt: skip
WITHOUT_DEPENDENCIES = ("text-dedup==0.4.0",)
"""Its requirements (pyspark, Sphinx, onnxruntime) are not those of what is measured."""
PEER_MEGABYTES = {"loop": 3, "bulk": 12, "rensa": 40, "datatrove": 20, "text-dedup": 20}
GOALS = {"loop": (150, 50), "bulk": (40, 12), "rensa": (10, 4), "datatrove": (40, 12),
         "text-dedup": (40, 12)}  # fmt: skip
PIPELINES = {"datatrove": ("datatrove_steps", "near")}
"""Script and name there of a peer that has a script of its own."""
PAGE_CHARS = 4000
SHARDS = 8
TOKEN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[a-zA-Z0-9_]+|.", re.DOTALL)
WORD = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[a-z0-9_]+")
THRESHOLD = 0.8
PLANTED = 1500
"""Pages per language of the quality rows; two thirds of them are copies."""


def measure(work: Work) -> list[Row]:
    """Five rows of speed, and per language two of quality for everybody."""
    python = peers()
    pages = [page for text in texts_of(work.corpus) for page in pages_of(text)]
    texts = with_copies(pages)
    rows = _speed(work.folder, python, texts)
    for language in ("zh", "en"):
        chosen = [page for page in pages if _language(page) == language and len(page) > 300]
        rows += _quality(work.folder, python, _planted(chosen), language)
    return rows


def peers() -> Path:
    """The interpreter that has all of them."""
    return environment("near_duplicates", PACKAGES, without_dependencies=WITHOUT_DEPENDENCIES)


def _speed(folder: Path, python: Path, texts: list[str]) -> list[Row]:
    made = _corpus(folder, "pages", texts)
    # What is compiled is compiled before the clock starts; the seed makes it another artifact.
    _deduplicated(folder, made, DedupConfig(permutation_seed=2))
    started = time.perf_counter()
    _deduplicated(folder, made, DedupConfig())
    size = _megabytes(texts)
    ours = size / (time.perf_counter() - started)
    rows: list[Row] = []
    for peer in PEERS:
        part = _first(texts, PEER_MEGABYTES[peer])
        seconds, _ = _ask(folder, python, peer, part)
        name = f"near-duplicates, {size:.0f} MB ({peer}: {_megabytes(part):.0f})"
        goal, floor = GOALS[peer]
        rows.append(Row(name, peer, ours, _megabytes(part) / seconds, "MB/s", goal, floor))
    return rows


def _quality(folder: Path, python: Path, texts: list[str], language: str) -> list[Row]:
    """Recall: of all pairs with J >= 0.8, one was dropped. Precision: what was dropped has a partner."""
    pairs = _true_pairs(texts)
    made = _corpus(folder, f"quality-{language}", texts)
    result = _deduplicated(folder, made, DedupConfig())
    ours = _figures([bool(k) for s in result.shards for k in s.decisions()["keep"]], pairs)
    rows: list[Row] = []
    for peer in PEERS:
        theirs = _figures(_ask(folder, python, peer, texts)[1], pairs)
        for name, mine, other in zip(("recall", "precision"), ours, theirs, strict=True):
            title = f"{name} at J 0.8, {language}, {len(texts)} pages, {len(pairs)} pairs"
            rows.append(Row(title, peer, mine, max(other, 1e-9), "", goal=1.0, floor=0.99))
    return rows


def _figures(keeps: Sequence[bool], pairs: set[tuple[int, int]]) -> tuple[float, float]:
    partners = {number for pair in pairs for number in pair}
    dropped = [number for number, keep in enumerate(keeps) if not keep]
    found = sum(not (keeps[x] and keeps[y]) for x, y in pairs)
    right = sum(number in partners for number in dropped)
    return found / max(1, len(pairs)), right / max(1, len(dropped))


def _true_pairs(texts: Sequence[str]) -> set[tuple[int, int]]:
    """Every pair with an exact Jaccard similarity of the token shingles of at least 0.8, in Python."""
    sets = [_shingles(text) for text in texts]
    holders: dict[tuple[str, ...], list[int]] = {}
    pairs: set[tuple[int, int]] = set()
    for number, shingles in enumerate(sets):
        shared: Counter[int] = Counter()
        for shingle in shingles:
            shared.update(holders.setdefault(shingle, []))
            holders[shingle].append(number)
        for other, count in shared.items():
            if count >= THRESHOLD * (len(shingles) + len(sets[other]) - count):
                pairs.add((other, number))
    return pairs


def _shingles(text: str) -> set[tuple[str, ...]]:
    tokens = WORD.findall(text.lower())
    width = min(5, len(tokens))
    return (
        {tuple(tokens[i : i + width]) for i in range(len(tokens) - width + 1)} if tokens else set()
    )


def pages_of(text: str) -> list[str]:
    """The text in pieces of about 4000 characters, as a crawl would have it."""
    pages, lines, size = [], [], 0
    for line in text.split("\n"):
        lines.append(line)
        size += len(line) + 1
        if size >= PAGE_CHARS:
            pages.append("\n".join(lines))
            lines, size = [], 0
    return [page for page in [*pages, "\n".join(lines)] if page.strip()]


def with_copies(pages: Sequence[str]) -> list[str]:
    """Three of four pages also as a copy, all of them in a seeded order."""
    pick = random.Random(0)
    texts = [*pages, *(_varied(page, pick) for number, page in enumerate(pages) if number % 4)]
    pick.shuffle(texts)
    return texts


def _planted(pages: Sequence[str]) -> list[str]:
    """Pages with two copies each, their similarities spread around the threshold."""
    pick = random.Random(1)
    chosen = pick.sample(list(pages), min(PLANTED // 3, len(pages)))
    texts = [text for page in chosen for text in (page, _varied(page, pick), _varied(page, pick))]
    pick.shuffle(texts)
    return texts


def _varied(page: str, pick: random.Random) -> str:
    """The page with up to 4 % of its words replaced, here and there: J from 0.6 to 1."""
    tokens = TOKEN.findall(page)
    words = [i for i, token in enumerate(tokens) if not token.isspace() and token.isalnum()]
    for i in pick.sample(words, int(len(words) * 0.04 * pick.random())):
        tokens[i] = tokens[pick.choice(words)]
    return "".join(tokens)


def _language(page: str) -> str:
    han = sum("\u4e00" <= character <= "\u9fff" for character in page)
    return "zh" if han > 0.3 * len(page) else "en"


def _megabytes(texts: Sequence[str]) -> float:
    return sum(len(text.encode("utf-8")) for text in texts) / 1e6


def _first(texts: Sequence[str], megabytes: float) -> list[str]:
    part: list[str] = []
    size = 0.0
    for text in texts:
        if size >= megabytes * 1e6:
            break
        part.append(text)
        size += len(text.encode("utf-8"))
    return part


def _corpus(folder: Path, name: str, texts: Sequence[str]) -> Corpus:
    """A corpus of these documents in eight shards, in order."""
    entries: list[ShardEntry] = []
    for index in range(SHARDS):
        part = f"{name}-{index}"
        documents = texts[len(texts) * index // SHARDS : len(texts) * (index + 1) // SHARDS]
        path = folder / "made" / part / "files" / "shard.parquet"
        with ShardWriter(path) as writer:
            for text in documents:
                writer.append(document_of(text, source="benchmark", language=_language(text[:500])))
        entries.append(ShardEntry(part, hash_file(path), len(documents), 0, part))
    Corpus.write_shards(folder / "made" / name / "files", entries, "extract")
    return Corpus(folder / "made" / name)


def _deduplicated(folder: Path, corpus: Corpus, settings: DedupConfig) -> Corpus:
    """The stage from Parquet files to keep bits, with its worker processes."""
    path = folder / "made" / f"dedup-{corpus.path.name}-{settings.permutation_seed}"
    for name in ("files", "logs", "state"):
        (path / name).mkdir(parents=True)
    store = Store(folder / "store")
    return dedup(
        Job(node="d", stage="dedup", path=path, store=store, workers=WORKERS), corpus, settings
    )


def _ask(folder: Path, python: Path, peer: str, texts: Sequence[str]) -> tuple[float, list[bool]]:
    """Seconds and keep bits of a peer."""
    lines = folder / "texts.jsonl"
    lines.write_text("".join(json.dumps(text) + "\n" for text in texts), "utf-8")
    script, name = PIPELINES.get(peer, ("near_duplicates", peer))
    answer: dict[str, Any] = run_peer(python, script, folder, [name, str(lines)])
    return answer["seconds"], answer["keeps"]
