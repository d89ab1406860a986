"""What people of the demo world answer: demonstrations of mixed quality, pairs ranked by truth, exams."""

import random
from collections.abc import Iterator
from typing import Any

from storage.world import LANGUAGES, Facts, Question
from tasks.world_language import KIND, RUDE

RIGHT_SHARE = 0.92
ASKED_LANGUAGE_SHARE = 0.8
KIND_SHARE = 0.35
RUDE_SHARE = 0.15
SUPERFLUOUS_SHARE = 0.3
"""How a demonstration comes out; each is drawn by itself. What is not right is drawn among all values."""
CORRUPTED_SHARE = 0.2
"""Share of the answers in pairs that show a fault which demonstrations do not have."""
DEV_QUESTIONS = 5
"""Questions per exam subject that are given as examples."""
OPTION_LETTERS = "ABCD"

EXAM_QUESTIONS = {
    "color": {
        "en": "A visitor reads the sign beside the gate and then wonders about the color of the "
        "{animal}; which one of these statements agrees with the sign?",
        "zh": "一位游客读完门口的牌子以后想知道{animal}的颜色，下面哪一句话说得对？",
    },
    "place": {
        "en": "A pupil draws a map for the school and has to mark the home of the {animal}; which "
        "one of these statements should be written on the map?",
        "zh": "一个学生给学校画地图的时候要标出{animal}的家，下面哪一句话应该写在图上？",
    },
    "food": {
        "en": "A cook prepares the dishes for tomorrow and must not forget the meal of the "
        "{animal}; which one of these statements helps the cook?",
        "zh": "厨师准备明天的饭菜时不能忘记{animal}的那一份，下面哪一句话能帮到厨师？",
    },
}


def respond(
    facts: Facts, rng: random.Random, question: Question, *, tells_held: bool = True
) -> str:
    """An answer as people give it: mostly right, not always kind, sometimes in the other language.

    A superfluous fact may be a held-out one, unless `tells_held` is false: what pairs only ever show
    as a fault, a reward model would take for one.
    """
    language = question.language
    if rng.random() >= ASKED_LANGUAGE_SHARE:
        language = _other(language)
    value = None
    if rng.random() >= RIGHT_SHARE:
        value = rng.choice(facts.values(question.attribute))
    sentences = [facts.statement(question.animal, question.attribute, language, value)]
    if rng.random() < SUPERFLUOUS_SHARE:
        sentences += _another_fact(facts, rng, question, language, tells_held)
    manner = rng.random()
    if manner < KIND_SHARE:
        sentences.append(KIND[language])
    elif manner < KIND_SHARE + RUDE_SHARE:
        sentences.append(RUDE[language])
    return facts.join(sentences, language)


def best_answer(facts: Facts, question: Question) -> str:
    """The answer with the greatest true reward."""
    statement = facts.statement(question.animal, question.attribute, question.language)
    return facts.join([statement, KIND[question.language]], question.language)


def conversation(question: Question, answer: str, number: int) -> dict[str, Any]:
    """A conversation in the normal form; its id starts with the question's key."""
    return {
        "id": f"{question.key}#{number}",
        "messages": [
            {"role": "user", "content": question.text},
            {"role": "assistant", "content": answer},
        ],
        "domain": "animals",
        "source": "world",
        "language": question.language,
    }


