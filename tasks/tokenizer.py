"""tokenizer: learn a vocabulary over bytes, or take one that others made."""

from typing import TYPE_CHECKING

from conf.tokenizer import TokenizerConfig
from storage.conversations import Conversations
from storage.corpus import Corpus
from storage.source import SourceFile
from storage.tokenizer import SPECIAL_TOKENS, Tokenizer, TokenizerMeta, write_tokenizer
from tasks.fanout_local import run_apart
from tasks.stage import Job, stage
from tasks.text_sample import Sample, sample_texts
from tasks.tokenizer_adoption import adopted
from tasks.tokenizer_report import report
from tasks.tokenizer_training import learnt, pattern_name, train

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Model

APART_BYTES = 1_000_000
"""Samples from here on are learnt from in a process of its own: it gives the kernel back 35 times as much."""


@stage(version=3)
def tokenizer(
    job: Job,
    corpus: Corpus,
    settings: TokenizerConfig,
    conversations: Conversations | None = None,
) -> Tokenizer:
    """Learn a byte-level tokenizer from a sample of the training documents, or adopt one.

    reads Corpus, Conversations, sources   writes Tokenizer   cost  2 s and 35 MB per million sampled
    bytes (Unigram 5 to 10 s); then all held-out documents once with it and with each that it is compared to

    Raises ValueError if there is no text to learn from, and for files that are no tokenizer.
    """
    sample = sample_texts(corpus, conversations, settings)
    if not settings.adopt and not any(sample.texts):
        raise ValueError(
            "the corpus keeps no training document, a tokenizer needs some text; "
            "look at what was dropped with `bessemer cat ARTIFACT --dropped` and loosen the filter"
        )
    if settings.adopt:
        taken = adopted(_files(job, "adopt", 0), settings.adopted_special, settings.special)
        model, pattern, spelling = taken.model, taken.pretokenizer, taken.spelling
    else:
        model, pattern = _learnt(sample, settings), pattern_name(settings)
        spelling = SPECIAL_TOKENS
    meta = write_tokenizer(job.files, model, pattern, spelling=spelling, system=settings.system)
    job.metrics |= {"vocabulary": meta.vocabulary, "sample_bytes": sample.bytes}
    if not settings.adopt:
        job.metrics["vocabulary_asked"] = settings.vocabulary
        _warn_of_a_small_one(job, meta, settings)
    folders = {job.node: job.files}
    for index, spec in enumerate(settings.compare):
        other = adopted(_files(job, "compare", index))
        folders[spec.path] = job.state / f"compared-{index}"
        write_tokenizer(
            folders[spec.path], other.model, other.pretokenizer, spelling=other.spelling
        )
    report(job, corpus, sample.texts, folders, is_trained=not settings.adopt)
    return Tokenizer(job.path)


def _learnt(sample: Sample, settings: TokenizerConfig) -> "Model":
    from tokenizers import Tokenizer as Model

    if settings.algorithm != "bpe" or sum(sample.bytes.values()) < APART_BYTES:
        return train(sample.texts, settings)
    return Model.from_str(run_apart(learnt, sample.texts, settings))


def _files(job: Job, setting: str, index: int) -> list[SourceFile]:
    """The files of one of the sources of a setting."""
    return [file for file in job.sources[setting].files if file.spec_index == index]


def _warn_of_a_small_one(job: Job, meta: TokenizerMeta, settings: TokenizerConfig) -> None:
    if meta.vocabulary < settings.vocabulary:
        job.log.warning(
            "the sample has pieces for %d tokens only, %d were asked for; "
            "give more text or set tokenizer.vocabulary=%d",
            meta.vocabulary,
            settings.vocabulary,
            meta.vocabulary,
        )
