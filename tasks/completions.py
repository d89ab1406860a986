"""Asks an OpenAI-compatible endpoint many questions, within a budget, each answer kept as soon as it is there."""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from conf.endpoint import EndpointConfig
from storage.errors import BessemerError
from storage.jsonl import content_id
from tasks.normalise import without_halves

if TYPE_CHECKING:
    import httpx

ANSWERS = "answers.jsonl"
BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""What a later try may mend."""
LONGEST_PAUSE_SECONDS = 60.0


class EndpointFailed(BessemerError):
    """The endpoint refuses, or did not answer however often it was asked; the answers so far are kept."""


@dataclass(frozen=True)
class Answer:
    """What came back for a prompt."""

    key: str
    """Of prompt and place: the same question at another place is another one."""
    text: str
    """Empty where nothing usable came."""
    is_whole: bool
    """Whether it ended by itself."""
    tokens: int
    """Of prompt and answer, as the endpoint counts them; what failed tries cost is in `requests` alone."""
    requests: int
    """How often it was asked."""


@dataclass
class _Budget:
    """What may still be spent; shared by the threads."""

    requests: int
    tokens: int
    is_spent: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, tokens: int) -> bool:
        """Set a request of at most so many tokens apart; whether there was enough."""
        with self.lock:
            if self.requests < 1 or self.tokens < tokens:
                self.is_spent = True
                return False
            self.requests -= 1
            self.tokens -= tokens
            return True

    def give_back(self, tokens: int) -> None:
        """Of what was set apart so many tokens were not used."""
        with self.lock:
            self.tokens += tokens


class Endpoint:
    """One model at one address; remembers in a folder what it was told, so that nothing is asked twice."""

    def __init__(self, settings: EndpointConfig, folder: Path) -> None:
        """Raises ValueError where the key's environment variable is not set."""
        self._settings, self._path = settings, folder / ANSWERS
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._headers: dict[str, str] = {}
        self._key = ""
        if name := settings.key_variable:
            self._key = os.environ.get(name, "")
            if not self._key:
                raise ValueError(
                    f"the environment variable {name} (key_variable) is not set; export the endpoint's key "
                    "in it, or set key_variable to null for an endpoint without one"
                )
            self._headers = {"Authorization": f"Bearer {self._key}"}

    def ask(
        self, prompts: Sequence[str], keys: Sequence[str] | None = None
    ) -> tuple[list[Answer | None], bool]:
        """The answers in order (None: the budget was spent before), and whether it was spent.

        `keys` name the questions for a later try, by default what is asked and its place. Raises EndpointFailed for a request that the endpoint refuses, or that failed too often.
        """
        import httpx

        known = self._known()
        keys = keys or [content_id([place, prompt]) for place, prompt in enumerate(prompts)]
        spent = [answer for key in keys if (answer := known.get(key))]
        budget = _Budget(
            self._settings.max_requests - sum(answer.requests for answer in spent),
            self._settings.max_total_tokens - sum(answer.tokens for answer in spent),
        )
        is_local = urlsplit(self._settings.base_url).hostname in ("127.0.0.1", "localhost", "::1")
        with (
            httpx.Client(
                timeout=self._settings.wait_seconds, headers=self._headers, trust_env=not is_local
            ) as client,
            ThreadPoolExecutor(self._settings.concurrency) as threads,
        ):
            missing = [
                threads.submit(self._ask, client, key, prompt, budget)
                for key, prompt in zip(keys, prompts, strict=True)
                if key not in known
            ]
            try:
                for future in missing:
                    if answer := future.result():
                        known[answer.key] = answer
            except BaseException:
                self._stop.set()
                threads.shutdown(cancel_futures=True)
                raise
        return [known.get(key) for key in keys], budget.is_spent

    def _known(self) -> dict[str, Answer]:
        """Answers of an earlier try; a line that a killed process left unfinished is none."""
        found: dict[str, Answer] = {}
        if not self._path.exists():
            return found
        lines = self._path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        if len(whole) < len(lines):
            self._path.write_bytes(b"".join(whole))
        for line in whole:
            answer = Answer(**json.loads(line))
            found[answer.key] = answer
        return found

    def _keep(self, answer: Answer) -> None:
        line = json.dumps(asdict(answer), ensure_ascii=False) + "\n"
        with self._lock, self._path.open("ab") as stream:
            stream.write(line.encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())

    def _ask(self, client: "httpx.Client", key: str, prompt: str, budget: _Budget) -> Answer | None:
        import httpx

        # A token is a byte at least.
        most = len(prompt.encode("utf-8")) + self._settings.max_answer_tokens
        why = ""
        for attempt in range(self._settings.attempts):
            if self._stop.is_set() or not budget.take(most):
                return None
            try:
                response = client.post(self._address, json=self._question(prompt))
            except httpx.TransportError as error:
                budget.give_back(most)
                why = type(error).__name__
                self._pause(attempt, {})
                continue
            if response.status_code == 200:
                text, is_whole, tokens = _read(response)
                budget.give_back(max(0, most - tokens))
                if text or attempt + 1 == self._settings.attempts:
                    answer = Answer(key, text, is_whole, tokens, attempt + 1)
                    self._keep(answer)
                    return answer
                why = "an answer without text"
            else:
                budget.give_back(most)
                why = f"status {response.status_code}: {self._without_key(response.text)[:200]}"
                if response.status_code not in BUSY:
                    break
            self._pause(attempt, response.headers)
        raise EndpointFailed(
            f"{self.host} answered {why!r}; mend base_url, model or key_variable, or wait for the endpoint, and "
            "run again: answers that came are kept and not asked for again"
        )

    def _without_key(self, text: str) -> str:
        """What an endpoint said: some repeat the key that they refuse."""
        return text.replace(self._key, "[key]") if self._key else text

    @property
    def host(self) -> str:
        """Who is asked, without what the address may hold of passwords."""
        found = urlsplit(self._settings.base_url)
        return f"{found.hostname}:{found.port}" if found.port else str(found.hostname)

    @property
    def _address(self) -> str:
        return f"{self._settings.base_url.rstrip('/')}/chat/completions"

    def _question(self, prompt: str) -> dict[str, Any]:
        return {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self._settings.temperature,
            "max_tokens": self._settings.max_answer_tokens,
        }

    def _pause(self, attempt: int, headers: Mapping[str, str]) -> None:
        asked = headers.get("retry-after", "")
        seconds = float(asked) if asked.replace(".", "", 1).isdigit() else 2.0**attempt
        if attempt + 1 < self._settings.attempts:
            self._stop.wait(min(seconds, LONGEST_PAUSE_SECONDS))


def _read(response: "httpx.Response") -> tuple[str, bool, int]:
    """Text (empty for what is no answer), whether it ended by itself, and tokens used."""
    try:
        content = response.json()
        choice = content["choices"][0]
        text = choice["message"]["content"]
        tokens = int((content.get("usage") or {}).get("total_tokens") or 0)
        is_whole = choice.get("finish_reason") != "length"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return "", False, 0
    return (without_halves(text.strip()) if isinstance(text, str) else ""), is_whole, tokens
