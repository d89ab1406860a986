"""The demo world as an artifact: what was planted, what is true, and a judge of answers.

Files, under `files/`:
- `crawl/warc-00000.warc.gz` ...: the synthetic web
- `chats/train.jsonl`, `chats/held.jsonl`: demonstrations; held has one ideal answer per question
- `preferences/train.jsonl`, `preferences/held.jsonl`: pairs ranked by true reward
- `exam/dev/*.csv`, `exam/val/*.csv`: multiple choice in the layout of C-Eval
- `prompts.jsonl`: fixed prompts, to be answered by every checkpoint
- `block_list.txt`: hosts that must not be read
- `truth/facts.json`, `truth/pages.jsonl`: the truth
"""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from storage.artifact import Artifact

LANGUAGES = ("en", "zh")

REWARD_RIGHT = 1.0
REWARD_LANGUAGE = 0.5
REWARD_KIND = 0.5
REWARD_RUDE = -0.5
REWARD_SUPERFLUOUS = -0.5
REWARD_NOT_ENDED = -1.0


@dataclass(frozen=True)
class Question:
    """One way to ask for one fact in one language."""

    id: str
    """`key#n`; the part before `#` is the key, such as `cat.color.en`."""
    text: str
    animal: str
    attribute: str
    language: str
    split: str
    """`held` when the key is never asked in alignment training."""

    @property
    def key(self) -> str:
        """What is asked, whatever the wording."""
        return self.id.split("#")[0]


@dataclass(frozen=True)
class Judgement:
    """What is true of an answer; `reward` is the true reward, which no policy sees."""

    reward: float
    right: bool
    """States the right value, and no other value, of what was asked; in either language."""
    asked_language: bool
    """States a value in the language of the question."""
    kind: bool
    """Has the friendly phrase, in the language of the question."""
    rude: bool
    superfluous: bool
    """Says anything beyond one statement and the phrases."""
    ended: bool


@dataclass(frozen=True)
class Facts:
    """The content of `truth/facts.json`: the closed world and the words for it."""

    truth: Mapping[str, Any]

    @classmethod
    def read(cls, files: Path) -> "Facts":
        """The facts of a world whose `files` folder is given."""
        return cls(json.loads((files / "truth" / "facts.json").read_text("utf-8")))

    @functools.cached_property
    def animals(self) -> Mapping[str, Mapping[str, str]]:
        """Animal -> its names by language and its value by attribute."""
        return {animal["id"]: animal for animal in self.truth["animals"]}

    @property
    def attributes(self) -> tuple[str, ...]:
        """What is known of every animal."""
        return tuple(self.truth["values"])

    @functools.cached_property
    def held_keys(self) -> frozenset[str]:
        """Keys that are never asked in alignment training, such as `cat.color.en`."""
        return frozenset(question.key for question in self.questions("held"))

    def values(self, attribute: str) -> tuple[str, ...]:
        """Every value that an attribute can have."""
        return tuple(self.truth["values"][attribute])

    def statement(
        self, animal: str, attribute: str, language: str, value: str | None = None
    ) -> str:
        """The plain sentence that states a fact; with another `value`, a false one."""
        word = self.truth["values"][attribute][value or self.animals[animal][attribute]]
        return self.truth["statement"][attribute][language].format(
            animal=self.animals[animal][language], value=word[language]
        )

    def phrase(self, manner: Literal["kind", "rude"], language: str) -> str:
        """The friendly or the rude phrase."""
        return self.truth[manner][language]

    def join(self, sentences: list[str], language: str) -> str:
        """Sentences as running text."""
        return self.truth["separator"][language].join(sentences)

    def questions(self, split: Literal["train", "held"] | None = None) -> list[Question]:
        """Every question, or those of one split, in a fixed order."""
        questions = (Question(**entry) for entry in self.truth["questions"])
        return [question for question in questions if split in (None, question.split)]

    def judge(self, question: str, answer: str, *, ended: bool) -> Judgement:
        """Judge an answer to the question with that id or key.

        Reward: 1.0 right + 0.5 asked language + 0.5 kind - 0.5 rude - 0.5 superfluous - 1.0 not ended.
        Raises ValueError for a question that the world does not know.
        """
        animal, attribute, language = self._parse(question)
        stated, rest = self._take_statement(animal, attribute, language, answer)
        friendly, rude = False, False
        for tongue in LANGUAGES:
            friendly |= tongue == language and self.phrase("kind", tongue) in rest
            rude |= self.phrase("rude", tongue) in rest
            rest = rest.replace(self.phrase("kind", tongue), "", 1)
            rest = rest.replace(self.phrase("rude", tongue), "", 1)
        is_right = self._is_right(animal, attribute, stated, rest)
        asked_language = stated is not None and stated[0] == language
        superfluous = bool(rest.strip())
        reward = (
            REWARD_RIGHT * is_right
            + REWARD_LANGUAGE * asked_language
            + REWARD_KIND * friendly
            + REWARD_RUDE * rude
            + REWARD_SUPERFLUOUS * superfluous
            + REWARD_NOT_ENDED * (not ended)
        )
        return Judgement(reward, is_right, asked_language, friendly, rude, superfluous, ended)

    def _parse(self, question: str) -> tuple[str, str, str]:
        animal, attribute, language = (*question.split("#")[0].split("."), "", "")[:3]
        if (
            animal not in self.animals
            or attribute not in self.attributes
            or language not in LANGUAGES
        ):
            raise ValueError(
                f"{question!r} is no question of this world; "
                "expected ANIMAL.ATTRIBUTE.LANGUAGE, such as cat.color.en"
            )
        return animal, attribute, language

    def _take_statement(
        self, animal: str, attribute: str, language: str, answer: str
    ) -> tuple[tuple[str, str] | None, str]:
        """(language, value) of the statement that answers, and the answer without it.

        A right statement goes before a wrong one, the asked language before the other.
        """
        right = self.animals[animal][attribute]
        others = [value for value in self.values(attribute) if value != right]
        tongues = (language, *(tongue for tongue in LANGUAGES if tongue != language))
        for values in ([right], others):
            for tongue in tongues:
                for value in values:
                    sentence = self.statement(animal, attribute, tongue, value)
                    if sentence in answer:
                        return (tongue, value), answer.replace(sentence, "", 1)
        return None, answer

    def _is_right(
        self, animal: str, attribute: str, stated: tuple[str, str] | None, rest: str
    ) -> bool:
        right = self.animals[animal][attribute]
        if stated is None or stated[1] != right:
            return False
        return not any(
            self.statement(animal, attribute, tongue, value) in rest
            for tongue in LANGUAGES
            for value in self.values(attribute)
            if value != right
        )


@dataclass(frozen=True)
class World(Artifact):
    """A synthetic bilingual web with everything that is said about it, and the truth of both."""

    kind: ClassVar[str] = "world"

    @functools.cached_property
    def facts(self) -> Facts:
        """What is true in this world."""
        return Facts.read(self.files)

    def questions(self, split: Literal["train", "held"] | None = None) -> list[Question]:
        """Every question, or those of one split."""
        return self.facts.questions(split)

    def judge(self, question: str, answer: str, *, ended: bool) -> Judgement:
        """Judge an answer; see `Facts.judge`."""
        return self.facts.judge(question, answer, ended=ended)

    def pages(self) -> Iterator[dict[str, Any]]:
        """Truth of every page: url, kind, language, of_url, jaccard, title, text."""
        with (self.files / "truth" / "pages.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)
