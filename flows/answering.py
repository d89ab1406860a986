"""Checkpoints that answer, each in a process of its own that holds the model."""

import asyncio
import itertools
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from conf.serving import Ask, Asked, End, Ready, Serving, Told
from flows.answer_text import StopStrings, TokenText
from flows.runs import ServiceError
from flows.served import Served
from storage.errors import BessemerError
from storage.tokenizer import ChatTokenizer

STOP_SECONDS = 5.0
LONGEST_LINE = 1 << 26
TAIL_CHARS = 2000


class Full(BessemerError):
    """As many answers wait already as may wait."""


@dataclass(frozen=True)
class Piece:
    """What an answer has grown by."""

    choice: int
    """Which of the answers that were asked for together."""
    text: str
    tokens: list[Told]
    end: End = ""


@dataclass
class _Choice:
    """The text of one answer so far."""

    text: TokenText
    stops: StopStrings
    is_done: bool = False

    def add(self, number: int, tokens: list[Told]) -> Piece:
        shown = [told for told in tokens if told.end != "stop"]
        said = "".join(self.stops.add(self.text.add(told.token)) for told in shown)
        end = tokens[-1].end
        if end:
            said += self.stops.add(self.text.finish()) + self.stops.finish()
        if self.stops.is_found:
            end = "stop"
        self.is_done = bool(end)
        return Piece(number, said, shown, end)


@dataclass
class _Box:
    """Tokens of the answers that were asked for together, until someone takes them."""

    told: list[Told] = field(default_factory=list[Told])
    is_filled: asyncio.Event = field(default_factory=asyncio.Event)


class Answers:
    """Answers that were asked for together, as an iterator of what they grow by.

    Tokens that come faster than they are taken come in larger pieces.
    """

    def __init__(
        self, engine: "Engine", asks: Sequence[Ask], stops: Sequence[str], seconds: float | None
    ) -> None:
        self._engine = engine
        self._box = _Box()
        self._is_late = False
        self._timer = None
        if seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)
        self._choices = {
            ask.key: (number, _Choice(TokenText(engine.tokenizer), StopStrings(stops)))
            for number, ask in enumerate(asks)
        }

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Until every answer has ended.

        Raises ServiceError when the process ends before, TimeoutError when the time is over.
        """
        while self._open():
            await self._box.is_filled.wait()
            self._box.is_filled.clear()
            told, self._box.told = self._box.told, []
            if self._engine.failure:
                raise ServiceError(self._engine.failure)
            if self._is_late:
                raise TimeoutError
            by_key: dict[int, list[Told]] = {}
            for one in told:
                by_key.setdefault(one.key, []).append(one)
            for key, tokens in by_key.items():
                number, choice = self._choices[key]
                if not choice.is_done:
                    yield choice.add(number, tokens)
                if choice.is_done:
                    self._engine.drop([key])

    def close(self) -> None:
        """Compute those that have not ended no further."""
        if self._timer is not None:
            self._timer.cancel()
        self._engine.drop(self._open())

    def _expire(self) -> None:
        self._is_late = True
        self._box.is_filled.set()

    def _open(self) -> list[int]:
        return [key for key, (_, choice) in self._choices.items() if not choice.is_done]


class Engine:
    """One checkpoint that answers. An async context manager; `load` it before it is asked."""

    def __init__(self, served: Served, serving: Serving, *, waiting: int = 256) -> None:
        """At most `waiting` answers wait for their turn; more are refused."""
        self.served, self.serving, self.waiting = served, serving, waiting
        self.tokenizer: ChatTokenizer = served.tokenizer
        self.failure = ""
        """Why it answers no more; empty while it does."""
        self.ready = Ready(context=1, parameters=0)
        self._keys = itertools.count()
        self._boxes: dict[int, _Box] = {}
        self._listening: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Engine":
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed in __aexit__)
        root = Path(__file__).resolve().parents[1]
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = str(self.serving.threads)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "model.serve", self.serving.model_dump_json(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._errors,
            limit=LONGEST_LINE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads},
            start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._input.close()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        if self._listening is not None:
            self._listening.cancel()
        self._errors.close()

    async def load(self) -> None:
        """Wait until it can answer. Raises ServiceError when it cannot."""
        line = await self._output.readline()
        if not line:
            await self._process.wait()
            raise ServiceError(f"{self.served.name} could not be loaded:\n{self._error_tail()}")
        self.ready = Ready.model_validate_json(line)
        self._listening = asyncio.create_task(self._listen())

    @property
    def open_answers(self) -> int:
        """Answers that are being computed or wait."""
        return len(self._boxes)

    @property
    def most_answers(self) -> int:
        """Answers that may be computed or wait at a time."""
        return self.serving.rows + self.waiting

    def answer(
        self,
        asked: Sequence[dict[str, Any]],
        stops: Sequence[str] = (),
        *,
        seconds: float | None = None,
    ) -> Answers:
        """Begin some answers, each given by the fields of Ask but its key; close them in the end.

        Raises ServiceError when the process has ended, and Full when too many wait.
        """
        if self.failure:
            raise ServiceError(self.failure)
        if len(self._boxes) + len(asked) > self.most_answers:
            raise Full(
                f"{len(self._boxes)} answers of {self.served.name} are asked for already, at most "
                f"{self.most_answers} may be; try again in a moment"
            )
        asks = [Ask(key=next(self._keys), **fields) for fields in asked]
        answers = Answers(self, asks, stops, seconds)
        for ask in asks:
            self._boxes[ask.key] = answers._box  # pyright: ignore[reportPrivateUsage]
            self._send(Asked(ask=ask))
        return answers

    def drop(self, keys: Iterable[int]) -> None:
        """Compute those answers no further, where they go on."""
        for key in keys:
            if self._boxes.pop(key, None) is not None:
                self._send(Asked(drop=key))

    def _send(self, asked: Asked) -> None:
        if not self.failure:
            self._input.write(asked.model_dump_json(exclude_none=True).encode("utf-8") + b"\n")

    async def _listen(self) -> None:
        """Put what is told into the boxes of those who asked."""
        while line := await self._output.readline():
            for fields in json.loads(line):
                told = Told(*fields)
                if told.end:
                    box = self._boxes.pop(told.key, None)
                else:
                    box = self._boxes.get(told.key)
                if box is not None:
                    box.told.append(told)
                    box.is_filled.set()
            await asyncio.sleep(0)  # lines may lie ready; whoever waits for this one comes first
        await self._process.wait()
        self.failure = (
            f"the process of {self.served.name} ended with status {self._process.returncode}; start "
            f"the server again\n{self._error_tail()}"
        )
        for box in self._boxes.values():
            box.is_filled.set()
        self._boxes.clear()

    def _error_tail(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace")[-TAIL_CHARS:]
