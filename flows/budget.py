"""How large a model, how much data, how long: the arithmetic of compute, forward and inverse.

C FLOPs train N parameters on D tokens: C = 6 N D (Kaplan et al. 2020, section 2.1).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from conf.mistakes import Mistake, RecipeError, suggest

FLOPS_PER_PARAMETER = 6
TOKENS_PER_PARAMETER = 20
"""At the least loss for a given compute (Hoffmann et al. 2022, table 3)."""
GROWTH = {"Chinchilla": (3.16, 3.16), "Kaplan": (5.32, 1.86)}
"""Rule -> factors of parameters and tokens for ten times the compute (Hoffmann et al. 2022, table 2:
both by the square root; Kaplan et al. 2020, section 6: mostly parameters)."""
LOSS = {"floor": 1.69, "a": 406.4, "alpha": 0.34, "b": 410.7, "beta": 0.28}
"""L = floor + a / N^alpha + b / D^beta, nats per token (Hoffmann et al. 2022, equation 10)."""
USUAL_MFU = 0.4
DAY_SECONDS = 86_400
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
ASKED = {
    "parameters": "of the model",
    "tokens": "to train on",
    "flops": "compute in all",
    "accelerators": "number of devices",
    "days": "of training",
    "peak": "FLOP/s of one device (H100 bf16: 989T)",
    "mfu": f"share of the peak that training reaches; {USUAL_MFU} where it is not told",
    "loss": "measured at `parameters` and `tokens`, nats per token",
    "at_parameters": "another size, whose loss is asked for",
    "at_tokens": "tokens of that other size; those of the first where it is not told",
}
"""What a question may give."""


@dataclass(frozen=True)
class Answer:
    """One line of an answer: what, how much, and by which rule."""

    what: str
    value: float
    unit: str
    rule: str


def read_question(words: Iterable[str]) -> dict[str, float]:
    """`parameters=160M days=7` as numbers. Raises RecipeError that names each slip."""
    found: dict[str, float] = {}
    mistakes: list[Mistake] = []
    for word in words:
        key, _, text = word.partition("=")
        number = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kmbgt]?)", text.lower())
        if key not in ASKED:
            mistakes.append(Mistake(word, "is nothing that a budget knows", suggest(key, ASKED)))
        elif number is None or number[1].count(".") > 1 or not float(number[1]) > 0:
            mend = "write a number above 0, such as 160M, 1.1B or 3e21"
            mistakes.append(Mistake(word, f"{text!r} is no amount", mend))
        else:
            found[key] = float(number[1]) * UNITS[number[2]]
    if mistakes:
        raise RecipeError(mistakes)
    return found


def answer(question: Mapping[str, float]) -> list[Answer]:
    """All that follows from what is given. Raises ValueError where nothing does."""
    compute = _compute(question)
    parameters, tokens = question.get("parameters", 0.0), question.get("tokens", 0.0)
    if "loss" in question or "at_parameters" in question:
        return _other_loss(question)
    if parameters and tokens:
        lines = _of_run(parameters, tokens)
    elif parameters:
        lines = _data_for(parameters, compute)
    elif tokens:
        lines = _model_for(tokens, compute)
    elif compute:
        lines = best_for(compute)
    else:
        raise ValueError(
            "a budget needs something to go by: parameters=160M, tokens=3B, flops=1e19, or "
            "accelerators=8 days=7 peak=989T"
        )
    by_name = {line.what: line.value for line in lines}
    return [
        *lines,
        *_time(by_name["compute"], question),
        *growth(by_name["parameters"], by_name["tokens"]),
    ]


def _compute(question: Mapping[str, float]) -> float:
    """FLOPs that the devices do in that time, or that are given; 0 where neither is told."""
    missing = [name for name in ("accelerators", "peak") if name not in question]
    if "flops" in question:
        return question["flops"]
    if "days" not in question:
        return 0.0
    if missing:
        raise ValueError(
            f"days={question['days']:g} needs {', '.join(missing)} as well, such as accelerators=8 "
            f"peak=989T"
        )
    rate = question["accelerators"] * question["peak"] * question.get("mfu", USUAL_MFU)
    return rate * question["days"] * DAY_SECONDS


def best_for(flops: float) -> list[Answer]:
    """The model and data that so many FLOPs train best: N = sqrt(C / (6 x 20)), D = 20 N."""
    parameters = math.sqrt(flops / (FLOPS_PER_PARAMETER * TOKENS_PER_PARAMETER))
    return _of_run(parameters, TOKENS_PER_PARAMETER * parameters)


def _data_for(parameters: float, compute: float) -> list[Answer]:
    if compute:
        return _of_run(parameters, compute / (FLOPS_PER_PARAMETER * parameters))
    return _of_run(parameters, TOKENS_PER_PARAMETER * parameters)


def _model_for(tokens: float, compute: float) -> list[Answer]:
    if compute:
        return _of_run(compute / (FLOPS_PER_PARAMETER * tokens), tokens)
    return _of_run(tokens / TOKENS_PER_PARAMETER, tokens)


def _of_run(parameters: float, tokens: float) -> list[Answer]:
    ratio = tokens / parameters
    balance = f"{TOKENS_PER_PARAMETER} is the balance (Hoffmann et al. 2022)"
    return [
        Answer("parameters", parameters, "", ""),
        Answer("tokens", tokens, "", ""),
        Answer("tokens a parameter", ratio, "", balance),
        Answer("compute", FLOPS_PER_PARAMETER * parameters * tokens, "FLOPs", "6 N D"),
        Answer(
            "loss", loss(parameters, tokens), "nats a token",
            "Hoffmann et al. 2022, equation 10; for their text and vocabulary",
        ),
    ]  # fmt: skip


def _time(flops: float, question: Mapping[str, float]) -> list[Answer]:
    if "peak" not in question or "days" in question:
        return []
    count, share = question.get("accelerators", 1.0), question.get("mfu", USUAL_MFU)
    rule = f"{count:g} devices at {share:.0%} of {question['peak']:.3g} FLOP/s"
    return [Answer("time", flops / (count * question["peak"] * share) / DAY_SECONDS, "days", rule)]


def growth(parameters: float, tokens: float) -> list[Answer]:
    """What ten times the compute of a run is spent on, by both rules."""
    return [
        line
        for rule, (more_parameters, more_tokens) in GROWTH.items()
        for line in (
            Answer(
                "parameters at 10 x compute", parameters * more_parameters, "",
                f"x {more_parameters} ({rule})",
            ),
            Answer("tokens at 10 x compute", tokens * more_tokens, "", f"x {more_tokens} ({rule})"),
        )
    ]  # fmt: skip


def loss(parameters: float, tokens: float) -> float:
    """Nats per token of a model so large after so many tokens."""
    return LOSS["floor"] + _above_floor(parameters, tokens)


def _above_floor(parameters: float, tokens: float) -> float:
    return LOSS["a"] / parameters ** LOSS["alpha"] + LOSS["b"] / tokens ** LOSS["beta"]


def _other_loss(question: Mapping[str, float]) -> list[Answer]:
    """The loss at another size, from one that was measured: both differ as the law says they do."""
    missing = [
        name for name in ("parameters", "tokens", "loss", "at_parameters") if name not in question
    ]
    if missing:
        raise ValueError(
            f"the loss at another size needs {', '.join(missing)} as well: parameters=20M tokens=400M "
            f"loss=3.9 at_parameters=160M at_tokens=3.2B"
        )
    there = (question["at_parameters"], question.get("at_tokens", question["tokens"]))
    here = (question["parameters"], question["tokens"])
    change = _above_floor(*there) - _above_floor(*here)
    rule = "measured loss and the difference by Hoffmann et al. 2022, equation 10"
    return [
        Answer("parameters", there[0], "", ""),
        Answer("tokens", there[1], "", ""),
        Answer("change of the loss", change, "nats a token", rule),
        Answer("loss", question["loss"] + change, "nats a token", rule),
    ]
