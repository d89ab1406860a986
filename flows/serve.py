"""Checkpoints as an HTTP server: OpenAI's API and a page to chat on."""

import asyncio
import hmac
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from conf.serving import Serving
from flows.answering import Answers, Engine, Full, Piece
from flows.connections import Impatient, drop_unread
from flows.garbage import take_up
from flows.openai_api import (
    AnyRequest,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    Form,
    Refused,
    fields_of_asks,
    parse,
)
from flows.rated_pairs import save_pair
from flows.runs import ServiceError
from flows.served import Served

PAGE = Path(__file__).parent / "page" / "chat.html"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
BODY_SECONDS = 30.0
GRACE_SECONDS = 5.0
"""After the time-out of a request, for a reader that does not take what it was sent."""
NO_FRAMES = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; connect-src 'self'; "
    "style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


Body = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What the server allows, and whom."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    """What requests must show as `Authorization: Bearer`; nothing where it is empty."""
    waiting: int = 256
    """Answers of a checkpoint that may wait for their turn; more get status 429."""
    request_seconds: float = 600.0
    """Longest that one request is answered."""
    body_bytes: int = 4 << 20
    """Largest request."""


class Rated(BaseModel):
    """Body of /preferences: which of two answers somebody likes better."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: Annotated[list[ChatMessage], Field(min_length=1)]
    chosen: Annotated[str, Field(min_length=1)]
    rejected: Annotated[str, Field(min_length=1)]
    chosen_model: str
    rejected_model: str


class Server:
    """The answers to every path, given the checkpoints."""

    def __init__(self, engines: Sequence[Engine], limits: Limits, preferences: Path) -> None:
        """`preferences` is the file to which rated pairs are added."""
        self.engines = {engine.served.name: engine for engine in engines}
        self.limits, self.preferences = limits, preferences

    @property
    def application(self) -> Starlette:
        """As ASGI."""
        routes = [
            Route("/", self._guarded(self._page, needs_token=False)),
            Route("/health", self._guarded(self._health, needs_token=False)),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name:path}", self._guarded(self._model)),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self._complete), methods=["POST"]),
            Route("/preferences", self._guarded(self._prefer), methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={404: _nowhere, 405: _nowhere})

    def _guarded(self, handle: Callable[[Request], Any], *, needs_token: bool = True) -> Any:
        """The handler, which only sees requests that are let in; what it raises is told in JSON."""

        async def guarded(request: Request) -> Response:
            try:
                self._let_in(request, needs_token=needs_token)
                return await handle(request)
            except Refused as error:
                return _told(error)
            except Full as error:
                return _told(Refused(str(error), status=429, code="rate_limit_exceeded"))
            except ServiceError as error:
                return _told(Refused(str(error), status=503, code="model_ended"))

        return guarded

    def _let_in(self, request: Request, *, needs_token: bool) -> None:
        """Raises Refused without the token, and for a page of elsewhere that reached loopback by name."""
        is_local = self.limits.host in LOOPBACK
        if is_local and request.url.hostname not in (*LOOPBACK, "[::1]"):
            raise Refused(f"this server is not {request.url.hostname}; ask {self.limits.host}")
        if not needs_token or not self.limits.token:
            return
        shown = request.headers.get("authorization", "").removeprefix("Bearer ")
        # Headers come as Latin-1, whatever their bytes are.
        if not hmac.compare_digest(shown.encode("latin-1"), self.limits.token.encode()):
            raise Refused(
                "the token is missing or wrong; send it as Authorization: Bearer TOKEN",
                status=401,
                code="invalid_api_key",
            )

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text("utf-8"), headers=NO_FRAMES)

    async def _health(self, request: Request) -> Response:
        models = {
            name: {"open_answers": engine.open_answers, "failure": engine.failure or None}
            for name, engine in self.engines.items()
        }
        is_well = not any(engine.failure for engine in self.engines.values())
        told = {"status": "ok" if is_well else "failed", "models": models}
        return JSONResponse(told, 200 if is_well else 503)

    async def _models(self, request: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [_described(engine) for engine in self.engines.values()]}
        )

    async def _model(self, request: Request) -> Response:
        return JSONResponse(_described(self._engine(request.path_params["name"])))

    def _engine(self, name: str) -> Engine:
        if name not in self.engines:
            raise Refused(
                f"there is no model {name[:80]!r}; there are {', '.join(self.engines)}",
                status=404,
                code="model_not_found",
                param="model",
            )
        return self.engines[name]

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, parse(ChatRequest, await self._body(request)))

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, parse(CompletionRequest, await self._body(request)))

    async def _answer(self, request: Request, asked: AnyRequest) -> Response:
        engine = self._engine(asked.model)
        prompts = asked.prompts(engine)
        seconds = self.limits.request_seconds
        asks = fields_of_asks(asked, prompts, engine)
        answers = engine.answer(asks, asked.stops, seconds=seconds)
        form = Form(asked, engine.tokenizer, sum(map(len, prompts)))
        if asked.stream:
            return Stream(answers, _events(form, answers, len(asks), seconds), seconds)
        try:
            return JSONResponse(await _unless_gone(request, _whole(form, answers, len(asks))))
        except TimeoutError:
            raise _late(seconds) from None
        finally:
            answers.close()

    async def _body(self, request: Request) -> bytes:
        """Raises Refused for a body that is no JSON by its type, too large, or does not come."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(
                f"the content type is {kind[:80]!r}, application/json is expected", status=415
            )
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > self.limits.body_bytes:
                        raise Refused(
                            f"the request is larger than {self.limits.body_bytes} bytes", status=413
                        )
        except TimeoutError:
            raise Refused(
                f"the request did not come within {BODY_SECONDS:g} seconds", status=408
            ) from None
        except ClientDisconnect:
            raise Refused("the request ended early", status=400) from None
        return bytes(body)

    async def _prefer(self, request: Request) -> Response:
        rated = parse(Rated, await self._body(request))
        prompt = [message.normal for message in rated.prompt]
        if prompt[-1]["role"] != "user" or rated.chosen.strip() == rated.rejected.strip():
            raise Refused(
                "a pair is a prompt that ends with the user's turn, and two answers to it"
            )
        models = (rated.chosen_model, rated.rejected_model)
        try:
            saved = save_pair(self.preferences, prompt, rated.chosen, rated.rejected, models)
        except ValueError as error:
            raise Refused(str(error)) from error
        return JSONResponse({"saved": saved, "file": str(self.preferences)}, 201)


class Stream(StreamingResponse):
    """Server-sent events; when the reader leaves, the answers are computed no further."""

    def __init__(self, answers: Answers, events: AsyncIterator[str], seconds: float) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._answers, self._seconds = answers, seconds + GRACE_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            return
        finally:
            self._answers.close()


async def _events(form: Form, answers: Answers, count: int, seconds: float) -> AsyncIterator[str]:
    """The chunks of a stream, and `[DONE]`; what goes wrong is told as its last chunk."""
    if form.is_chat:
        for number in range(count):
            yield _event(form.opening(number))
    try:
        async for piece in answers:
            form.count(len(piece.tokens))
            if piece.text or piece.end or form.request.told_logprobs is not None:
                yield _event(form.chunk(piece.choice, piece.text, piece.tokens, piece.end))
    except TimeoutError:
        yield _event(_late(seconds).body)
    except ServiceError as error:
        yield _event(Refused(str(error), status=503, code="model_ended").body)
    if form.request.stream_options and form.request.stream_options.include_usage:
        yield _event(form.closing())
    yield "data: [DONE]\n\n"


def _event(told: Body) -> str:
    return f"data: {json.dumps(told, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _whole(form: Form, answers: Answers, count: int) -> Body:
    """The body of an answer that is told at once."""
    pieces: list[list[Piece]] = [[] for _ in range(count)]
    async for piece in answers:
        pieces[piece.choice].append(piece)
    return form.whole(
        [
            (
                "".join(piece.text for piece in own),
                [told for piece in own for told in piece.tokens],
                own[-1].end,
            )
            for own in pieces
        ]
    )


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Body]) -> Body:
    """What the work gives. Raises Refused, which nobody reads, when its reader leaves before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Refused("the reader has left")
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _late(seconds: float) -> Refused:
    return Refused(
        f"the answer took longer than {seconds:g} seconds; ask for fewer tokens",
        status=504,
        code="timeout",
    )


