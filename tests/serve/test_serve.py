"""The server under bad requests, readers that leave, too many of them, and without a token."""

import asyncio
import gc
import json
import random
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from conf.pairs import PairsConfig
from conf.serving import Serving
from conf.settings import SourceSpec
from flows.answering import Engine
from flows.runs import Home
from flows.serve import Limits, Server, read_token
from flows.served import find_served
from tests.serve.conftest import ROWS, WAITING, Running, serving
from tests.tasks.test_pairs import run as run_pairs

CHAT = "/v1/chat/completions"
LONG = {
    "model": "one",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 4000,
    "temperature": 0,
}
SHORT = {**LONG, "max_tokens": 4}
MANY = {**LONG, "n": ROWS + WAITING}


def open_answers(server: Running) -> int:
    return httpx.get(f"{server.url}/health").json()["models"]["one"]["open_answers"]


def until(server: Running, count: int) -> None:
    deadline = time.monotonic() + 20
    while open_answers(server) != count:
        assert time.monotonic() < deadline, open_answers(server)
        time.sleep(0.02)


def seconds_computed(server: Running) -> float:
    """Processor time of the models so far."""
    times = (child.cpu_times() for child in psutil.Process(server.pid).children())
    return sum(time.user + time.system for time in times)


@pytest.fixture(scope="module")
def seconds_of_many(server: Running) -> float:
    """Processor time that the answers to MANY take."""
    until(server, 0)
    began = seconds_computed(server)
    assert httpx.post(server.url + CHAT, json=MANY, timeout=100).status_code == 200
    return seconds_computed(server) - began


def malformed(number: int) -> tuple[str, bytes, dict[str, str]]:
    """A request that nobody should get through: path, body, headers."""
    draw = random.Random(number)
    kind = {"content-type": "application/json"}
    path = draw.choice([CHAT, "/v1/completions", "/preferences"])
    good = json.dumps({**SHORT, "prompt": "hi"} if path == "/v1/completions" else SHORT).encode()
    junk = draw.choice(
        [None, True, -1, 1e99, "", "x", [], {}, [[]], "\ud800", {"a": [None]}, [1, "a"]]
    )
    field = draw.choice(
        ["messages", "model", "max_tokens", "temperature", "stop", "n", "top_p", "nix"]
    )
    # `stop`, `n`, ... may be null or have some of these values: those stay wrong through `messages`.
    wrong: dict[str, Any] = {**SHORT, field: junk, "messages": [{"role": "user", "content": junk}]}
    if isinstance(junk, str):
        wrong["messages"] = [{"role": draw.choice(["tool", "", "USER"]), "content": junk}]
    bodies = [
        bytes(draw.randrange(256) for _ in range(draw.randrange(60))),
        good[: draw.randrange(len(good))],
        good + draw.choice([b"}", b",", b"\x00", b"[]"]),
        b"[" * draw.choice([1, 200, 100_000]),
        b'{"model": "one", "messages": NaN}',
        json.dumps({"model": "one"}).encode(),
        json.dumps(junk).encode(),
        json.dumps(wrong).encode(),
        json.dumps({**SHORT, "prompt": [10**12], "messages": []}).encode(),
        json.dumps({**SHORT, "stream": "yes"}).encode(),
        json.dumps({**SHORT, "model": "none"}).encode(),
        json.dumps({**SHORT, "tools": [{"type": "function"}], "echo": True}).encode(),
        json.dumps({**SHORT, "max_tokens": 10**9})
        .encode()
        .replace(b'"one"', b'"one", "prompt": 1'),
    ]
    if draw.random() < 0.1:
        kind = {"content-type": draw.choice(["text/plain", "application/xml", ""])}
        return path, good, kind
    if draw.random() < 0.1:
        return (
            draw.choice(["/v1/nix", "/v1", "/preferences/x", "/v2/chat", "/v1/models/none"]),
            good,
            kind,
        )
    return path, draw.choice(bodies), kind


