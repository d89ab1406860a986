"""The stage that takes unfit, leaked and repeated conversations out, and gives domains their shares."""

from conf.screen import ScreenConfig
from storage.conversations import Conversation, Conversations
from storage.jsonl import Split
from tasks.screening import HELD_FIRST, Told, screened
from tasks.stage import Job, stage


@stage(version=3)
def screen(job: Job, conversations: Conversations, settings: ScreenConfig) -> Conversations:
    """Drop conversations that are short, long or repeat themselves, that hold exam questions, that repeat an
    earlier one, and of domains with more than their share as many as are too many.

    reads Conversations, exam files   writes Conversations and `dropped.parquet` (id, split, reason, of: the
    conversation it repeats or the exam, question)   cost one pass over the words; all texts in memory
    """
    rows = [_told(split, row) for split in HELD_FIRST for row in conversations.rows(split)]
    job.metrics["conversations"] = screened(job, rows, settings)
    return Conversations(job.path)


def _told(split: Split, row: Conversation) -> Told:
    said = [message["content"] for message in row["messages"]]
    answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
    return Told(split, row, answers, "\n".join(said))
