"""Turns a row of any known layout of preference pairs into the normal form, or says why it cannot."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.conversations import Message
from tasks.chat_formats import (
    RowRefused,
    message_of,
    refuse_disorder,
    turns_of_history,
    turns_of_list,
)

CHOSEN_KEYS = ("chosen", "selected", "response_chosen")
REJECTED_KEYS = ("rejected", "response_rejected")
PROMPT_KEYS = ("prompt", "query", "question")
SCORE_KEYS = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class PairRow:
    """A pair in the normal form, and the layout it came in."""

    layout: str
    prompt: list[Message]
    chosen: str
    rejected: str
    margin: float | None


def parse_pair(row: Any) -> PairRow:
    """The pair of one row. Raises RowRefused with the reason."""
    if not isinstance(row, dict):
        raise RowRefused("is not an object")
    if row.get("tools"):
        raise RowRefused("uses tools")
    chosen = next((row[key] for key in CHOSEN_KEYS if key in row), None)
    rejected = next((row[key] for key in REJECTED_KEYS if key in row), None)
    if chosen is None or rejected is None:
        raise RowRefused("is in no known layout")
    layout, prompt, better, worse = _pair_of(row, chosen, rejected)
    refuse_disorder(prompt, last="user")
    if not better.strip() or not worse.strip():
        raise RowRefused("has an empty answer")
    if better.strip() == worse.strip():
        raise RowRefused("has two equal answers")
    return PairRow(layout, prompt, better, worse, _margin(row))


def _pair_of(
    row: dict[str, Any], chosen: Any, rejected: Any
) -> tuple[str, list[Message], str, str]:
    items = row.get("conversations") or row.get("messages_prompt")
    if isinstance(items, list):
        prompt = _messages(turns_of_list(items))
        return "sharegpt", prompt, _answer(chosen), _answer(rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return ("messages", *_dialogues(row, _messages(turns_of_list(chosen)), rejected))
    question = next((row[key] for key in PROMPT_KEYS if key in row), None)
    if isinstance(question, list):
        prompt = _messages(turns_of_list(question))
        return "prompt_messages", prompt, _answer(chosen), _answer(rejected)
    if isinstance(question, str):
        prompt = _asked(row, question)
        return "prompt_text", prompt, _answer(chosen), _answer(rejected)
    if isinstance(chosen, str) and isinstance(rejected, str) and HH_TURN.match(chosen):
        better, worse = _hh(chosen), _hh(rejected)
        return ("transcript", *_split_last(better, worse))
    raise RowRefused("is in no known layout")


def _asked(row: dict[str, Any], question: str) -> list[Message]:
    history = row.get("history")
    is_messages = isinstance(history, list) and bool(history) and isinstance(history[0], dict)
    turns = turns_of_list(history) if is_messages else turns_of_history(history)  # pyright: ignore[reportArgumentType]
    system = row.get("system")
    opening = [("system", system)] if isinstance(system, str) and system.strip() else []
    return _messages([*opening, *turns, ("user", question)])


def _dialogues(
    row: dict[str, Any], chosen: list[Message], rejected: list[Any]
) -> tuple[list[Message], str, str]:
    worse = _messages(turns_of_list(rejected))
    prompt, better_text, worse_text = _split_last(chosen, worse)
    given = row.get("prompt")
    if not prompt:  # the lists hold the answers alone
        if isinstance(given, list):
            prompt = _messages(turns_of_list(given))
        elif isinstance(given, str):
            prompt = _asked(row, given)
    return prompt, better_text, worse_text


def _split_last(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], str, str]:
    if not chosen or not rejected or chosen[:-1] != rejected[:-1]:
        raise RowRefused("answers two different prompts")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise RowRefused("does not end with an answer")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _hh(text: str) -> list[Message]:
    pieces = HH_TURN.split(text)[1:]
    return [
        message_of("user" if who == "Human" else "assistant", said.strip())
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _answer(value: Any) -> str:
    match value:
        case str():
            return value
        case Mapping():
            turns = turns_of_list([value])
        case list():
            turns = turns_of_list(value)
        case _:
            raise RowRefused("has an answer that is not text")
    messages = _messages(turns)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RowRefused("has an answer that is not one turn of the assistant")
    return messages[0]["content"]


def _messages(turns: list[tuple[Any, Any]]) -> list[Message]:
    return [message_of(role, content) for role, content in turns]


def _margin(row: dict[str, Any]) -> float | None:
    if isinstance(row.get("margin"), int | float):
        return float(row["margin"])
    for better, worse in SCORE_KEYS:
        if isinstance(row.get(better), int | float) and isinstance(row.get(worse), int | float):
            return float(row[better]) - float(row[worse])
    return None