def refuse(server: Running, count: int) -> None:
    with httpx.Client(base_url=server.url, timeout=30) as client:

        def ask(number: int) -> tuple[int, int, Any]:
            path, body, headers = malformed(number)
            method = "GET" if path == "/v1/models/none" else "POST"
            told = client.request(method, path, content=body, headers=headers)
            return number, told.status_code, told.json()

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(count)))
    for number, status, told in answers:
        assert 400 <= status < 500, (number, status, malformed(number))
        assert set(told["error"]) == {"message", "type", "param", "code"}
        assert told["error"]["message"]
    assert httpx.post(server.url + CHAT, json=SHORT).status_code == 200
    assert open_answers(server) == 0


def test_malformed_requests_are_refused_with_a_reason(server: Running) -> None:
    refuse(server, 200)


@pytest.mark.soak
def test_a_thousand_malformed_requests_are_refused_with_a_reason(server: Running) -> None:
    refuse(server, 1000)


@pytest.mark.soak
def test_memory_stays_flat_under_load(server: Running) -> None:
    def resident() -> int:
        parent = psutil.Process(server.pid)
        return sum(one.memory_info().rss for one in (parent, *parent.children(recursive=True)))

    each_its_own = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=server.url, timeout=60, limits=each_its_own) as client:

        def ask(number: int) -> int:
            prompt = "猫吃什么？" * (1 + number % 40)
            body = {**SHORT, "messages": [{"role": "user", "content": prompt}], "temperature": 1}
            return client.post(CHAT, json={**body, "max_tokens": 1 + number % 300}).status_code

        sizes: list[int] = []
        with ThreadPoolExecutor(ROWS) as pool:
            for _ in range(6):
                assert set(pool.map(ask, range(400))) == {200}
                sizes.append(resident())
    assert sizes[-1] < sizes[1] * 1.02, sizes


def test_nothing_is_kept_of_requests_that_ended(policies: dict[str, Path], tmp_path: Path) -> None:
    own = {"flows.serve", "flows.answering", "flows.answer_text", "flows.openai_api"}

    def kept() -> Counter[str]:
        gc.collect()
        found = Counter(
            type(one).__name__ for one in gc.get_objects() if type(one).__module__ in own
        )
        return found + Counter(tasks=len(asyncio.all_tasks()))

    async def ask(client: httpx.AsyncClient) -> None:
        for body in (
            SHORT,
            {**SHORT, "stream": True, "n": 3},
            {**SHORT, "stop": ["a"]},
            {"model": "one"},
        ):
            await client.post(CHAT, json=body)
        with pytest.raises(TimeoutError):  # a reader that leaves
            await asyncio.wait_for(client.post(CHAT, json={**LONG, "stream": True}), 0.2)

    async def counted() -> tuple[Counter[str], Counter[str]]:
        [served] = find_served([f"one={policies['one']}"], Home(tmp_path))
        async with Engine(served, Serving(folder=str(served.folder))) as engine:
            await engine.load()
            app = Server([engine], Limits(), tmp_path / "rated.jsonl").application
            to_app = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=to_app, base_url="http://127.0.0.1") as client:
                before = kept()
                await asyncio.gather(*(ask(client) for _ in range(8)))
                assert engine.open_answers == 0
                return before, kept()

    before, after = asyncio.run(counted())
    assert before["Engine"] == 1
    # What the last token was for is a variable of the loop that waits for the next one.
    assert (after - before).total() <= 1, after - before


