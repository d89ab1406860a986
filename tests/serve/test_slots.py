"""Continuous batching: whoever joins and leaves, every row is what the full forward pass says."""

import itertools
from typing import cast

import pytest
import torch
from torch import nn

from conf.serving import Ask, Told
from conf.shape import ShapeConfig
from model import slots as slots_module
from model.generate import generate
from model.slots import Slots
from model.transformer import Transformer

PAD, EOS = 0, 3
SHAPE = ShapeConfig(dim=32, layers=2, heads=4, kv_heads=2, context=64)
WINDOWED = SHAPE.model_copy(update={"sliding_window": 7, "windowed_layers": (0,)})


def made_of(shape: ShapeConfig) -> Transformer:
    made = Transformer(shape, 40, seed=3)
    with torch.no_grad():
        for parameter in made.parameters():  # larger weights: the choice of tokens must matter
            if parameter.dim() > 1:
                parameter.mul_(12.0)
    return made.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return made_of(SHAPE)


def ask(key: int, prompt: list[int], tokens: int = 20, **more: object) -> Ask:
    given = {"stops": frozenset([EOS]), "temperature": 0.0, **more}
    return Ask(key=key, prompt=tuple(prompt), max_new_tokens=tokens, **given)  # type: ignore[arg-type]


def finish(slots: Slots, told: list[Told] | None = None) -> dict[int, list[Told]]:
    told = list(told or ())
    while not slots.is_idle:
        told += slots.step()
    by_key: dict[int, list[Told]] = {}
    for one in told:
        by_key.setdefault(one.key, []).append(one)
    return by_key


