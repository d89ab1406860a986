"""tokenize: documents to token files."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from shutil import copyfileobj
from typing import Any

from conf.tokenize import MAX_UINT16_VOCABULARY, TokenizeConfig
from storage.corpus import Corpus
from storage.tokenizer import Tokenizer, copy_tokenizer
from storage.tokens import (
    END,
    SPLITS,
    TOKENIZER_FOLDER,
    Split,
    SplitCount,
    Tokens,
    TokensMeta,
    bytes_path,
    end_path,
    token_path,
    write_meta,
)
from tasks.difficulty import write_difficulty
from tasks.fanout import Part, PartItem, fan_out
from tasks.kept_rows import kept_digest
from tasks.stage import Job, stage
from tasks.token_writer import added, build_shard

Counts = dict[str, dict[Split, SplitCount]]


@stage(version=1)
def tokenize(job: Job, corpus: Corpus, tokenizer: Tokenizer, settings: TokenizeConfig) -> Tokens:
    """Encode every kept document, `<|eos|>` after each, in order of shards and rows.

    reads Corpus, Tokenizer   writes Tokens   cost  new shards at about 10 MB/s a worker with fastokens,
    1 MB/s without; then one copy of all token files

    A shard's tokens are a part of the store: what the corpus already had is not encoded again.
    """
    _refuse_narrow_ids(tokenizer.meta.vocabulary, settings)
    items = [
        PartItem(
            identity={
                "shard": shard.entry.digest,
                "kept": kept_digest(shard),
                "tokenizer": tokenizer.meta.digest,
                "dtype": settings.dtype,
            },
            arguments=(shard, tokenizer.files, settings.dtype, settings.engine),
            label=shard.entry.name,
            cost=shard.text_path.stat().st_size,
        )
        for shard in corpus.shards
    ]
    parts = fan_out(job, build_shard, items)
    job.metrics.setdefault("shards", {"built": 0, "reused": 0})
    domains = _domains(parts)
    for domain, splits in domains.items():
        for split in splits:
            _join(job.files, domain, split, [part for part in parts if _has(part, domain, split)])
    meta = TokensMeta(
        dtype=settings.dtype,
        eos=tokenizer.meta.special["eos"],
        vocabulary=tokenizer.meta.vocabulary,
        tokenizer_digest=tokenizer.meta.digest,
        domains=domains,
    )
    write_meta(job.files, meta)
    write_difficulty(job, corpus.shards, parts, meta, settings)
    copy_tokenizer(tokenizer.files, job.files / TOKENIZER_FOLDER)
    _report(job, parts, domains)
    return Tokens(job.path)


def _refuse_narrow_ids(vocabulary: int, settings: TokenizeConfig) -> None:
    if settings.dtype == "uint16" and vocabulary > MAX_UINT16_VOCABULARY:
        raise ValueError(
            f"the tokenizer has {vocabulary:,} tokens, uint16 token files hold at most "
            f"{MAX_UINT16_VOCABULARY:,}; set tokenize.dtype=uint32, or choose a smaller vocabulary"
        )


def _domains(parts: Sequence[Part]) -> Counts:
    """What all parts hold together; every domain has both splits."""
    names = sorted({name for part in parts for name in part.metrics["domains"]})
    counts: Counts = {name: {split: SplitCount() for split in SPLITS} for name in names}
    for part in parts:
        for domain, splits in part.metrics["domains"].items():
            for split, count in splits.items():
                counts[domain][split] = added(counts[domain][split], SplitCount(**count))
    return counts


def _has(part: Part, domain: str, split: Split) -> bool:
    return split in part.metrics["domains"].get(domain, {})


def _join(files: Path, domain: str, split: Split, parts: Sequence[Part]) -> None:
    """One file from the parts' files, in their order; ends are moved behind what came before."""
    import numpy as np

    _concatenate(
        token_path(files, domain, split), [token_path(part.files, domain, split) for part in parts]
    )
    if split == "held":
        _concatenate(bytes_path(files, domain), [bytes_path(part.files, domain) for part in parts])
    tokens = 0
    with end_path(files, domain, split).open("wb") as stream:
        for part in parts:
            ends = np.fromfile(end_path(part.files, domain, split), END)
            stream.write((ends + np.uint64(tokens)).astype(END).tobytes())
            tokens += int(part.metrics["domains"][domain][split]["tokens"])


def _concatenate(target: Path, sources: Sequence[Path]) -> None:
    with target.open("wb") as stream:
        for source in sources:
            with source.open("rb") as part:
                copyfileobj(part, stream, 1 << 22)


def _report(job: Job, parts: Sequence[Part], domains: Counts) -> None:
    languages: dict[str, SplitCount] = {}
    for part in parts:
        for language, count in part.metrics["languages"].items():
            before = languages.get(language, SplitCount())
            languages[language] = added(before, SplitCount(**count))
    rows: list[dict[str, Any]] = [
        {"domain": domain, "split": split, **count.model_dump()}
        for domain, splits in domains.items()
        for split, count in splits.items()
    ]
    job.metrics |= {name: sum(row[name] for row in rows) for name in SplitCount.model_fields}
    job.metrics |= {
        "domains": {
            domain: {split: count.model_dump() for split, count in splits.items()}
            for domain, splits in domains.items()
        },
        "languages": {name: languages[name].model_dump() for name in sorted(languages)},
        "engines": dict(Counter(part.metrics["engine"] for part in parts)),
    }
    job.tables["tokens"] = rows
