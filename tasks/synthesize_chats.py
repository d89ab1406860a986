"""synthesize_chats: a language model asks and answers questions about what the corpus is about."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

from conf.synthesize_chats import SynthesizeChatsConfig
from storage.conversations import Conversation, Conversations
from storage.corpus import Corpus
from storage.jsonl import SplitWriter, content_id, split_by_hash
from storage.topics import Topics
from tasks.language import language_of, script_shares
from tasks.normalise import without_halves
from tasks.stage import Job, stage
from tasks.synthesis import Ask, answers, repeated

SHOWN = 20


@stage(version=2)
def synthesize_chats(
    job: Job, corpus: Corpus, topics: Topics, settings: SynthesizeChatsConfig
) -> Conversations:
    """Questions with their answers that a model wrote about the topics of a corpus.

    reads Corpus, Topics   writes Conversations   cost the endpoint's; the corpus is signed once

    Refused are answers that are no list of questions, that are short or in another language, and pairs that repeat
    an earlier one or a document.
    """
    refused: Counter[str] = Counter()
    pairs: list[tuple[Ask, str, str]] = []
    for ask, answer in answers(job, corpus, topics, settings):
        found = [*pairs_of(answer.text)]
        refused["no_pairs"] += not found
        for question, reply in found:
            if reason := _unfit(question, reply, ask, settings):
                refused[reason] += 1
            else:
                pairs.append((ask, question, reply))
    copies = repeated(corpus, [f"{q}\n{reply}" for _, q, reply in pairs], settings.threshold)
    refused["repeated"] += sum(copies)
    new = [pair for pair, is_copy in zip(pairs, copies, strict=True) if not is_copy]
    with SplitWriter(job.files) as writer:
        for ask, question, reply in new:
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": reply},
            ]
            row = Conversation(
                id=content_id(messages),
                messages=messages,
                domain=settings.domain,
                source=f"synthesize:{ask.topic}",
                language=ask.language,
            )
            writer.write(split_by_hash(question, settings.held_share), row)
    job.metrics |= {
        "refused": {name: n for name, n in sorted(refused.items()) if n},
        **writer.counts,
    }
    job.tables["pairs"] = [{"question": q, "answer": reply} for _, q, reply in new[:SHOWN]]
    return Conversations(job.path)


def pairs_of(text: str) -> Iterator[tuple[str, str]]:
    """Questions and answers of the JSON array in a text, whatever stands around it; none where there is none."""
    try:
        rows: Any = json.loads(text[text.index("[") : text.rindex("]") + 1])
    except (ValueError, RecursionError):
        return
    for row in rows:
        if isinstance(row, dict):
            values = [cast("dict[str, Any]", row).get(name) for name in ("question", "answer")]
            question, reply = (
                without_halves(value.strip()) if isinstance(value, str) else "" for value in values
            )
            if question and reply:
                yield question, reply


def _unfit(question: str, reply: str, ask: Ask, settings: SynthesizeChatsConfig) -> str | None:
    """Why a pair is none for training; None for one that is."""
    if len(reply) < settings.min_chars:
        return "too_short"
    text = f"{question} {reply}"
    return None if language_of(text, script_shares(text)) == ask.language else "language"
