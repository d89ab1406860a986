"""The forms of OpenAI's API: what may be asked, and what is answered.

Source: OpenAI API reference, /v1/chat/completions, /v1/completions, /v1/models.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from conf.serving import Told
from flows.answering import Engine
from storage.conversations import Message
from storage.tokenizer import ChatTokenizer

MOST_CHOICES = 16
MOST_STOPS = 16
MOST_PROMPTS = 64
SEEDS = 1 << 63
MOST_TOKEN_BYTES = 64
"""Bytes per token of a prompt above which it is refused unread: text has 3 to 6, and while 4 MiB of it
become tokens, for about two seconds, the server does nothing else."""
FIXED: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "store": (None, False),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
}
"""Fields of the API that mean nothing else here, and the values with which they mean nothing at all."""
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields that change no answer."""


class Refused(ValueError):
    """A request that cannot be answered, as the caller is told."""

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        if self.status == 429:
            kind = "rate_limit_error"
        elif self.status == 401:
            kind = "authentication_error"
        else:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        told = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": told}


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    include_usage: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Sampled(BaseModel):
    """What both kinds of requests say."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """No field of OpenAI's; as vLLM's: -1 or 0 for all tokens."""
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        fields = cast("dict[str, Any]", given)
        for name, values in FIXED.items():
            if fields.get(name) not in values:
                raise ValueError(f"this server has no {name}; leave it out")
        return {k: v for k, v in fields.items() if k not in FIXED and k not in IGNORED}

    @property
    def stops(self) -> list[str]:
        """Strings before which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1


class TextPart(BaseModel):
    """A piece of a message's content."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn; names and refusals are not read."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def normal(self) -> Message:
        """As the models know it."""
        said = self.content
        text = said if isinstance(said, str) else "".join(part.text for part in said)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Sampled):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Longest answer that is wanted."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def told_logprobs(self) -> int | None:
        """As Ask has it."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def prompts(self, engine: Engine) -> list[list[int]]:
        """The conversation as tokens, as one prompt. Raises Refused where it is far too long."""
        messages = [message.normal for message in self.messages]
        _refuse_long("".join(message["content"] for message in messages), engine, "messages")
        return [engine.tokenizer.render(messages, for_generation=True).ids]


class CompletionRequest(Sampled):
    """Body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[list[int]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def most_tokens(self) -> int:
        """Longest answer that is wanted; 16 by default, as OpenAI has it."""
        return self.max_tokens or 16

    @property
    def told_logprobs(self) -> int | None:
        """As Ask has it."""
        return self.logprobs

    def prompts(self, engine: Engine) -> list[list[int]]:
        """Each prompt as tokens; text stands at the beginning of a document.

        Raises Refused for token ids that the model does not have, and for text far too long.
        """
        given: Sequence[str | list[int]]
        match self.prompt:
            case str():
                given = [self.prompt]
            case [int(), *_]:
                given = [[int(token) for token in self.prompt]]  # pyright: ignore[reportArgumentType]
            case _:
                given = self.prompt  # pyright: ignore[reportAssignmentType]
        tokenizer = engine.tokenizer
        for item in given:
            if isinstance(item, str):
                _refuse_long(item, engine, "prompt")
        found = [
            [tokenizer.eos, *tokenizer.encode(item)] if isinstance(item, str) else item
            for item in given
        ]
        if not all(found) or not all(0 <= t < tokenizer.vocabulary for ids in found for t in ids):
            raise Refused(
                f"a prompt has no tokens, or ids that are none; they are 0 to {tokenizer.vocabulary - 1}",
                param="prompt",
            )
        return found


Body = TypeVar("Body", bound=BaseModel)
AnyRequest = ChatRequest | CompletionRequest


def parse(kind: type[Body], body: bytes) -> Body:
    """The request. Raises Refused, which names the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"] if part != "function-before")
        found = repr(first["input"])
        shown = found if len(found) <= 80 else f"{found[:80]}..."
        where = f"{place}: " if place else ""
        raise Refused(f"{where}{first['msg']}; found {shown}", param=place or None) from None


def _refuse_long(text: str, engine: Engine, param: str) -> None:
    """Raises Refused for text that no tokenizer makes short enough for the model's context."""
    context, size = engine.ready.context, len(text.encode("utf-8"))
    if size > context * MOST_TOKEN_BYTES:
        raise Refused(
            f"this model's context is {context} tokens; {size} bytes do not fit: shorten the prompt",
            code="context_length_exceeded",
            param=param,
        )


