"""Requests to `bessemer serve` that are no requests are refused at once and in a few words."""

import time

import pytest

from flows.openai_api import ChatRequest, CompletionRequest, Refused, parse

DEEP = 100_000


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize(
    "body",
    [
        b"[" * DEEP,
        b'{"a":' * DEEP,
        b'{"model": "m", "messages": ' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"model": "m", "prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"model": ' + b"9" * DEEP + b"}",
        b"\xff\xfe{",
        b"",
    ],
)
def test_a_body_that_is_no_request_is_refused(
    kind: type[ChatRequest | CompletionRequest], body: bytes
) -> None:
    began = time.process_time()
    with pytest.raises(Refused) as caught:
        parse(kind, body)
    assert len(str(caught.value)) < 400
    assert time.process_time() - began < 1