def _described(engine: Engine) -> dict[str, Any]:
    return {
        "id": engine.served.name,
        "object": "model",
        "created": 0,
        "owned_by": "bessemer",
        "context": engine.ready.context,
        "parameters": engine.ready.parameters,
    }


async def _nowhere(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    said = f"{request.method} {request.url.path[:80]} is nothing that this server has"
    return _told(Refused(said, status=status, code="not_found"))


def _told(error: Refused) -> Response:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body, error.status, headers)


def read_token(variable: str | None, host: str) -> str:
    """The token in an environment variable.

    Raises ValueError when it is empty, and when others could reach a server without one.
    """
    if variable is None:
        if host in LOOPBACK:
            return ""
        raise ValueError(
            f"host {host} is reached from elsewhere; name an environment variable that holds a token "
            "by --token-env, or serve on 127.0.0.1"
        )
    if token := os.environ.get(variable, ""):
        return token
    raise ValueError(f"the environment variable {variable} is empty; put the token there")


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ValueError where another program does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ValueError(
            f"{host} port {port}: {error.strerror}; choose another by --port, 0 for any free one"
        ) from error
    drop_unread(listening)
    listening.listen(1024)
    return listening


async def serve(
    served: Sequence[Served],
    serving: Callable[[Served], Serving],
    limits: Limits,
    preferences: Path,
    say: Callable[[str], None],
) -> None:
    """Serve until told to end; `say` gets the address once all answer.

    Raises ServiceError when a checkpoint cannot be loaded, and ValueError for a port that is taken.
    """
    listening = bound(limits.host, limits.port)
    async with AsyncExitStack() as stack:
        stack.callback(listening.close)
        engines = [Engine(item, serving(item), waiting=limits.waiting) for item in served]
        for engine in engines:
            await stack.enter_async_context(engine)
        for engine in engines:
            await engine.load()
        config = uvicorn.Config(
            Server(engines, limits, preferences).application,
            http=Impatient,
            ws="none",
            log_level="warning",
            timeout_graceful_shutdown=3,
            lifespan="off",
            server_header=False,
        )
        take_up()
        shown = f"[{limits.host}]" if ":" in limits.host else limits.host
        say(f"http://{shown}:{listening.getsockname()[1]}")
        await uvicorn.Server(config).serve(sockets=[listening])
