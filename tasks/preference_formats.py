"""Turns a row of any known layout of preference pairs into the normal form, or says why it cannot."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from storage.conversations import Message
from tasks.chat_formats import (
    RowRefused,
    message_of,
    opened,
    parse_chat,
    refuse_disorder,
    turns_of_history,
    turns_of_list,
)

CHOSEN_KEYS = ("chosen", "selected", "response_chosen")
REJECTED_KEYS = ("rejected", "response_rejected")
PROMPT_KEYS = ("prompt", "query", "question")
SCORE_KEYS = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
SEVERAL_KEYS = ("responses", "answers", "completions", "candidates", "outputs")
TEXT_KEYS = ("text", "content", "response", "answer", "value", "output")
SCORES_KEYS = ("scores", "ratings", "rewards")
RANKS_KEYS = ("ranks", "ranking", "rankings")
ONE_SCORE_KEYS = ("score", "rating", "reward", "overall_score")
RANKED_KEYS = ("ranked", "ranked_responses", "ranked_answers")
"""Lists whose name says that the best answer stands first."""
Several = Literal["best_worst", "all_pairs"]
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class PairRow:
    """A pair in the normal form, and the layout it came in."""

    layout: str
    prompt: list[Message]
    chosen: str | None
    rejected: str | None
    margin: float | None


def parse_pairs(
    row: Any, several: Several = "best_worst", *, keeps_labelled: bool = False
) -> list[PairRow]:
    """The pairs of one row: one, or as many as its ranked or scored answers give; of a single answer with a
    label, where those are kept, a pair without the other answer. Raises RowRefused with the reason."""
    if not isinstance(row, dict):
        raise RowRefused("is no object: ranked answers need their prompt" if row else "is empty")
    if row.get("tools"):
        raise RowRefused("uses tools")
    if (answers := _rated_answers(row)) is not None:
        return _pairs_among(row, answers, several)
    chosen = next((row[key] for key in CHOSEN_KEYS if key in row), None)
    rejected = next((row[key] for key in REJECTED_KEYS if key in row), None)
    if chosen is None or rejected is None:
        if isinstance(row.get("label"), bool):
            return [_labelled(row, keeps_labelled)]
        raise RowRefused("is in no known layout")
    layout, prompt, better, worse = _pair_of(row, chosen, rejected)
    prompt = opened(row, prompt)
    refuse_disorder(prompt, last="user")
    if not better.strip() or not worse.strip():
        raise RowRefused("has an empty answer")
    if better.strip() == worse.strip():
        raise RowRefused("has two equal answers")
    return [PairRow(layout, prompt, better, worse, _margin(row))]


def _labelled(row: dict[str, Any], is_kept: bool) -> PairRow:
    if not is_kept:
        raise RowRefused("has one answer with a label where two are compared")
    unjudged = {key: value for key, value in row.items() if key != "label"}
    if isinstance(row.get("completion"), list):
        unjudged["completion"] = _answer(row["completion"])
    chat = parse_chat(unjudged)
    if chat.is_trimmed:
        raise RowRefused("does not end with an answer")
    *prompt, answer = chat.messages
    both = (answer["content"], None) if row["label"] else (None, answer["content"])
    return PairRow("labelled", prompt, *both, None)


def rated_scores(row: Any) -> list[float]:
    """The scores of a row's answers, or of both answers of its pair; none where it has none."""
    if not isinstance(row, dict):
        return []
    if (answers := _rated_answers(row)) is not None:
        return [score for _, score in answers]
    found = next((keys for keys in SCORE_KEYS if all(_is_number(row.get(k)) for k in keys)), ())
    return [float(row[key]) for key in found]


def _rated_answers(row: dict[str, Any]) -> list[tuple[str, float]] | None:
    """Several answers and how good each is, the larger the better; None for a row of another layout.

    Raises RowRefused where nothing says which is better.
    """
    ranked = next((row[key] for key in RANKED_KEYS if isinstance(row.get(key), list)), None)
    if ranked is not None:
        return [(_text(item), -float(place)) for place, item in enumerate(ranked)]
    items = next((row[key] for key in SEVERAL_KEYS if isinstance(row.get(key), list)), None)
    if items is None:
        return None
    scores = _listed(row, SCORES_KEYS, items, ONE_SCORE_KEYS)
    if scores is None and (ranks := _listed(row, RANKS_KEYS, items, ("rank",))):
        scores = [-rank for rank in ranks]
    if scores is None:
        raise RowRefused("has several answers and nothing that says which is better")
    return [(_text(item), score) for item, score in zip(items, scores, strict=True)]


def _listed(
    row: dict[str, Any], lists: tuple[str, ...], items: list[Any], fields: tuple[str, ...]
) -> list[float] | None:
    """A number of each item, from a list beside them or from a field of each."""
    beside = next((row[key] for key in lists if isinstance(row.get(key), list)), None)
    if beside is None and all(isinstance(item, dict) for item in items):
        name = next((key for key in fields if all(key in item for item in items)), None)
        beside = None if name is None else [item[name] for item in items]
    if beside is None or len(beside) != len(items) or not all(map(_is_number, beside)):
        return None
    return [float(value) for value in beside]


def _pairs_among(
    row: dict[str, Any], answers: list[tuple[str, float]], several: Several
) -> list[PairRow]:
    prompt = opened(row, _prompt_of(row))
    refuse_disorder(prompt, last="user")
    told = [(text, score) for text, score in answers if text.strip()]
    told.sort(key=lambda answer: -answer[1])
    chosen = (
        combinations(told, 2) if several == "all_pairs" else [(told[0], told[-1])] if told else []
    )
    pairs = [
        PairRow("several_answers", prompt, better, worse, above - below)
        for (better, above), (worse, below) in chosen
        if above > below and better.strip() != worse.strip()
    ]
    if not pairs:
        raise RowRefused("has no two answers of which one is better")
    return pairs


def _prompt_of(row: dict[str, Any]) -> list[Message]:
    items = row.get("conversations") or row.get("messages")
    question = next((row[key] for key in (*PROMPT_KEYS, "instruction") if key in row), items)
    if isinstance(question, list):
        return _messages(turns_of_list(question))
    if isinstance(question, str):
        return _asked(row, question)
    raise RowRefused("has answers without a prompt")


def _text(item: Any) -> str:
    value = item
    if isinstance(item, dict):
        value = next((item[key] for key in TEXT_KEYS if key in item), None)
    if not isinstance(value, str):
        raise RowRefused("has an answer that is not text")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
    return _messages([*turns, ("user", question)])


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