def fields_of_asks(
    request: AnyRequest, prompts: Sequence[Sequence[int]], engine: Engine
) -> list[dict[str, Any]]:
    """For every answer that is wanted what Ask says of it.

    Raises Refused when a prompt and its answer do not fit the model's context, and for more answers than
    the server ever takes.
    """
    context, count = engine.ready.context, len(prompts) * request.choices
    if count > engine.most_answers:
        raise Refused(
            f"{count} answers are asked for in one request; this server takes {engine.most_answers} at a "
            "time: ask for fewer",
            param="n",
        )
    temperature = 1.0 if request.temperature is None else request.temperature
    seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed % SEEDS
    asks: list[dict[str, Any]] = []
    for prompt in prompts:
        room = context - len(prompt)
        wanted = request.most_tokens or max(room, 1)
        if wanted > room:
            raise Refused(
                f"this model's context is {context} tokens; {len(prompt)} of the prompt and {wanted} of "
                "the answer do not fit: shorten the prompt or max_tokens",
                code="context_length_exceeded",
                param="messages" if isinstance(request, ChatRequest) else "prompt",
            )
        asks += [
            {
                "prompt": tuple(prompt),
                "max_new_tokens": wanted,
                "stops": frozenset([engine.tokenizer.eos, engine.tokenizer.im_end]),
                "temperature": temperature,
                "top_k": min(max(request.top_k or 0, 0), engine.tokenizer.vocabulary),
                "top_p": request.top_p or 1.0,
                "seed": seed,
                "row": len(asks) + number,
                "logprobs": request.told_logprobs,
            }
            for number in range(request.choices)
        ]
    return asks


class Form:
    """The answer to one request, whole or in chunks."""

    def __init__(self, request: AnyRequest, tokenizer: ChatTokenizer, prompt_tokens: int) -> None:
        self.is_chat = isinstance(request, ChatRequest)
        self.request, self._tokenizer = request, tokenizer
        self._prompt_tokens, self._answer_tokens = prompt_tokens, 0
        kind = "chat.completion" if self.is_chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": request.model,
        }
        self._shown: dict[int, int] = {}
        """Characters of each answer's tokens so far, for `text_offset`."""

    def whole(self, answers: Sequence[tuple[str, list[Told], str]]) -> dict[str, Any]:
        """The one body; for each answer its text, its tokens and why it ended."""
        choices: list[dict[str, Any]] = []
        for number, (text, tokens, end) in enumerate(answers):
            self.count(len(tokens))
            said: dict[str, Any] = {"text": text}
            if self.is_chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(self._choice(number, said, tokens, end))
        return {**self._head, "choices": choices, "usage": self.usage}

    def opening(self, number: int) -> dict[str, Any]:
        """The first chunk of an answer of a conversation."""
        said = {"delta": {"role": "assistant", "content": "", "refusal": None}}
        return self._chunk([self._choice(number, said, [], None)])

    def chunk(self, number: int, text: str, tokens: list[Told], end: str) -> dict[str, Any]:
        """What an answer has grown by."""
        delta = {"content": text} if text or not end else {}
        said = {"delta": delta} if self.is_chat else {"text": text}
        return self._chunk([self._choice(number, said, tokens, end or None)])

    def closing(self) -> dict[str, Any]:
        """The last chunk, where it was asked for."""
        return {**self._chunk([]), "usage": self.usage}

    def count(self, tokens: int) -> None:
        """So many tokens more were answered."""
        self._answer_tokens += tokens

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of prompts and answers."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._answer_tokens,
            "total_tokens": self._prompt_tokens + self._answer_tokens,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}

    def _choice(
        self, number: int, said: Mapping[str, Any], tokens: list[Told], end: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.request.told_logprobs is not None and tokens:
            logprobs = self._chat_logprobs(tokens) if self.is_chat else self._texts(number, tokens)
        return {"index": number, **said, "logprobs": logprobs, "finish_reason": end}

    def _chat_logprobs(self, tokens: Sequence[Told]) -> dict[str, Any]:
        content = [
            {
                **self._spelled(told.token, told.logprob),
                "top_logprobs": [self._spelled(*item) for item in told.top or ()],
            }
            for told in tokens
        ]
        return {"content": content, "refusal": None}

    def _spelled(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        size = None if "\ufffd" in text else list(text.encode("utf-8"))
        return {"token": text, "logprob": logprob, "bytes": size}

    def _texts(self, number: int, tokens: Sequence[Told]) -> dict[str, Any]:
        offsets: list[int] = []
        for told in tokens:
            offsets.append(self._shown.get(number, 0))
            self._shown[number] = offsets[-1] + len(self._text(told.token))
        return {
            "tokens": [self._text(told.token) for told in tokens],
            "token_logprobs": [told.logprob for told in tokens],
            "top_logprobs": [dict(self._named(told)) for told in tokens],
            "text_offset": offsets,
        }

    def _named(self, told: Told) -> list[tuple[str, float]]:
        return [(self._text(token), logprob) for token, logprob in told.top or ()]

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token], keep_special=True)
