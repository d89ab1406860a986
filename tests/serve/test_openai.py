"""The API as OpenAI's own client sees it, against the model itself."""

import threading
from typing import Any

import openai
import pytest
import torch

from model.generate import generate
from tests.serve.conftest import Running

HELLO = [{"role": "user", "content": "猫吃什么？"}]


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def expected(server: Running, ids: list[int], tokens: int, **sampling: Any) -> list[int]:
    """What the model itself answers, up to the first stop token."""
    own = server.tokenizer
    given = {"temperature": 0.0, "seed": 0, "eos": own.im_end, "pad": own.pad, **sampling}
    answer = generate(server.model, [ids], max_new_tokens=tokens, **given).answer(0)
    return answer[: answer.index(own.eos)] if own.eos in answer else answer


def test_an_answer_is_what_the_model_says_to_the_rendered_conversation(
    server: Running, client: openai.OpenAI
) -> None:
    ids = server.tokenizer.render(HELLO, for_generation=True).ids  # type: ignore[arg-type]
    answer = expected(server, ids, 40)
    told = client.chat.completions.create(model="one", messages=HELLO, temperature=0, max_tokens=40)  # type: ignore[call-overload]
    assert told.choices[0].message.content == server.tokenizer.decode(answer)
    assert told.usage.prompt_tokens == len(ids)
    assert told.usage.completion_tokens == len(answer)
    drawn = expected(server, ids, 40, temperature=0.9, seed=12)
    told = client.chat.completions.create(
        model="one", messages=HELLO, temperature=0.9, seed=12, max_tokens=40
    )  # type: ignore[call-overload]
    assert told.choices[0].message.content == server.tokenizer.decode(drawn)


def test_streamed_pieces_are_the_whole_and_cut_no_character(
    server: Running, client: openai.OpenAI
) -> None:
    given: Any = {"model": "one", "messages": HELLO, "max_tokens": 200, "seed": 3, "n": 3}
    whole = client.chat.completions.create(**given)
    pieces: list[list[str]] = [[], [], []]
    ends: list[str | None] = [None] * 3
    usage = None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(**given, stream=True, stream_options=options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces[choice.index].append(choice.delta.content or "")
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert [len(own) > 3 for own in pieces] == [True] * 3
    assert ["".join(own) for own in pieces] == [c.message.content for c in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    # Random weights write many halves of characters; the whole characters among them stay whole.
    assert any("\u4e00" <= sign <= "\u9fff" for own in pieces for sign in "".join(own))


def test_completions_of_text_and_of_ids_and_their_log_probabilities(
    server: Running, client: openai.OpenAI
) -> None:
    own = server.tokenizer
    ids = [own.eos, *own.encode("The cat is")]
    answer = expected(server, ids, 12)
    given: Any = {"model": "one", "temperature": 0, "max_tokens": 12, "logprobs": 2}
    told = client.completions.create(prompt=["The cat is", "猫"], **given)
    assert len(told.choices) == 2
    first = told.choices[0]
    assert first.text == own.decode(answer)
    logits = server.model.logits(server.model.hidden(torch.tensor([ids + answer])))[0]
    logprobs = logits.log_softmax(-1)[len(ids) - 1 : -1]
    assert first.logprobs is not None
    assert first.logprobs.token_logprobs == pytest.approx(
        [float(row[token]) for row, token in zip(logprobs, answer, strict=True)], abs=1e-4
    )
    by_ids = client.completions.create(prompt=ids, **given)
    assert by_ids.choices[0].text == first.text
    talk = client.chat.completions.create(
        model="one", messages=HELLO, max_tokens=3, temperature=0, logprobs=True, top_logprobs=4
    )  # type: ignore[call-overload]
    for token in talk.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 4
        assert token.logprob == token.top_logprobs[0].logprob  # greedy takes the likeliest


def test_nothing_from_a_stop_string_on_is_told(server: Running, client: openai.OpenAI) -> None:
    given: Any = {"model": "one", "messages": HELLO, "temperature": 0, "max_tokens": 60}
    whole = client.chat.completions.create(**given).choices[0].message.content
    stop = whole[20:23]
    cut = client.chat.completions.create(**given, stop=["never there", stop]).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.message.content == whole[: whole.index(stop)]
    stream = client.chat.completions.create(**given, stop=stop, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == cut.message.content


def test_checkpoints_side_by_side_answer_under_their_names(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["one", "two"]
    assert client.models.retrieve("two").owned_by == "bessemer"
    said = [
        client.chat.completions.create(model=name, messages=HELLO, temperature=0, max_tokens=30)
        .choices[0]
        .message.content
        for name in ("one", "two")
    ]  # type: ignore[call-overload]
    assert said[0] != said[1]


def test_many_at_once_are_each_answered_as_alone(client: openai.OpenAI) -> None:
    questions = [f"Tell me about number {number}. 第{number}号？" for number in range(8)]

    def ask(question: str) -> str:
        told = client.chat.completions.create(
            model="one",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=50,
        )
        return told.choices[0].message.content or ""

    alone = [ask(question) for question in questions]
    found: dict[str, str] = {}
    threads = [
        threading.Thread(target=lambda q=q: found.setdefault(q, ask(q)))  # type: ignore[misc]
        for q in questions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[question] for question in questions] == alone


def test_what_is_wrong_is_told_in_the_clients_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there are one, two"):
        client.chat.completions.create(model="three", messages=HELLO)  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model="one", messages=HELLO, temperature=3)  # type: ignore[call-overload]
    assert caught.value.param == "temperature"
    # 64 bytes for each of 4096 tokens are read at most: 87,381 characters of 3 bytes.
    for chars, found in (
        (5000, "of the prompt"),
        (87_381, "of the prompt"),
        (87_382, "262146 bytes"),
    ):
        long = [{"role": "user", "content": "猫" * chars}]
        with pytest.raises(openai.BadRequestError, match=f"{found}.* do not fit") as caught:
            client.chat.completions.create(model="one", messages=long)  # type: ignore[call-overload]
        assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="262145 bytes do not fit") as caught:
        client.completions.create(model="one", prompt=["hi", "a" * 262_145])
    assert caught.value.param == "prompt"
