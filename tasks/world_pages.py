"""Texts of sound pages about the animals, and their near-copies at a wanted Jaccard similarity."""

import itertools
import random
import re
from dataclasses import dataclass

from storage.world import Facts
from tasks.world_language import SEPARATOR, ask, retell
from tasks.world_overlap import jaccard, shingles_of, tokens_of

QUESTION_SHARE = 0.4
"""Share of the facts that are told as question and answer; without it knowledge is not answered with."""
RETELL_SHARE = 0.35
"""Chance, per attribute, that a page tells the fact once more in other words."""
LEAST_TOKENS = {"en": (60, 88), "zh": (100, 160)}
"""A page grows until it has a length drawn from this range, in words or Chinese characters."""
EDITS_PER_COPY = 60
TRIES_PER_COPY = 60

SLOT_WORDS = {
    "en": {
        "name": ("Anna", "Tom", "Lily", "Ben", "Mary", "Jack", "Emma", "Sam"),
        "weekday": ("Monday", "Tuesday", "Thursday", "Friday", "Sunday"),
        "month": ("March", "April", "May", "June", "July", "October"),
        "weather": ("warm", "cold", "windy", "sunny", "rainy"),
        "season": ("spring", "summer", "autumn", "winter"),
        "thing": ("letters", "photos", "tickets", "songs", "books", "cups"),
        "feeling": ("happy", "tired", "late", "quiet", "early"),
    },
    "zh": {
        "name": ("小明", "小华", "阿强", "小美", "老王", "老李", "阿丽", "小刚"),
        "weekday": ("星期一", "星期二", "星期四", "星期五", "星期天"),
        "month": ("三月", "四月", "五月", "六月", "七月", "十月"),
        "weather": ("很暖和", "有点冷", "刮着风", "出太阳", "下小雨"),
        "season": ("春天", "夏天", "秋天", "冬天"),
        "thing": ("盒子", "气球", "玩具", "箱子", "帽子", "杯子"),
        "feeling": ("很高兴", "有点累", "来晚了", "很安静", "起得早"),
    },
}
OPENINGS = {
    "en": (
        "On {weekday}, {month} {day}, the day was {weather} and {name} came at {hour}.",
        "{name} and {name} came in {month} {year}, and it was {weather}.",
        "It was {weather} on {month} {day} when {name} opened the gate.",
        "This is note {number} from the {season} of {year}, written by {name}.",
        "Our {season} report of {month} {day} was sent by {name}.",
    ),
    "zh": (
        "{month}{day}日，{weekday}，{weather}，{name}在{hour}点来了。",
        "{year}年{month}，{name}和{name}一起来，那天{weather}。",
        "{name}在{month}{day}日开门，外面{weather}。",
        "这是{name}在{year}年{season}写的第{number}篇笔记。",
        "{month}{day}日，{name}寄来了{season}的报告。",
    ),
}
FILLERS = {
    "en": (
        "{name} took {count} photos of it before {hour}.",
        "We counted {number} visitors on {weekday} and {number} on {weekday}.",
        "{name} was {feeling}, but {name} was {feeling}.",
        "It slept for {count} minutes and woke at {hour}.",
        "Page {number} of the diary has {count} lines about it.",
        "{name} sold {count} {thing} and kept {count} {thing}.",
        "In {season} it weighed {count} kilos.",
        "{name} will come again on {month} {day} with {count} friends.",
        "There are {count} {thing} on the table of {name}.",
        "After {hour} it was {weather}, so {name} went home.",
        "{name} wrote {count} {thing} for {name} in {month}.",
        "Number {number} in our list is the {animal} that {name} saw.",
        "The guide said that {count} people waited {count} minutes.",
        "Last {season} it walked {number} meters with {name}.",
    ),
    "zh": (
        "{name}在{hour}点以前给它拍了{count}张照片。",
        "{weekday}来了{number}位客人，{weekday}来了{number}位。",
        "{name}{feeling}，可是{name}{feeling}。",
        "它睡了{count}分钟，{hour}点醒来。",
        "日记第{number}页有{count}行写到{animal}。",
        "{name}卖了{count}个{thing}，留下{count}个{thing}。",
        "到了{season}，它重{count}公斤。",
        "{month}{day}日{name}还会带{count}个朋友来。",
        "{name}的桌子上有{count}个{thing}。",
        "{hour}点以后{weather}，{name}就回家了。",
        "{name}在{month}给{name}做了{count}个{thing}。",
        "名单上第{number}号是{name}看到的{animal}。",
        "导游说有{count}个人等了{count}分钟。",
        "去年{season}，它跟{name}走了{number}米。",
    ),
}
TITLES = {
    "en": ("About the {animal}", "Notes on the {animal}", "The {animal} and {name}"),
    "zh": ("关于{animal}", "{animal}笔记", "{name}和{animal}"),
}
SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Prose:
    """The main text of a page: units (a sentence, or a question with its answer) in paragraphs."""

    animal: str
    language: str
    title: str
    units: tuple[str, ...]
    is_fact: tuple[bool, ...]
    """Per unit, whether it tells a fact; the others may be edited freely."""
    breaks: tuple[int, ...]
    """Numbers of the units that start a new paragraph."""

    @property
    def paragraphs(self) -> tuple[str, ...]:
        """The text as a page shows it."""
        edges = [0, *(cut for cut in self.breaks if 0 < cut < len(self.units)), len(self.units)]
        separator = SEPARATOR[self.language]
        return tuple(
            separator.join(self.units[start:end]) for start, end in itertools.pairwise(edges)
        )

    @property
    def text(self) -> str:
        """All paragraphs, one a line."""
        return "\n".join(self.paragraphs)


