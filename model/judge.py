"""A judge behind an OpenAI-compatible endpoint that gives answers numbers, each asked for once."""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from conf.ppo import RewardJudgeConfig
from storage.errors import BessemerError
from storage.jsonl import content_id, take_up

BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""What a later try may mend."""
LONGEST_PAUSE_SECONDS = 60.0
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class JudgeFailed(BessemerError):
    """The judge refuses, or did not answer however often it was asked; what it said so far is kept."""


class Judge:
    """Remembers in a file what was said, so that a job that goes on after a kill learns from the same."""

    def __init__(self, settings: RewardJudgeConfig, said: Path) -> None:
        """Raises ValueError where the key's environment variable is not set."""
        self._settings, self._path = settings, said
        self._headers = {"Content-Type": "application/json"}
        self._key = ""
        if name := settings.key_variable:
            self._key = os.environ.get(name, "")
            if not self._key:
                raise ValueError(
                    f"the environment variable {name} (judge.key_variable) is not set; export the endpoint's "
                    "key in it, or set judge.key_variable to null for an endpoint without one"
                )
            self._headers["Authorization"] = f"Bearer {self._key}"
        host = urlsplit(settings.base_url).hostname
        is_local = host in ("127.0.0.1", "localhost", "::1")
        proxies = urllib.request.ProxyHandler({} if is_local else None)
        self._opener = urllib.request.build_opener(proxies)
        self._said = {row["key"]: str(row["reply"]) for row in take_up(said)}

    def __call__(self, answers: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """A number for each answer, with its `messages` and `text`; None where the judge gave none.

        Raises JudgeFailed.
        """
        questions = [self._question(answer) for answer in answers]
        new = [text for text in dict.fromkeys(questions) if content_id(text) not in self._said]
        with ThreadPoolExecutor(self._settings.concurrency) as threads:
            for text, reply in zip(new, threads.map(self._ask, new), strict=True):
                self._keep(content_id(text), reply)
        return [number_in(self._said[content_id(text)]) for text in questions]

    def _question(self, answer: Mapping[str, Any]) -> str:
        lines = [f"{message['role']}: {message['content']}" for message in answer["messages"]]
        parts = {"messages": "\n".join(lines), "answer": str(answer["text"])}
        return re.sub(r"{(messages|answer)}", lambda place: parts[place[1]], self._settings.prompt)

    def _keep(self, key: str, reply: str) -> None:
        self._said[key] = reply
        line = json.dumps({"key": key, "reply": reply}, ensure_ascii=False) + "\n"
        with self._path.open("ab") as stream:
            stream.write(line.encode("utf-8", "replace"))
            stream.flush()
            os.fsync(stream.fileno())

    def _ask(self, question: str) -> str:
        settings = self._settings
        body = json.dumps({
            "model": settings.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0.0,
            "max_tokens": settings.max_answer_tokens,
        }).encode()  # fmt: skip
        address = f"{settings.base_url.rstrip('/')}/chat/completions"
        why = ""
        for attempt in range(settings.attempts):
            if attempt:
                time.sleep(min(2.0 ** (attempt - 1), LONGEST_PAUSE_SECONDS))
            asked = urllib.request.Request(address, body, self._headers)
            try:
                with self._opener.open(asked, timeout=settings.wait_seconds) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                said = error.read(2000).decode("utf-8", "replace")
                # Some repeat the key that they refuse.
                said = said.replace(self._key, "[key]") if self._key else said
                why = f"status {error.code}: {said[:200]}"
                if error.code not in BUSY:
                    break
            except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                why = f"{type(error).__name__}: {error}"
        raise JudgeFailed(
            f"the judge at {urlsplit(settings.base_url).netloc.rpartition('@')[2]} answered {why!r}; mend "
            "judge.base_url, judge.model or judge.key_variable, or wait for the endpoint, and run again: what "
            "it said so far is not asked for again"
        )


def number_in(reply: str) -> float | None:
    """The first number of a reply; None without one."""
    found = NUMBER.search(reply)
    return float(found[0]) if found else None
