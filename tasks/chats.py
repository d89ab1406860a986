"""The stage that brings conversations of every known layout into one form."""

import re

from conf.chats import ChatsConfig
from storage.conversations import Conversation, Conversations, Message
from storage.jsonl import SplitWriter, content_id
from storage.source import SourceFile
from tasks.chat_formats import ChatRow, parse_chat
from tasks.stage import Job, stage
from tasks.tally import Tally, in_split_order

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
KANA = re.compile("[\u3040-\u30ff]")
HANGUL = re.compile("[\uac00-\ud7af]")
LETTER = re.compile(r"[^\W\d_]")
HAN_SHARE = 0.3
KANA_SHARE = 0.02
ASCII_SHARE = 0.9


@stage(version=1)
def chats(job: Job, settings: ChatsConfig) -> Conversations:
    """Read conversations, refuse what cannot be one, drop repetitions, hold a share out.

    reads sources   writes Conversations   cost one pass over the files, one core
    """
    tally = Tally(settings.held_share, settings.on_bad_row, settings.keep_duplicates)
    files = in_split_order(job.sources["sources"])
    with SplitWriter(job.files) as writer:
        for number, file in enumerate(files):
            job.report_progress(number, len(files), "files")
            for line, row in tally.parsed(file, parse_chat):
                tally.layouts[row.layout] += 1
                tally.add(file, "trimmed", int(row.is_trimmed))
                conversation = _conversation(row, file, line)
                if split := tally.place(file, conversation["id"], row.messages):
                    writer.write(split, conversation)
    job.metrics |= {**tally.figures(), **writer.counts}
    job.tables |= tally.tables()
    return Conversations(job.path)


def language_of(messages: list[Message]) -> str:
    """zh, ja or ko by their scripts; en where the letters are ASCII; else `und`."""
    text = "".join(message["content"] for message in messages)
    letters = len(LETTER.findall(text))
    if not letters:
        return "und"
    if len(KANA.findall(text)) / letters > KANA_SHARE:
        return "ja"
    if len(HANGUL.findall(text)) / letters >= HAN_SHARE:
        return "ko"
    if len(HAN.findall(text)) / letters >= HAN_SHARE:
        return "zh"
    ascii_letters = sum(character.isascii() and character.isalpha() for character in text)
    return "en" if ascii_letters / letters >= ASCII_SHARE else "und"


def _conversation(row: ChatRow, file: SourceFile, line: int) -> Conversation:
    # `source` names the file by its content: a path is no part of what the stage computes.
    return Conversation(
        id=content_id(row.messages),
        messages=row.messages,
        domain=file.spec.domain,
        source=f"{file.digest[:12]}:{line}",
        language=file.spec.language or language_of(row.messages),
    )
