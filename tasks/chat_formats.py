"""Turns a row of any known layout of conversations into the normal form, or says why it cannot."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from storage.conversations import Message, Role

ROLES: Mapping[str, Role] = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}
PROMPT_KEYS = ("prompt", "question", "query")
ANSWER_KEYS = ("answer", "response", "output", "completion", "chosen_answer")
EXCHANGE_KEYS = (("human", "assistant"), ("user", "assistant"), ("input", "output"))
"""Names that an item gives to a question and its answer, where it holds both."""
MOSS_MARK = re.compile(r"^<\|\w[\w ]*\|>:\s*|\s*<eo\w>\s*$")
MOSS_EMPTY = ("", "None")


class RowRefused(ValueError):
    """A row has no normal form; the text is the reason that is counted."""


@dataclass(frozen=True)
class ChatRow:
    """A conversation in the normal form, and the layout it came in."""

    layout: str
    messages: list[Message]
    is_trimmed: bool
    """Whether a last user turn without an answer was left out."""


def parse_chat(row: Any) -> ChatRow:
    """The conversation of one row. Raises RowRefused with the reason."""
    layout, turns = _turns_of(row)
    if isinstance(row, dict):
        if row.get("tools"):
            raise RowRefused("uses tools")
        if row.get("label") is False:
            raise RowRefused("its answer is labelled as bad")
    messages = [message_of(role, content) for role, content in turns]
    messages = opened(row, messages) if isinstance(row, dict) else messages
    is_trimmed = len(messages) > 1 and messages[-1]["role"] == "user"
    messages = messages[:-1] if is_trimmed else messages
    refuse_disorder(messages, last="assistant")
    return ChatRow(layout, messages, is_trimmed)


def opened(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages behind the system message that a row has beside them, unless they bring their own."""
    system = row.get("system") or row.get("system_prompt")
    if not isinstance(system, str) or not system.strip() or not messages:
        return messages
    return (
        messages if messages[0]["role"] == "system" else [message_of("system", system), *messages]
    )


def turns_of_list(items: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Role and content of each message, in either spelling; an item may also hold a question and its
    answer, the first one a system message as well."""
    turns: list[tuple[Any, Any]] = []
    for item in items:
        if not isinstance(item, dict):
            raise RowRefused("a message is not an object")
        if "role" in item:
            turns.append((item["role"], item.get("content")))
        elif "from" in item:
            turns.append((item["from"], item.get("value")))
        else:
            turns += _exchange(item)
    return turns


def _exchange(item: dict[str, Any]) -> list[tuple[Any, Any]]:
    for asked, answered in EXCHANGE_KEYS:
        if asked in item and answered in item:
            opening = [("system", item["system"])] if item.get("system") else []
            return [*opening, ("user", item[asked]), ("assistant", item[answered])]
    raise RowRefused("a message has neither `role` nor `from`")


def turns_of_history(history: Any) -> list[tuple[str, Any]]:
    """Turns of a list of [question, answer], the way of alpaca's `history`."""
    turns: list[tuple[str, Any]] = []
    for pair in cast("list[Any]", history or []):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowRefused("`history` is not a list of question and answer")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return turns


def message_of(role: Any, content: Any) -> Message:
    """One message. Raises RowRefused for an unknown role or for content that is not text."""
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise RowRefused(f"has the role {str(role)[:40]!r}")
    if isinstance(content, list):
        parts = cast("list[Any]", content)
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
            raise RowRefused("holds more than text")
        content = "".join(str(part.get("text", "")) for part in parts)
    if not isinstance(content, str):
        raise RowRefused("a message has no text")
    return Message(role=ROLES[role.lower()], content=content)


def refuse_disorder(messages: Sequence[Message], *, last: Role) -> None:
    """Raises RowRefused unless an optional system message is followed by user and assistant in
    turn, none empty, and `last` speaks last."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        raise RowRefused("has no turns")
    for index, message in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if message["role"] != expected:
            raise RowRefused(f"has a turn of the {message['role']} where the {expected}'s is due")
        if not message["content"].strip():
            raise RowRefused(f"has an empty turn of the {expected}")
    if turns[-1]["role"] != last:
        raise RowRefused(f"does not end with a turn of the {last}")


def _turns_of(row: Any) -> tuple[str, list[tuple[Any, Any]]]:
    match row:
        case list():
            return "list", turns_of_list(row)
        case {"messages": list() as items}:
            return "messages", turns_of_list(items)
        case {"conversations": list() as items}:
            return "sharegpt", turns_of_list(items)
        case {"conversation": list() as items}:
            return "firefly", turns_of_list(items)
        case {"chat": dict() as turns}:
            return "moss", _moss(row.get("meta_instruction"), turns)
        case {"instruction": instruction, "output": output} | {
            "instruction": instruction,
            "response": output,
        }:
            given = row.get("input", row.get("context"))
            return "alpaca", _alpaca(row, instruction, given, output)
        case {"instruction": instruction, "instances": [{"input": given, "output": output}]}:
            return "seed_task", _alpaca(row, instruction, given, output)
        case {"kind": str(), "input": question, "target": answer}:
            return "firefly_pair", [("user", question), ("assistant", answer)]
        case dict():
            return "prompt_answer", _prompt_answer(row)
        case _:
            raise RowRefused("is neither an object nor a list of messages")


def _moss(instruction: Any, turns: dict[str, Any]) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = [("system", instruction)] if instruction else []
    for _, turn in sorted(turns.items(), key=lambda item: int(item[0].rpartition("_")[2] or 0)):
        parts = {name: MOSS_MARK.sub("", str(text)) for name, text in turn.items()}
        if parts.get("Commands", "") not in MOSS_EMPTY:
            raise RowRefused("uses tools")
        found += [("user", parts.get("Human")), ("assistant", parts.get("MOSS"))]
    return found


def _alpaca(
    row: dict[str, Any], instruction: Any, given: Any, output: Any
) -> list[tuple[Any, Any]]:
    question = instruction
    if isinstance(given, str) and given.strip() and isinstance(instruction, str):
        question = f"{instruction}\n{given}" if instruction.strip() else given
    return [*turns_of_history(row.get("history")), ("user", question), ("assistant", output)]


def _prompt_answer(row: dict[str, Any]) -> list[tuple[Any, Any]]:
    prompt = next((row[key] for key in PROMPT_KEYS if key in row), None)
    answer = next((row[key] for key in ANSWER_KEYS if key in row), None)
    if prompt is None or answer is None:
        raise RowRefused("is in no known layout")
    if isinstance(prompt, list):
        return [*turns_of_list(prompt), ("assistant", answer)]
    return [*turns_of_history(row.get("history")), ("user", prompt), ("assistant", answer)]