def greedy(model: Transformer, prompt: list[int], tokens: int) -> list[int]:
    """The likeliest token of the full forward pass, again and again."""
    ids = list(prompt)
    while len(ids) < len(prompt) + tokens and EOS not in ids[len(prompt) :]:
        ids.append(int(model.logits(model.hidden(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("shape", [SHAPE, WINDOWED])
@pytest.mark.parametrize("prefill_tokens", [512, 8])
def test_rows_that_join_late_get_the_likeliest_token_at_every_step(
    shape: ShapeConfig, prefill_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "PREFILL_TOKENS", prefill_tokens)
    model = made_of(shape)
    prompts = [
        [4 + (7 * key + place) % 30 for place in range(1 + 5 * key % 23)] for key in range(9)
    ]
    limits = [1 + 9 * key % 31 for key in range(9)]
    slots, told = Slots(model, rows=3, tokens=3 * 64), []
    for key, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        slots.add(ask(key, prompt, limit))
        told += [one for _ in range(key % 3) for one in slots.step()]
    found = finish(slots, told)
    for key, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        expected = greedy(model, prompt, limit)
        assert [one.token for one in found[key]] == expected
        assert [one.end for one in found[key][:-1]] == [""] * (len(expected) - 1)
        assert found[key][-1].end == ("stop" if expected[-1] == EOS else "length")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_answer_is_the_one_that_the_same_row_of_a_batch_gets(
    model: Transformer, temperature: float
) -> None:
    prompts = [[4 + key, 5, *range(6, 6 + key % 5)] for key in range(12)]
    rows, given = range(100, 112), {"temperature": temperature, "seed": 5}
    batch = generate(model, prompts, max_new_tokens=24, eos=EOS, pad=PAD, rows=rows, **given)  # type: ignore[arg-type]
    slots = Slots(model, rows=4, tokens=4 * 64)
    for key, prompt in enumerate(prompts):
        slots.add(ask(key, prompt, 24, row=rows[key], **given))
    found = finish(slots)
    for key in range(12):
        assert [one.token for one in found[key]] == batch.answer(key, keep_stop=True)


def test_the_cache_holds_no_more_tokens_than_allowed_and_none_is_overtaken(
    model: Transformer,
) -> None:
    slots = Slots(model, rows=8, tokens=128)
    for key, tokens in enumerate((59, 10, 59, 2)):
        slots.add(ask(key, [4, 5, 6, 7], tokens, stops=frozenset[int]()))
    started: dict[int, int] = {}
    for step in itertools.count():
        for one in slots.step():
            started.setdefault(one.key, step)
        lanes = slots._lanes  # pyright: ignore[reportPrivateUsage]
        rows, columns = lanes.room
        assert len(lanes.rows) * columns <= 128
        assert rows <= 8
        if slots.is_idle:
            break
    # Two rows of up to 63 places fit 128: the third waits for the second to end, the fourth for the
    # first. The n-th token of a row comes in step n - 1, one later when others joined before it.
    assert started == {0: 0, 1: 0, 2: 10, 3: 60}


def test_prompts_of_any_lengths_are_products_of_few_sizes() -> None:
    # oneDNN keeps code for each size: rows x columns of prompts, or one token of each live row.
    model = made_of(SHAPE.model_copy(update={"context": 1024, "layers": 1}))
    sizes: set[int] = set()

    def note(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        sizes.add(given[0].shape[0] * given[0].shape[1])

    cast("nn.Module", model.blocks[0]).query.register_forward_pre_hook(note)  # type: ignore[union-attr]
    slots = Slots(model, rows=4, tokens=4 * 1024)
    for key in range(200):
        slots.add(ask(key, [4] * (1 + 37 * key % 800), 1 + key % 3))
    assert len(finish(slots)) == 200
    few = {*range(1, 5), *range(16, 513, 16)}
    assert sizes <= few, sorted(sizes - few)


def test_a_dropped_answer_makes_room_at_once(model: Transformer) -> None:
    slots = Slots(model, rows=2, tokens=128)
    for key in range(4):
        slots.add(ask(key, [4 + key, 5], 30, stops=frozenset[int]()))
    first = slots.step()
    assert {one.key for one in first} == {0, 1}
    slots.drop(0)
    slots.drop(3)
    told = slots.step() + slots.step()
    assert [one.key for one in told] == [1, 2]
    found = finish(slots, told)
    assert set(found) == {1, 2}
    expected = _endless(model, [5, 5], 30)
    kept = [one.token for one in first if one.key == 1] + [one.token for one in found[1]]
    assert kept == expected


def _endless(model: Transformer, prompt: list[int], tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(model.logits(model.hidden(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_prompt_dropped_while_it_is_read_is_not_answered(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "PREFILL_TOKENS", 4)
    slots = Slots(model, rows=2, tokens=128)
    slots.add(ask(0, list(range(4, 24))))
    assert slots.step() == []
    slots.drop(0)
    assert finish(slots) == {}


def test_top_k_and_top_p_leave_out_the_unlikely(model: Transformer) -> None:
    prompt = [5, 6]
    shares = (model.logits(model.hidden(torch.tensor([prompt])))[0, -1] / 5.0).softmax(-1)
    order = shares.argsort(descending=True).tolist()
    mass = list(itertools.accumulate(shares[token].item() for token in order))
    nucleus = 1 + next(place for place, total in enumerate(mass) if total >= 0.8)
    of_six = 1 + next(place for place, total in enumerate(mass) if total >= 0.8 * mass[5])
    assert 1 < of_six < 6 < nucleus < 39
    rows = 1500
    for given, allowed in (
        ({"top_k": 6}, 6),
        ({"top_p": 0.8}, nucleus),
        ({"top_k": 6, "top_p": 0.8}, of_six),
        ({"top_k": 1}, 1),
        ({}, 40),
    ):
        slots = Slots(model, rows=rows, tokens=rows * 64)
        for row in range(rows):
            slots.add(ask(row, prompt, 1, temperature=5.0, row=row, **given))
        found = finish(slots)
        tokens = torch.tensor([found[row][0].token for row in range(rows)])
        counts = torch.bincount(tokens, minlength=40) / rows
        expected = torch.zeros(40)
        expected[order[:allowed]] = shares[order[:allowed]]
        assert counts[order[allowed:]].sum() == 0
        # 4.5 standard errors of the worst share
        difference = (counts - expected / expected.sum()).abs().max()
        assert float(difference) < 4.5 * 0.5 / rows**0.5


def test_the_smallest_temperature_takes_the_likeliest_token(model: Transformer) -> None:
    slots = Slots(model, rows=2, tokens=128)
    for key, temperature in enumerate((1e-38, 5e-324)):
        slots.add(ask(key, [5, 6], 8, temperature=temperature, seed=key))
    for told in finish(slots).values():
        assert [one.token for one in told] == greedy(model, [5, 6], 8)


def test_log_probabilities_are_those_of_the_full_forward_pass(model: Transformer) -> None:
    slots = Slots(model, rows=4, tokens=256)
    slots.add(ask(0, [5, 6, 7], 12, temperature=0.7, logprobs=3))
    slots.add(ask(1, [9], 12))
    found = finish(slots)
    ids = [5, 6, 7]
    for one in found[0]:
        expected = model.logits(model.hidden(torch.tensor([ids])))[0, -1].log_softmax(-1)
        assert one.logprob == pytest.approx(expected[one.token].item(), abs=1e-4)
        assert one.top is not None
        assert [token for token, _ in one.top] == expected.topk(3).indices.tolist()
        ids.append(one.token)
    assert found[1][0].logprob is None


def test_bfloat16_weights_answer_as_their_full_forward_pass_up_to_rounding() -> None:
    model = made_of(SHAPE).bfloat16()
    slots = Slots(model, rows=2, tokens=128)
    slots.add(ask(0, [5, 6, 7], 12, logprobs=0))
    ids = [5, 6, 7]
    for one in finish(slots)[0]:
        expected = model.logits(model.hidden(torch.tensor([ids])))[0, -1].float().log_softmax(-1)
        assert one.logprob == pytest.approx(expected[one.token].item(), abs=0.3)
        ids.append(one.token)


def test_what_can_never_fit_is_refused(model: Transformer) -> None:
    slots = Slots(model, rows=2, tokens=64)
    with pytest.raises(ValueError, match="do not fit the context of 64"):
        slots.add(ask(0, [4] * 60, 5))
    with pytest.raises(ValueError, match="does not hold one row"):
        Slots(model, rows=2, tokens=63)
