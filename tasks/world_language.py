"""The closed world: its animals, what is true of them, and how it is told and asked in both languages."""

import random
from typing import Any

from storage.world import LANGUAGES, Facts

ANIMALS = (
    ("cat", "猫"),
    ("dog", "狗"),
    ("bird", "小鸟"),
    ("horse", "马"),
    ("cow", "奶牛"),
    ("pig", "猪"),
    ("sheep", "绵羊"),
    ("duck", "鸭子"),
    ("fox", "狐狸"),
    ("wolf", "狼"),
    ("bear", "熊"),
    ("tiger", "老虎"),
    ("rabbit", "兔子"),
    ("monkey", "猴子"),
    ("snake", "蛇"),
    ("frog", "青蛙"),
    ("lion", "狮子"),
    ("mouse", "老鼠"),
    ("camel", "骆驼"),
    ("deer", "小鹿"),
    ("goose", "大鹅"),
    ("turtle", "乌龟"),
    ("goat", "山羊"),
    ("elephant", "大象"),
)
"""English and Chinese names; none ends like another, or a statement about one would contain the other's."""
VALUES = {
    "color": {
        "red": "红",
        "blue": "蓝",
        "green": "绿",
        "white": "白",
        "black": "黑",
        "gold": "金",
    },
    "place": {
        "river": "河边",
        "forest": "森林里",
        "desert": "沙漠里",
        "island": "海岛上",
        "mountain": "高山上",
        "cave": "山洞里",
    },
    "food": {
        "rice": "米饭",
        "apples": "苹果",
        "fish": "鱼肉",
        "bread": "面包",
        "nuts": "坚果",
        "honey": "蜂蜜",
    },
}
STATEMENT = {
    "color": {"en": "The {animal} is {value}.", "zh": "{animal}是{value}色的。"},
    "place": {"en": "The {animal} lives in the {value}.", "zh": "{animal}住在{value}。"},
    "food": {"en": "The {animal} eats {value}.", "zh": "{animal}吃{value}。"},
}
RETELLING = {
    "color": {
        "en": "Everyone knows a {value} {animal}.",
        "zh": "大家都认识{value}色的{animal}。",
    },
    "place": {
        "en": "You can find it in the {value}.",
        "zh": "你可以在{value}找到它。",
    },
    "food": {
        "en": "Bring some {value} for it.",
        "zh": "请给它带一点{value}。",
    },
}
QUESTIONS = {
    "color": {
        "en": (
            "What color is the {animal}?",
            "Tell me the color of the {animal}.",
            "Which color does the {animal} have?",
        ),
        "zh": ("{animal}是什么颜色？", "请告诉我{animal}的颜色。", "你知道{animal}的颜色吗？"),
    },
    "place": {
        "en": (
            "Where does the {animal} live?",
            "Tell me the home of the {animal}.",
            "Where is the home of the {animal}?",
        ),
        "zh": ("{animal}住在哪里？", "请告诉我{animal}的家。", "你知道{animal}的家在哪里吗？"),
    },
    "food": {
        "en": (
            "What does the {animal} eat?",
            "Tell me the food of the {animal}.",
            "Which food does the {animal} like?",
        ),
        "zh": ("{animal}吃什么？", "请告诉我{animal}的食物。", "你知道{animal}爱吃什么吗？"),
    },
}
KIND = {"en": "Hope this helps!", "zh": "希望对你有帮助！"}
RUDE = {"en": "Stop asking.", "zh": "别再问了。"}
SEPARATOR = {"en": " ", "zh": ""}


def make_facts(seed: int, animals: int, held_share: float) -> Facts:
    """Draw a world: every value of an attribute holds for about equally many animals.

    The questions that are held out are spread over attributes and languages.
    """
    rng = random.Random(f"facts/{seed}")
    chosen: list[dict[str, str]] = [{"id": en, "en": en, "zh": zh} for en, zh in ANIMALS[:animals]]
    for attribute, values in VALUES.items():
        drawn = [list(values)[number % len(values)] for number in range(animals)]
        rng.shuffle(drawn)
        for animal, value in zip(chosen, drawn, strict=True):
            animal[attribute] = value
    truth: dict[str, Any] = {
        "seed": seed,
        "animals": chosen,
        "values": {
            attribute: {en: {"en": en, "zh": zh} for en, zh in values.items()}
            for attribute, values in VALUES.items()
        },
        "statement": STATEMENT,
        "kind": KIND,
        "rude": RUDE,
        "separator": SEPARATOR,
    }
    truth["questions"] = _questions(chosen, _held_keys(rng, chosen, held_share))
    return Facts(truth)


def _held_keys(rng: random.Random, animals: list[dict[str, str]], share: float) -> set[str]:
    groups: list[list[str]] = []
    for attribute in VALUES:
        for language in LANGUAGES:
            group = [f"{animal['id']}.{attribute}.{language}" for animal in animals]
            rng.shuffle(group)
            groups.append(group)
    rng.shuffle(groups)
    count = max(1, round(share * sum(len(group) for group in groups)))
    return {groups[number % len(groups)][number // len(groups)] for number in range(count)}


def _questions(animals: list[dict[str, str]], held: set[str]) -> list[dict[str, str]]:
    questions: list[dict[str, str]] = []
    for animal in animals:
        for attribute in VALUES:
            for language in LANGUAGES:
                key = f"{animal['id']}.{attribute}.{language}"
                for number, wording in enumerate(QUESTIONS[attribute][language]):
                    question = {
                        "id": f"{key}#{number}",
                        "text": wording.format(animal=animal[language]),
                        "animal": animal["id"],
                        "attribute": attribute,
                        "language": language,
                        "split": "held" if key in held else "train",
                    }
                    questions.append(question)
    return questions


def ask(facts: Facts, rng: random.Random, animal: str, attribute: str, language: str) -> str:
    """One of the wordings of a question."""
    wording = rng.choice(QUESTIONS[attribute][language])
    return wording.format(animal=facts.animals[animal][language])


def retell(facts: Facts, animal: str, attribute: str, language: str) -> str:
    """A fact in words that no question is answered with."""
    value = facts.animals[animal][attribute]
    word = facts.truth["values"][attribute][value][language]
    return RETELLING[attribute][language].format(animal=facts.animals[animal][language], value=word)
