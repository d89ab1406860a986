"""tokenizer: learn a vocabulary over bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

from conf.tokenizer import TokenizerConfig
from storage.conversations import Conversations
from storage.corpus import Corpus
from storage.tokenizer import ChatTokenizer, Tokenizer, write_tokenizer
from tasks.stage import Job, stage
from tasks.text_sample import held_texts, sample_texts
from tasks.tokenizer_training import pattern_name, train

MEASURED_TEXTS = 300
MEASURED_CHARS = 5_000
SHOWN_CHARS = 40


@stage(version=2)
def tokenizer(
    job: Job,
    corpus: Corpus,
    settings: TokenizerConfig,
    conversations: Conversations | None = None,
) -> Tokenizer:
    """Learn a byte-level tokenizer from a sample of the training documents.

    reads Corpus, Conversations   writes Tokenizer   cost  2 s and 35 MB per million sampled bytes

    Raises ValueError if there is no text to learn from.
    """
    sample = sample_texts(corpus, conversations, settings)
    if not any(sample.texts):
        raise ValueError(
            "the corpus keeps no training document, a tokenizer needs some text; "
            "look at what was dropped with `bessemer cat ARTIFACT --dropped` and loosen the filter"
        )
    trained = train(sample.texts, settings)
    meta = write_tokenizer(job.files, trained, pattern_name(settings))
    if meta.vocabulary < settings.vocabulary:
        job.log.warning(
            "the sample has pairs for %d tokens only, %d were asked for; "
            "give more text or set tokenizer.vocabulary=%d",
            meta.vocabulary,
            settings.vocabulary,
            meta.vocabulary,
        )
    job.metrics |= {
        "vocabulary": meta.vocabulary,
        "vocabulary_asked": settings.vocabulary,
        "sample_bytes": sample.bytes,
    }
    _measure(job, held_texts(corpus), sample.texts)
    return Tokenizer(job.path)


def _measure(job: Job, held: Mapping[str, Sequence[str]], sample: Sequence[str]) -> None:
    """How well it compresses per language, on held-out documents where there are some.

    Raises RuntimeError if a text does not come back from its ids: then the files must not be used.
    """
    chat = ChatTokenizer(job.files)
    rows: list[dict[str, Any]] = []
    for language, texts in sorted(held.items()) or [("sample", sample)]:
        texts = [text[:MEASURED_CHARS] for text in texts[:MEASURED_TEXTS]]
        ids = chat.encode_batch(texts)
        for text, of_text in zip(texts, ids, strict=True):
            if chat.decode(of_text) != text:
                raise RuntimeError(f"{text[:80]!r} does not come back from its token ids")
        sizes = [len(text.encode("utf-8")) for text in texts]
        tokens = sum(map(len, ids))
        rows.append(
            {
                "language": language,
                "documents": len(texts),
                "bytes": sum(sizes),
                "tokens": tokens,
                "bytes_per_token": round(sum(sizes) / max(tokens, 1), 4),
                "example": "|".join(
                    _shown(chat, token) for token in chat.encode(texts[0][:SHOWN_CHARS])
                ),
            }
        )
    job.metrics["compression"] = {row["language"]: row["bytes_per_token"] for row in rows}
    job.tables["compression"] = rows


def _shown(chat: ChatTokenizer, token: int) -> str:
    """The text of a token; bytes that are only a part of a character as `‹E5 B0›`."""
    text = chat.decode([token])
    if "\ufffd" not in text:
        return text
    return f"‹{chat.bytes_of(token).hex(' ').upper()}›"