def test_what_is_no_http_is_refused(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for junk in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(junk + b"\r\n\r\n")
            assert connection.recv(64).startswith(b"HTTP/1.1 40")


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_reader_that_leaves_makes_room(
    server: Running, seconds_of_many: float, is_streamed: bool
) -> None:
    until(server, 0)
    body = json.dumps({**MANY, "stream": is_streamed}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if is_streamed:
            assert connection.recv(64).startswith(b"HTTP/1.1 200")
        until(server, ROWS + WAITING)
    began = seconds_computed(server)
    until(server, 0)
    assert httpx.post(server.url + CHAT, json=SHORT).status_code == 200
    assert seconds_computed(server) - began < seconds_of_many / 2


def test_when_too_many_wait_the_next_is_told_to_come_again(server: Running) -> None:
    until(server, 0)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        with client.stream("POST", CHAT, json={**MANY, "stream": True}) as told:
            assert told.status_code == 200
            late = httpx.post(server.url + CHAT, json=SHORT)
            assert late.status_code == 429
            assert late.headers["retry-after"] == "1"
            assert late.json()["error"]["type"] == "rate_limit_error"
            # the other checkpoint has room
            assert httpx.post(server.url + CHAT, json={**SHORT, "model": "two"}).status_code == 200
        until(server, 0)
        assert client.post(CHAT, json=SHORT).status_code == 200


def test_more_answers_than_are_ever_taken_are_not_asked_to_come_again(server: Running) -> None:
    refused = httpx.post(server.url + CHAT, json={**SHORT, "n": ROWS + WAITING + 1})
    assert refused.status_code == 400
    assert "9 answers are asked for in one request; this server takes 8" in refused.text


def test_a_top_k_that_no_float_holds_is_all_tokens(server: Running) -> None:
    drawn = {**SHORT, "temperature": 1, "seed": 5}
    answers = [
        httpx.post(server.url + CHAT, json={**drawn, "top_k": top_k}, timeout=30).json()["choices"]
        for top_k in (10**400, 0)
    ]
    assert answers[0] == answers[1]


def test_a_token_is_asked_for_and_time_outs_and_a_dead_model_are_told(
    tmp_path: Path, policies: dict[str, Path]
) -> None:
    options = ("--request-seconds", "2", "--token-env", "CHAT_TOKEN", "--precision", "bf16")
    with serving(tmp_path, {"one": policies["one"]}, *options, CHAT_TOKEN="密钥") as server:
        assert httpx.post(server.url + CHAT, json=SHORT).status_code == 401
        assert httpx.get(f"{server.url}/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
        shown = {b"Authorization": "Bearer 密钥".encode()}
        assert httpx.post(server.url + CHAT, json=SHORT, headers=shown).status_code == 200
        everything = {**LONG, "n": 16}
        late = httpx.post(server.url + CHAT, json=everything, headers=shown, timeout=30)
        assert late.status_code == 504
        body = {**everything, "stream": True}
        streamed = httpx.post(server.url + CHAT, json=body, headers=shown, timeout=30).text
        assert '"code":"timeout"' in streamed
        assert streamed.endswith("data: [DONE]\n\n")
        until(server, 0)
        (worker,) = psutil.Process(server.pid).children()
        worker.kill()
        worker.wait(10)
        died = httpx.post(server.url + CHAT, json=SHORT, headers=shown)
        assert died.status_code == 503
        assert "start the server again" in died.json()["error"]["message"]
        assert httpx.get(f"{server.url}/health").status_code == 503


def test_a_name_that_is_not_this_machines_is_refused(server: Running) -> None:
    told = httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"})
    assert told.status_code == 400


def test_others_are_served_only_with_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_token(None, "127.0.0.1") == ""
    with pytest.raises(ValueError, match="--token-env"):
        read_token(None, "0.0.0.0")
    monkeypatch.setenv("CHAT_TOKEN", "")
    with pytest.raises(ValueError, match="CHAT_TOKEN is empty"):
        read_token("CHAT_TOKEN", "127.0.0.1")


def test_rated_answers_become_pairs(server: Running, tmp_path: Path) -> None:
    server.preferences.unlink(missing_ok=True)
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "猫吃什么？"},
    ]
    body = {
        "prompt": prompt, "chosen": "鱼。", "rejected": "猫吃\u2028什么",
        "chosen_model": "one", "rejected_model": "two",
    }  # fmt: skip
    assert httpx.post(f"{server.url}/preferences", json=body).status_code == 201
    same = {**body, "rejected": " 鱼。"}
    assert httpx.post(f"{server.url}/preferences", json=same).status_code == 400
    settings = PairsConfig(sources=(SourceSpec(path=str(server.preferences)),), held_share=0)
    (pair,) = run_pairs(tmp_path, settings, tmp_path)[0].rows("train")
    assert [dict(message) for message in pair["prompt"]] == prompt
    assert (pair["chosen"], pair["rejected"]) == (body["chosen"], body["rejected"])
