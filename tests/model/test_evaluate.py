"""Scoring counts every token once and gives what a plain forward pass gives."""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from conf.shape import ShapeConfig
from model.documents import windows_of
from model.scoring import score_requests
from model.transformer import Transformer
from storage.tokenizer import ChatTokenizer
from tasks.exams import Request
from tests.model.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 17, 40])
@pytest.mark.parametrize("step", [1, 4, 8])
def test_windows_score_every_label_once(length: int, step: int) -> None:
    tokens = list(range(length))
    windows = windows_of(0, tokens, context=8, step=step)
    scored = [token for window in windows for token in window.ids[-window.scored :]]
    assert sorted(scored) == tokens[1:]
    assert all(len(window.ids) <= 9 for window in windows)


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("context", [256, 40])
def test_what_is_shared_scores_as_a_plain_pass(
    tokenizer: ChatTokenizer, batch: int, context: int
) -> None:
    model = Transformer(
        ShapeConfig(dim=32, layers=2, context=context), tokenizer.vocabulary, seed=3
    )
    prefix = ("The cat is red. 猫是红色的。\n\n", "The dog is blue.\n\n") if context > 99 else ()
    asked = [
        (prefix, "猫是什么颜色？", ("红色", "blue and green", "白")),
        (prefix, "horse, the one that runs behind the house, 是什么颜色？", ("红色", "blue")),
        (prefix, "", ("dog", "cat")),
        ((), "the cat and the dog and the house are?", ("红", "白", "蓝", "绿")),
        ((), "", ("The cat is red.", "The cat are red.")),
    ]
    requests = [
        Request(
            id=str(index),
            group="exam_option",
            header="考试 exam\n\n" if shown else "",
            prefix=shown,
            prompt=prompt,
            continuations=continuations,
            right=0,
        )
        for index, (shown, prompt, continuations) in enumerate(asked)
    ]
    rows = [asdict(request) for request in requests]
    with torch.inference_mode():
        found = score_requests(model, tokenizer, rows, batch, lambda *_: None)
        for request, row in zip(requests, found, strict=True):
            before = request.header + "".join(request.prefix) + request.prompt
            cut = max(
                0,
                *(len(tokenizer.encode(before + text)) - context for text in request.continuations),
            )
            for text, value in zip(request.continuations, row["logprobs"], strict=True):
                ids = torch.tensor([[tokenizer.eos, *tokenizer.encode(before + text)][cut:]])
                start = len(tokenizer.encode(before)) - cut
                logprobs = F.log_softmax(model.logits(model.hidden(ids[:, :-1])), -1)
                want = logprobs[0].gather(1, ids[0, 1:, None])[start:].sum()
                assert value == pytest.approx(want.item(), abs=1e-4)


def test_too_long_prompt_loses_its_oldest_example_first(tokenizer: ChatTokenizer) -> None:
    model = Transformer(ShapeConfig(dim=16, layers=1, heads=2, context=24), tokenizer.vocabulary)
    ask = {"id": "1", "header": "", "prompt": "cat?", "continuations": ["red"], "right": 0}
    with torch.inference_mode():
        both, last = (
            score_requests(model, tokenizer, [{**ask, "prefix": prefix}], 64, lambda *_: None)
            for prefix in (("x" * 400, "dog "), ("dog ",))
        )
    assert both == last


def test_minimal_pairs_score_the_first_token_after_the_separator(tokenizer: ChatTokenizer) -> None:
    model = Transformer(ShapeConfig(dim=16, layers=1, heads=2, context=64), tokenizer.vocabulary)
    request = {
        "id": "1",
        "header": "",
        "prefix": [],
        "prompt": "",
        "continuations": ["猫"],
        "right": 0,
    }
    ids = torch.tensor([[tokenizer.eos, *tokenizer.encode("猫")]])
    with torch.inference_mode():
        (row,) = score_requests(model, tokenizer, [request], 64, lambda *_: None)
        logprobs = F.log_softmax(model.logits(model.hidden(ids[:, :-1])), -1)
    want = logprobs[0].gather(1, ids[0, 1:, None]).sum().item()
    assert row["logprobs"][0] == pytest.approx(want, abs=1e-5)
