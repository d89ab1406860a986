"""synthesize: a language model writes about what the corpus is about."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.extract import NormaliseConfig
from conf.synthesize import SynthesizeConfig
from storage.corpus import SHARD, Corpus, ShardEntry, ShardWriter, document_of
from storage.identity import fingerprint
from storage.topics import Topics
from tasks.fanout import PartItem, fan_out
from tasks.han import traditional_share
from tasks.language import language_of, script_shares
from tasks.normalise import normalise
from tasks.stage import Job, stage
from tasks.synthesis import Ask, answers, repeated

ASKED = "asked.jsonl"
"""In `files/`: every question with its answer and why that was refused, if it was."""
SHOWN = 20
SHOWN_CHARS = 200


@stage(version=2)
def synthesize(job: Job, corpus: Corpus, topics: Topics, settings: SynthesizeConfig) -> Corpus:
    """Add a shard of documents that a model wrote about the topics; none is like one of the corpus.

    reads Corpus, Topics   writes Corpus and `asked.jsonl`   cost the endpoint's; the corpus is signed once

    The corpus' own documents stay as they are; the new ones are a landing of their own, and none is held out.
    """
    came = answers(job, corpus, topics, settings)
    texts = [normalise(answer.text, NormaliseConfig()) for _, answer in came]
    reasons = [
        _unfit(text, ask, settings) if answer.is_whole else "cut_off"
        for (ask, answer), text in zip(came, texts, strict=True)
    ]
    fit = [place for place, reason in enumerate(reasons) if reason is None]
    copies = repeated(corpus, [texts[place] for place in fit], settings.threshold)
    for place, is_copy in zip(fit, copies, strict=True):
        reasons[place] = "repeated" if is_copy else None
    new = [(came[place][0].language, texts[place]) for place in fit if reasons[place] is None]
    _write(job, corpus, new, settings)
    with (job.files / ASKED).open("w", encoding="utf-8") as stream:
        for (ask, answer), reason in zip(came, reasons, strict=True):
            asked = {"topic": ask.topic, "prompt": ask.prompt, "answer": answer.text}
            stream.write(json.dumps({**asked, "refused": reason}, ensure_ascii=False) + "\n")
    job.metrics |= {
        "documents": len(new),
        "chars": sum(len(text) for _, text in new),
        "refused": dict(sorted(Counter(reason for reason in reasons if reason).items())),
    }
    job.tables["written"] = [
        {"language": language, "text": text[:SHOWN_CHARS]} for language, text in new[:SHOWN]
    ]
    return Corpus(job.path)


def _unfit(text: str, ask: Ask, settings: SynthesizeConfig) -> str | None:
    """Why an answer is no document; None for one that is."""
    if not text:
        return "no_text"
    if len(text) < settings.min_chars:
        return "too_short"
    if language_of(text, script_shares(text)) != ask.language:
        return "language"
    return None


def _write(
    job: Job, corpus: Corpus, new: Sequence[tuple[str, str]], settings: SynthesizeConfig
) -> None:
    """The corpus with one more shard, if there is anything in it."""
    import polars as pl

    shards = corpus.shards
    frames = (
        pl.DataFrame({"keep": [True] * shard.rows, "reason": [None] * shard.rows})
        for shard in shards
    )
    Corpus.write(job.files, corpus, frames, "synthesize")
    entries = [shard.entry for shard in shards]
    if new:
        identity = {
            "texts": fingerprint({"texts": [list(row) for row in new]}),
            "domain": settings.domain,
        }
        item = PartItem(identity, (list(new), settings.domain), "synthetic documents")
        [part] = fan_out(job, build_documents, [item])
        landing = max((entry.landing for entry in entries), default=-1) + 1
        entries.append(ShardEntry(part.fingerprint, part.digest, len(new), landing, "synthetic"))
        Corpus.write_shards(job.files, entries, "synthesize")
    job.parts += [entry.part for entry in entries if entry.part not in job.parts]


def build_documents(files: Path, texts: Sequence[tuple[str, str]], domain: str) -> dict[str, Any]:
    """Write `shard.parquet` of (language, text)."""
    with ShardWriter(files / SHARD) as writer:
        for language, text in texts:
            shares = script_shares(text)
            writer.append(
                document_of(
                    text,
                    source="synthesize",
                    domain=domain,
                    language=language,
                    han_share=shares.han,
                    latin_share=shares.latin,
                    traditional_share=traditional_share(text) if shares.han else 0.0,
                    split="train",
                )
            )
    return {"documents": len(texts)}
