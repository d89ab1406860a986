"""The stage that brings conversations of every known layout into one form."""

from conf.chats import ChatsConfig
from storage.conversations import Conversation, Conversations
from storage.jsonl import SplitWriter, content_id
from storage.source import SourceFile
from tasks.chat_formats import ChatRow, parse_chat
from tasks.language import language_of, script_shares
from tasks.stage import Job, stage
from tasks.tally import Tally, in_split_order


@stage(version=2)
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


def _conversation(row: ChatRow, file: SourceFile, line: int) -> Conversation:
    text = "".join(message["content"] for message in row.messages)
    # `source` names the file by its content: a path is no part of what the stage computes.
    return Conversation(
        id=content_id(row.messages),
        messages=row.messages,
        domain=file.spec.domain,
        source=f"{file.digest[:12]}:{line}",
        language=file.spec.language or language_of(text, script_shares(text)),
    )
