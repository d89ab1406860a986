"""What a tokenizer is worth: tokens per text beside other tokenizers, texts that do not come back,
tokens that nothing uses."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.corpus import Corpus
from storage.tokenizer import ChatTokenizer
from tasks.shard_batches import kept_batches
from tasks.stage import Job
from tasks.token_writer import choose_encoder, forget_encoders

SHOWN_CHARS = 40
SHOWN_TOKENS = 20
CHECKED_TEXTS = 64
BATCH_TEXTS = 250

Group = tuple[str, str]
"""Language and domain."""


@dataclass
class Tally:
    """What some texts came to."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    not_restored: int = 0
    """Texts that are not what their ids give back."""
    example: str = ""


def report(
    job: Job,
    corpus: Corpus,
    sample: Sequence[str],
    folders: Mapping[str, Path],
    *,
    is_trained: bool,
) -> None:
    """Measure tokenizers on every kept held-out document, or on the sample where there is none, and
    the first of them on the sample.

    Raises RuntimeError if a text does not come back from the ids of a trained tokenizer: then it must
    not be used.
    """
    chats = {name: ChatTokenizer(folder) for name, folder in folders.items()}
    own, chat = next(iter(chats.items()))
    found: dict[str, dict[Group, Tally]] = {name: {} for name in chats}
    for group, texts in _measured_texts(corpus, sample):
        for name, other in chats.items():
            lost = _count(found[name].setdefault(group, Tally()), other, texts)
            if lost is not None and name == own and is_trained:
                raise RuntimeError(f"{lost[:80]!r} does not come back from its token ids")
    tallies = found[own]
    job.metrics |= {
        "compression": _rates(tallies, "bytes"),
        "characters_per_token": _rates(tallies, "characters"),
        "measured_documents": sum(tally.documents for tally in tallies.values()),
        "not_restored": sum(tally.not_restored for tally in tallies.values()),
    }
    job.tables["compression"] = [
        _row(name, chats[name], group, tally)
        for group in sorted(tallies)
        for name, groups in found.items()
        for tally in [groups[group]]
    ]
    if lost_texts := job.metrics["not_restored"]:
        job.log.warning(
            "%d of %d texts do not come back from the adopted tokenizer's ids; a model that learns from "
            "them cannot write them",
            lost_texts,
            job.metrics["measured_documents"],
        )
    _report_unused(job, chat, folders[own], sample)


def _measured_texts(corpus: Corpus, sample: Sequence[str]) -> Iterator[tuple[Group, list[str]]]:
    """Texts of one language and domain, some at a time."""
    import polars as pl

    is_empty = True
    for shard in corpus.shards:
        for frame in kept_batches(shard, ["language", "domain", "split", "text"]):
            held = frame.filter(pl.col("split") == "held")
            for (language, domain), rows in held.group_by(
                "language", "domain", maintain_order=True
            ):
                is_empty = False
                yield (str(language), str(domain)), rows["text"].to_list()
    if is_empty:
        for start in range(0, len(sample), BATCH_TEXTS):
            yield ("sample", "sample"), list(sample[start : start + BATCH_TEXTS])


def _count(tally: Tally, chat: ChatTokenizer, texts: Sequence[str]) -> str | None:
    """Add texts to a tally; a text that did not come back, if any."""
    lost: str | None = None
    for text, ids in zip(texts, chat.encode_batch(texts), strict=True):
        tally.documents += 1
        tally.characters += len(text)
        tally.bytes += len(text.encode("utf-8"))
        tally.tokens += len(ids)
        if chat.decode(ids) != text:
            tally.not_restored += 1
            lost = text
    if not tally.example and texts:
        tally.example = "|".join(map(chat.shown, chat.encode(texts[0][:SHOWN_CHARS])))
    return lost


def _rates(tallies: Mapping[Group, Tally], unit: str) -> dict[str, float]:
    """Bytes or characters per token of each language."""
    units: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for (language, _), tally in sorted(tallies.items()):
        units[language] = units.get(language, 0) + getattr(tally, unit)
        tokens[language] = tokens.get(language, 0) + tally.tokens
    return {language: round(units[language] / max(tokens[language], 1), 4) for language in units}


def _row(name: str, chat: ChatTokenizer, group: Group, tally: Tally) -> dict[str, Any]:
    language, domain = group
    return {
        "language": language,
        "domain": domain,
        "tokenizer": name,
        "vocabulary": chat.vocabulary,
        "documents": tally.documents,
        "tokens": tally.tokens,
        "characters_per_token": round(tally.characters / max(tally.tokens, 1), 4),
        "bytes_per_token": round(tally.bytes / max(tally.tokens, 1), 4),
        "not_restored": tally.not_restored,
        "example": tally.example,
    }


def _report_unused(job: Job, chat: ChatTokenizer, folder: Path, sample: Sequence[str]) -> None:
    """Count the tokens that the sample does not use, and those that no text can use."""
    import numpy as np

    uses = np.zeros(chat.vocabulary, np.int64)
    uses[list(chat.meta.special.values())] = 1
    for start in range(0, len(sample), BATCH_TEXTS):
        batch = sample[start : start + BATCH_TEXTS]
        encode, _ = choose_encoder(chat, folder, batch[:CHECKED_TEXTS], "auto")
        uses += np.bincount(encode(batch)[0], minlength=chat.vocabulary)
    forget_encoders()
    unreachable = chat.unreachable()
    job.metrics |= {
        "unused_tokens": int((uses == 0).sum()),
        "unreachable_tokens": len(unreachable),
    }
    job.tables["unreachable tokens"] = [
        {"id": token, "text": chat.shown(token)} for token in unreachable[:SHOWN_TOKENS]
    ]
