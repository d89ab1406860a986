"""Settings of every stage that asks a model behind an endpoint."""

from typing import Annotated

from pydantic import Field

from conf.settings import RUNTIME, Settings


class EndpointConfig(Settings):
    """Which model is asked, where, and at what cost at most."""

    model: str
    """Name of the model, as the endpoint knows it; part of identity."""
    base_url: Annotated[str, RUNTIME, Field(pattern=r"^https?://")] = "http://127.0.0.1:8000/v1"
    """Address of the endpoint, what comes before `/chat/completions`; its host is written to the record."""
    key_variable: Annotated[str | None, RUNTIME] = None
    """Name of the environment variable that holds the endpoint's key; the key itself is kept nowhere."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Of the endpoint's sampling."""
    max_answer_tokens: Annotated[int, Field(ge=1)] = 1024
    """Tokens that an answer may have; one that is cut off there is refused."""
    max_requests: Annotated[int, Field(ge=1)] = 10_000
    """Requests that may be sent, repeated ones included; what has come by then is the result."""
    max_total_tokens: Annotated[int, Field(ge=1)] = 10_000_000
    """Tokens of prompts and answers, as the endpoint counts them, that may be used. A request is sent only if
    its longest possible answer would still fit."""
    concurrency: Annotated[int, RUNTIME, Field(ge=1, le=256)] = 4
    """Requests under way at once."""
    attempts: Annotated[int, RUNTIME, Field(ge=1)] = 6
    """How often a question is asked when the endpoint fails, is busy or answers nothing usable; the pauses
    between double from one second."""
    wait_seconds: Annotated[float, RUNTIME, Field(gt=0)] = 120.0
    """How long an answer may keep still before the request counts as failed."""