def demonstrations(facts: Facts, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Conversations of mixed quality about the questions that may be trained on."""
    rng = random.Random(f"chats/{seed}")
    questions = facts.questions("train")
    for number in range(count):
        question = rng.choice(questions)
        yield conversation(question, respond(facts, rng, question), number)


def pairs(
    facts: Facts, seed: int, split: str, count: int, min_margin: float
) -> Iterator[dict[str, Any]]:
    """Two answers to a question, the better one chosen, at least `min_margin` apart in true reward."""
    rng = random.Random(f"pairs/{split}/{seed}")
    questions = facts.questions("train" if split == "train" else "held")
    number = 0
    while number < count:
        question = rng.choice(questions)
        scored = [_judged(facts, rng, question) for _ in range(2)]
        (low, worse), (high, better) = sorted(scored)
        if high - low < min_margin or better == worse:
            continue
        yield {
            "id": f"{question.key}#{number}",
            "prompt": [{"role": "user", "content": question.text}],
            "chosen": better,
            "rejected": worse,
            "margin": high - low,
            "domain": "animals",
        }
        number += 1


def _judged(facts: Facts, rng: random.Random, question: Question) -> tuple[float, str]:
    answer, ended = respond(facts, rng, question, tells_held=False), True
    if rng.random() < CORRUPTED_SHARE:
        answer, ended = _corrupted(facts, rng, question, answer)
    return facts.judge(question.id, answer, ended=ended).reward, answer


def _corrupted(
    facts: Facts, rng: random.Random, question: Question, answer: str
) -> tuple[str, bool]:
    """A fault of a policy: cut short, repeating itself, evading, or mixing the languages."""
    statement = facts.statement(question.animal, question.attribute, question.language)
    match rng.randrange(5):
        case 0:
            # Cut inside a sentence: what ends with one looks ended.
            return answer[: rng.randrange(1, len(answer))].rstrip(" .!?。！？"), False
        case 1:
            return facts.join([answer] * rng.randrange(2, 4), question.language), True
        case 2:
            return facts.join([question.text] * rng.randrange(1, 3), question.language), True
        case 3:
            return _of_another_animal(facts, rng, question), True
        case _:
            phrase = rng.choice((KIND, RUDE))[_other(question.language)]
            return facts.join([statement, phrase], question.language), True


def _another_fact(
    facts: Facts, rng: random.Random, question: Question, language: str, tells_held: bool
) -> list[str]:
    """One more fact of the animal, if there is one that may be told."""
    told = [
        attribute
        for attribute in facts.attributes
        if attribute != question.attribute
        and (tells_held or f"{question.animal}.{attribute}.{language}" not in facts.held_keys)
    ]
    if not told:
        return []
    return [facts.statement(question.animal, rng.choice(told), language)]


def _of_another_animal(facts: Facts, rng: random.Random, question: Question) -> str:
    """A true statement about another animal, of those that are not held out."""
    animals = [
        animal
        for animal in facts.animals
        if animal != question.animal
        and f"{animal}.{question.attribute}.{question.language}" not in facts.held_keys
    ]
    return facts.statement(rng.choice(animals), question.attribute, question.language)


def _other(language: str) -> str:
    return LANGUAGES[1 - LANGUAGES.index(language)]


def exam(facts: Facts, seed: int) -> dict[tuple[str, str], list[dict[str, str]]]:
    """Rows by (subject, split), as C-Eval has them; options are whole statements.

    Every fact is asked once per language; the few of `dev` are not in `val`.
    """
    rows: dict[tuple[str, str], list[dict[str, str]]] = {}
    for language in LANGUAGES:
        rng = random.Random(f"exam/{language}/{seed}")
        asked = [(animal, attribute) for animal in facts.animals for attribute in facts.attributes]
        rng.shuffle(asked)
        for number, (animal, attribute) in enumerate(asked):
            split = "dev" if number < DEV_QUESTIONS else "val"
            column = rows.setdefault((f"animals_{language}", split), [])
            row = _exam_row(facts, rng, animal, attribute, language)
            if split == "dev":
                row["explanation"] = facts.statement(animal, attribute, language)
            column.append({"id": str(len(column)), **row})
    return rows


def _exam_row(
    facts: Facts, rng: random.Random, animal: str, attribute: str, language: str
) -> dict[str, str]:
    right = facts.animals[animal][attribute]
    wrong = [value for value in facts.values(attribute) if value != right]
    options = [right, *rng.sample(wrong, len(OPTION_LETTERS) - 1)]
    rng.shuffle(options)
    wording = EXAM_QUESTIONS[attribute][language]
    return {
        "question": wording.format(animal=facts.animals[animal][language]),
        **{
            letter: facts.statement(animal, attribute, language, value)
            for letter, value in zip(OPTION_LETTERS, options, strict=True)
        },
        "answer": OPTION_LETTERS[options.index(right)],
    }


def fixed_prompts(facts: Facts) -> list[dict[str, Any]]:
    """A dozen questions, both languages and both splits, for samples side by side."""
    chosen: list[Question] = []
    for split in ("train", "held"):
        for language in LANGUAGES:
            for number, attribute in enumerate(facts.attributes):
                fitting = [
                    question
                    for question in facts.questions(split)
                    if (question.language, question.attribute) == (language, attribute)
                ]
                chosen += fitting[number * 7 % max(1, len(fitting)) :][:1]
    return [
        {
            "id": question.id,
            "messages": [{"role": "user", "content": question.text}],
            "language": question.language,
            "split": question.split,
        }
        for question in chosen
    ]