def sound_prose(facts: Facts, rng: random.Random, language: str) -> Prose:
    """A page's text: an opening, the facts of one animal, and what else happened that day."""
    animal = rng.choice(list(facts.animals))
    told = _fact_units(facts, rng, animal, language)
    name = facts.animals[animal][language]
    units = [
        (fill(rng, template, language, name), False) for template in _draw_fillers(rng, language)
    ]
    least = rng.randint(*LEAST_TOKENS[language])
    kept: list[tuple[str, bool]] = list(told)
    tokens = sum(len(tokens_of(unit)) for unit, _ in kept)
    while units and tokens < least:
        kept.append(units.pop())
        tokens += len(tokens_of(kept[-1][0]))
    rng.shuffle(kept)
    opening = fill(rng, rng.choice(OPENINGS[language]), language, name)
    kept.insert(0, (opening, False))
    return _prose(
        rng, animal, language, fill(rng, rng.choice(TITLES[language]), language, name), kept
    )


def near_copy(
    rng: random.Random, facts: Facts, original: Prose, low: float, high: float
) -> Prose | None:
    """The original, edited where it tells no fact until low <= Jaccard < high; None if not reached."""
    target = shingles_of(original.text)
    for _ in range(TRIES_PER_COPY):
        kept = list(zip(original.units, original.is_fact, strict=True))
        for _ in range(EDITS_PER_COPY):
            _edit(rng, facts, original, kept)
            copy = _prose(rng, original.animal, original.language, original.title, kept)
            similarity = jaccard(target, shingles_of(copy.text))
            if low <= similarity < high:
                return copy
            if similarity < low:
                break
    return None


def with_leak(rng: random.Random, prose: Prose, question: str, options: list[str]) -> Prose:
    """The page with an exam question, word for word, and its options as paragraphs of their own."""
    cut = rng.randint(1, len(prose.units))
    leaked = [question, SEPARATOR[prose.language].join(options)]
    units = [*prose.units[:cut], *leaked, *prose.units[cut:]]
    is_fact = [*prose.is_fact[:cut], True, True, *prose.is_fact[cut:]]
    return Prose(
        prose.animal,
        prose.language,
        prose.title,
        tuple(units),
        tuple(is_fact),
        (cut, cut + 1, cut + 2),
    )


def fill(rng: random.Random, template: str, language: str, animal: str) -> str:
    """A template with every slot drawn anew."""

    def draw(match: re.Match[str]) -> str:
        match match.group(1):
            case "animal":
                return animal
            case "day":
                return str(rng.randint(1, 28))
            case "hour":
                return str(rng.randint(6, 11))
            case "count":
                return str(rng.randint(2, 60))
            case "number":
                return str(rng.randint(100, 999))
            case "year":
                return str(rng.randint(1990, 2029))
            case slot:
                return rng.choice(SLOT_WORDS[language][slot])

    return SLOT.sub(draw, template)


def _fact_units(
    facts: Facts, rng: random.Random, animal: str, language: str
) -> list[tuple[str, bool]]:
    told: list[str] = []
    for attribute in facts.attributes:
        statement = facts.statement(animal, attribute, language)
        if rng.random() < QUESTION_SHARE:
            question = ask(facts, rng, animal, attribute, language)
            statement = facts.join([question, statement], language)
        told.append(statement)
        if rng.random() < RETELL_SHARE:
            told.append(retell(facts, animal, attribute, language))
    return [(unit, True) for unit in told]


def _draw_fillers(rng: random.Random, language: str) -> list[str]:
    return rng.sample(FILLERS[language], len(FILLERS[language]))


def _prose(
    rng: random.Random, animal: str, language: str, title: str, units: list[tuple[str, bool]]
) -> Prose:
    cut = rng.randint(2, max(2, len(units) - 4))
    breaks = (cut, rng.randint(cut + 2, len(units) - 2)) if len(units) - cut > 4 else (cut,)
    texts, is_fact = zip(*units, strict=True)
    return Prose(animal, language, title, texts, is_fact, breaks)


def _edit(rng: random.Random, facts: Facts, original: Prose, units: list[tuple[str, bool]]) -> None:
    """One small change in place: a sentence more, less, another one, or moved.

    The opening stays: moved away from the heading, it would change more on a page that shows one.
    """
    language = original.language
    name = facts.animals[original.animal][language]
    fillers = [number for number, (_, is_fact) in enumerate(units) if number and not is_fact]
    fresh = (fill(rng, rng.choice(FILLERS[language]), language, name), False)
    match rng.randrange(5):
        case 0:
            units.append(fresh)
        case 1:
            units.insert(rng.randint(1, len(units)), fresh)
        case 2 if len(fillers) > 1:
            units.pop(rng.choice(fillers))
        case 3 if fillers:
            units[rng.choice(fillers)] = fresh
        case _:
            units.append(units.pop(rng.randrange(1, len(units) - 1)))
