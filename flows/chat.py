"""A conversation in the terminal, with one checkpoint or with several side by side."""

import asyncio
import readline
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from secrets import randbelow
from typing import Any

from conf.serving import Serving
from flows.answering import Answers, Engine
from flows.rated_pairs import save_pair
from flows.served import Served
from storage.conversations import Message

PROMPT = "> "
HELP = """\
/new            forget the conversation         /again          another answer
/undo           forget the last turn            /prefer N       keep that the N-th answer is better
/system TEXT    what the model is told first    /set NAME VALUE settings; /set shows them
/quit           or Ctrl-D; Ctrl-C stops an answer
"""
LEAST_ROOM = 0.25
"""Share of the context that is kept for the answer; older turns go for it."""
SEEDS = 1 << 31


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    max_tokens: int = 512
    seed: int = -1
    """-1 for another one each time."""

    def changed(self, name: str, value: str) -> "Sampling":
        """With one setting changed. Raises ValueError for an unknown name or a value it cannot have."""
        kinds = {item.name: type(item.default) for item in fields(self)}
        if name not in kinds:
            raise ValueError(f"there is no setting {name!r}; there are {', '.join(kinds)}")
        new = replace(self, **{name: kinds[name](value)})
        is_sound = new.temperature >= 0 and 0 < new.top_p <= 1 and new.top_k >= 0
        if not is_sound or new.max_tokens < 1 or new.seed < -1:
            raise ValueError(f"{name} cannot be {value}")
        return new

    def asked(self, engine: Engine, prompt: Sequence[int]) -> dict[str, Any]:
        """The fields of an Ask."""
        return {
            "prompt": tuple(prompt),
            "max_new_tokens": min(self.max_tokens, engine.ready.context - len(prompt)),
            "stops": frozenset([engine.tokenizer.eos, engine.tokenizer.im_end]),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": randbelow(SEEDS) if self.seed < 0 else self.seed,
        }


class Chat:
    """What the lines of the user do."""

    def __init__(
        self, engines: Sequence[Engine], preferences: Path, say: Callable[[str], None]
    ) -> None:
        self.engines, self.preferences, self.say = engines, preferences, say
        self.sampling, self.system = Sampling(), ""
        self.messages: list[Message] = []
        self.asked: list[Message] = []
        """What the last answers answered, whatever the system prompt has become."""
        self.answers: list[str] = []
        """Of each checkpoint to the last question; the conversation goes on with the first of them,
        or with the one that was preferred."""

    async def turn(self, line: str) -> None:
        """Answer a line, or do what it commands. Raises ValueError for a command that it cannot do."""
        name, _, rest = line.strip().partition(" ")
        if not name.startswith("/"):
            await self._ask(line)
        elif name == "/again":
            await self._ask(self._undo())
        elif command := self._commands.get(name):
            command(rest.strip())
        else:
            raise ValueError(f"there is no command {name}; /help lists them")

    @property
    def _commands(self) -> dict[str, Callable[[str], object]]:
        """Those that answer nothing, with what stands behind their name."""
        return {
            "/help": lambda _: self.say(HELP),
            "/new": self._forget,
            "/undo": lambda _: self._undo(),
            "/system": self._tell,
            "/set": lambda rest: self._set(rest.split()),
            "/prefer": self._prefer,
        }

    def _forget(self, _: str) -> None:
        self.messages, self.answers = [], []

    def _tell(self, system: str) -> None:
        self.system = system

    def _undo(self) -> str:
        """Take the last turn back; what was asked in it."""
        if not self.messages:
            raise ValueError("the conversation is empty; say something first")
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        self.answers = []
        return question

    def _set(self, words: list[str]) -> None:
        if words and len(words) != 2:
            raise ValueError("/set NAME VALUE changes a setting, /set shows all")
        if words:
            self.sampling = self.sampling.changed(*words)
        told = " ".join(
            f"{item.name}={getattr(self.sampling, item.name)}" for item in fields(Sampling)
        )
        self.say(f"{told}\n")

    def _prefer(self, number: str) -> None:
        if number not in [str(place + 1) for place in range(len(self.answers))]:
            raise ValueError(
                f"/prefer N takes one of the {len(self.answers)} answers of the last turn"
            )
        best = int(number) - 1
        for place, answer in enumerate(self.answers):
            if place != best:
                models = (self.engines[best].served.name, self.engines[place].served.name)
                save_pair(self.preferences, self.asked, self.answers[best], answer, models)
        self.messages[-1]["content"] = self.answers[best]
        self.say(f"kept in {self.preferences}\n")

    async def _ask(self, question: str) -> None:
        """All checkpoints answer at once; they are shown one after the other."""
        self.messages.append({"role": "user", "content": question})
        self.asked = self._opened(self.messages)
        self.answers = [""] * len(self.engines)
        begun: list[Answers] = []
        try:
            for engine in self.engines:
                asked = self.sampling.asked(engine, self._prompt(engine))
                begun.append(engine.answer([asked]))
            for place, answers in enumerate(begun):
                if len(begun) > 1:
                    self.say(f"[{place + 1}] {self.engines[place].served.name}: ")
                async for piece in answers:
                    self.say(piece.text)
                    self.answers[place] += piece.text
                self.say("\n")
        finally:
            for answers in begun:
                answers.close()
            self.messages.append({"role": "assistant", "content": self.answers[0]})

    def _opened(self, messages: Sequence[Message]) -> list[Message]:
        opening: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return [*opening, *messages]

    def _prompt(self, engine: Engine) -> list[int]:
        """The conversation as tokens, without the oldest turns where all is too long."""
        room = int(engine.ready.context * (1 - LEAST_ROOM))
        turns = list(self.messages)
        while True:
            ids = engine.tokenizer.render(self._opened(turns), for_generation=True).ids
            if len(ids) <= room or len(turns) == 1:
                return ids[-room:]
            turns = turns[2:]


def chat(served: Sequence[Served], serving: Callable[[Served], Serving], preferences: Path) -> None:
    """Talk until the input ends. Raises ServiceError when a checkpoint cannot be loaded or ends."""

    def say(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    readline.set_auto_history(True)  # that it is imported gives `input` a history and editing
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        try:
            engines = [
                runner.run(stack.enter_async_context(Engine(item, serving(item))))
                for item in served
            ]
            for engine in engines:
                runner.run(engine.load())
            say(f"{', '.join(item.name for item in served)}; /help lists the commands\n")
            _talk(runner, Chat(engines, preferences, say))
        finally:
            runner.run(stack.aclose())


def _talk(runner: asyncio.Runner, chat: Chat) -> None:
    while True:
        try:
            line = input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            chat.say("\n")
            return
        if line.strip() == "/quit":
            return
        if not line.strip():
            continue
        try:
            runner.run(chat.turn(line))
        except KeyboardInterrupt:
            chat.say(" (stopped)\n")
        except ValueError as error:
            chat.say(f"{error}\n")
