"""What share of texts and of planted junk each preset of filter keeps.

    python -m benchmarks.presets DATA

Texts are drawn evenly from DATA/pretrain, junk is the demo world's (stubs, repetition, garbage, page
frames; its spam is well-formed and a matter of block lists). A column is a language and a folder.
"""

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.work import run_stage
from conf.extract import ExtractConfig
from conf.filter import PRESETS, FilterConfig
from conf.settings import SourceSpec
from storage.corpus import Corpus
from storage.source import SourceFile, format_of
from tasks.extract import extract
from tasks.filter import filter as filter_stage
from tasks.raw_record import RawRecord
from tasks.records import read_records
from tasks.world_junk import boilerplate, garbage, repetition, stub

FOLDERS = (
    "en_c4_minimal", "en_tinystories_sample", "en_peps", "zh_mnbvc_sample", "zh_csl_abstracts",
    "zh_lctt_tech",
)  # fmt: skip
DOCUMENTS = 400
"""Of each folder, and junk of each language."""


def main(data: Path) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        corpus = _corpus(work, data)
        rows = {
            preset: run_stage(
                filter_stage,
                FilterConfig(preset=preset, outlier_sigmas=None),
                {"corpus": corpus},
                work,
            ).record.metrics["kept_by"]
            for preset in PRESETS
        }
    columns = sorted(rows["none"])
    print("| preset |", " | ".join(columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for preset, kept in rows.items():
        shares = [kept[column]["kept"] / kept[column]["documents"] for column in columns]
        print(f"| {preset} |", " | ".join(f"{share:.1%}" for share in shares), "|")


def _corpus(work: Path, data: Path) -> Corpus:
    specs: list[SourceSpec] = []
    texts = {folder: _texts(data / "pretrain" / folder) for folder in FOLDERS}
    texts |= {f"{language}_junk": _junk(language) for language in ("en", "zh")}
    for folder, found in texts.items():
        path = work / f"{folder}.jsonl"
        rows = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in found)
        path.write_text("".join(rows), "utf-8")
        language, _, domain = folder.partition("_")
        specs.append(SourceSpec(path=str(path), domain=domain, language=language))
    corpus = run_stage(extract, ExtractConfig(sources=tuple(specs), languages=()), {}, work)
    assert isinstance(corpus, Corpus)
    return corpus


def _texts(folder: Path) -> list[str]:
    texts = [text for path in sorted(folder.iterdir()) for text in _texts_of(path)]
    return texts[:: -(-len(texts) // DOCUMENTS)]


def _texts_of(path: Path) -> Iterator[str]:
    spec = SourceSpec(path=str(path))
    format_ = format_of(path.name, "auto")
    file = SourceFile(path, path.name, path.stat().st_size, "", format_, spec, 0)
    found = read_records(
        file, text_documents="blank_line", url_reason=lambda url: None, max_page_bytes=0
    )
    yield from (r.text for r in found if isinstance(r, RawRecord) and r.text)


def _junk(language: str) -> list[str]:
    rng = random.Random(1)
    kinds = (stub, repetition, garbage, boilerplate)
    return ["\n".join(rng.choice(kinds)(rng, language).paragraphs) for _ in range(DOCUMENTS)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
