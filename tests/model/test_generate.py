"""Generation: the cache, the padding and the batch change nothing; the noise is a pure function."""

from typing import Any

import pytest
import torch

from conf.shape import ShapeConfig
from model.generate import draw, generate, uniform_noise
from model.transformer import Transformer, token_logprobs

PAD, EOS = 0, 3
SHAPE = ShapeConfig(dim=32, layers=2, heads=4, kv_heads=2, context=64)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]


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


def test_cached_log_probabilities_are_those_of_a_full_forward_pass(model: Transformer) -> None:
    found = generate(model, PROMPTS, max_new_tokens=20, temperature=0.7, seed=1, eos=EOS, pad=PAD)
    for row, prompt in enumerate(PROMPTS):
        answer = found.answer(row, keep_stop=True)
        ids = torch.tensor([prompt + answer])
        hidden = model.hidden(ids)[:, len(prompt) - 1 : -1]
        expected = token_logprobs(model.head_weight, hidden, ids[:, len(prompt) :], 0.7)
        torch.testing.assert_close(
            found.logprobs[row, : len(answer)], expected[0], rtol=1e-4, atol=1e-5
        )


def test_an_answer_does_not_depend_on_the_rows_beside_it(model: Transformer) -> None:
    settings = {"max_new_tokens": 20, "temperature": 1.0, "seed": 7, "eos": EOS, "pad": PAD}
    together = generate(model, PROMPTS, **settings)  # type: ignore[arg-type]
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], rows=[row], **settings)  # type: ignore[arg-type]
        assert alone.answer(0, keep_stop=True) == together.answer(row, keep_stop=True)


@pytest.fixture(scope="module")
def exact() -> Transformer:
    """In float64: which rows are computed together moves no token."""
    return made_of(SHAPE).double()


@pytest.mark.parametrize("at_once", [1, 4, 16])
def test_who_is_answered_when_changes_no_answer(exact: Transformer, at_once: int) -> None:
    prompts = [
        [4 + (5 * row + place) % 30 for place in range(1 + 7 * row % 19)] for row in range(40)
    ]
    settings = {"max_new_tokens": 44, "temperature": 4.0, "seed": 3, "eos": EOS, "pad": PAD}
    whole = generate(exact, prompts, **settings)  # type: ignore[arg-type]
    found = generate(exact, prompts, at_once=at_once, **settings)  # type: ignore[arg-type]
    assert 10 < int(whole.ended.sum()) < 40
    assert found.ids.tolist() == whole.ids.tolist()
    assert found.ended.tolist() == whole.ended.tolist()
    torch.testing.assert_close(found.logprobs, whole.logprobs, rtol=0, atol=1e-5)


def test_waiting_prompts_take_the_places_of_answers_that_ended(
    exact: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[4 + row] for row in range(30)] * 2
    settings = {"max_new_tokens": 60, "temperature": 4.0, "seed": 0, "eos": EOS, "pad": PAD}
    read: list[tuple[int, int]] = []
    hidden = Transformer.hidden

    def counted(model: Transformer, ids: torch.Tensor, **given: Any) -> torch.Tensor:
        read.append((ids.shape[0], ids.shape[1]))
        return hidden(model, ids, **given)

    monkeypatch.setattr(Transformer, "hidden", counted)
    found = generate(exact, prompts, at_once=8, **settings)  # type: ignore[arg-type]
    tokens = int(found.lengths.sum())
    steps = sum(1 for rows, _ in read if rows)
    assert all(rows <= 8 for rows, _ in read)
    # Batches that wait for their longest answers need far more steps.
    apart = sum(int(found.lengths[start : start + 8].max()) for start in range(0, 60, 8))
    assert steps < 0.7 * apart
    assert tokens / steps > 0.6 * 8


def test_equal_prompts_are_read_once(exact: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    hidden = Transformer.hidden

    def counted(model: Transformer, ids: torch.Tensor, **given: Any) -> torch.Tensor:
        read.append(ids.numel())
        return hidden(model, ids, **given)

    monkeypatch.setattr(Transformer, "hidden", counted)
    prompts = [[5, 6, 7, 8, 9]] * 6 + [[7, 7, 7, 7]] * 6
    found = generate(exact, prompts, max_new_tokens=8, temperature=1.0, seed=0, eos=EOS, pad=PAD)
    assert read[0] == 2 * 5
    assert len({tuple(row) for row in found.ids[:6].tolist()}) > 1
    for row, prompt in enumerate(prompts):  # each goes on from its own prompt alone
        alone = generate(
            exact, [prompt], max_new_tokens=8, temperature=1.0, seed=0, eos=EOS, pad=PAD, rows=[row]
        )
        assert alone.answer(0, keep_stop=True) == found.answer(row, keep_stop=True)


def test_an_answer_stops_behind_its_stop_token_or_at_the_limit(model: Transformer) -> None:
    prompts = [[token] for token in range(4, 36)]
    found = generate(model, prompts, max_new_tokens=25, temperature=1.0, seed=0, eos=EOS, pad=PAD)
    assert 0 < int(found.ended.sum()) < len(prompts)  # both cases occur
    for row in range(len(prompts)):
        length = int(found.lengths[row])
        ids = found.ids[row].tolist()
        assert ids[length:] == [PAD] * (len(ids) - length)
        assert found.logprobs[row, length:].tolist() == [0.0] * (len(ids) - length)
        assert (EOS in ids) == bool(found.ended[row])
        if found.ended[row]:
            assert ids.index(EOS) == length - 1
            assert found.answer(row) == ids[: length - 1]
        else:
            assert length == 25


def test_greedy_takes_the_likeliest_token_at_every_step(model: Transformer) -> None:
    found = generate(model, PROMPTS, max_new_tokens=6, temperature=0.0, seed=0, eos=EOS, pad=PAD)
    ids = list(PROMPTS[0])
    for token in found.answer(0, keep_stop=True):
        assert token == int(model.logits(model.hidden(torch.tensor([ids])))[0, -1].argmax())
        ids.append(token)


def test_sampling_follows_the_distribution(model: Transformer) -> None:
    rows = 4000
    found = generate(
        model, [[5, 6]] * rows, max_new_tokens=1, temperature=2.0, seed=5, eos=EOS, pad=PAD
    )
    expected = (model.logits(model.hidden(torch.tensor([[5, 6]])))[0, -1] / 2.0).softmax(-1)
    seen = torch.bincount(found.ids[:, 0], minlength=40) / rows
    # 4.5 standard errors of the worst of 40 shares
    assert float((seen - expected).abs().max()) < 4.5 * 0.5 / rows**0.5


def test_noise_is_uniform_and_a_function_of_seed_row_and_step() -> None:
    noise = uniform_noise(11, range(200), 50)
    assert float(noise.min()) > 0.0
    assert float(noise.max()) < 1.0
    assert float(noise.mean()) == pytest.approx(0.5, abs=4 * (1 / 12) ** 0.5 / 100)
    assert uniform_noise(11, [199], 10)[0].tolist() == noise[199, :10].tolist()
    assert (
        len(
            set(uniform_noise(12, range(200), 50).flatten().tolist())
            & set(noise.flatten().tolist())
        )
        < 60
    )


def test_the_largest_noise_draws_no_token_that_has_no_share() -> None:
    # Its 24 bits are all 1: half a step more would be rounded up to 1.
    noise = uniform_noise(5, [511_201], 6)[0, 5:]
    assert noise.item() == 1 - 2**-24
    assert draw(torch.tensor([[0.5, 0.5, 0.0]]), noise).tolist() == [1]


def test_what_does_not_fit_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="do not fit the context of 64"):
        generate(model, [[1] * 60], max_new_tokens=5, temperature=1, seed=0, eos=EOS, pad=PAD)
    with pytest.raises(ValueError, match="no tokens"):
        generate(model, [[1], []], max_new_tokens=5, temperature=1, seed=0, eos=EOS, pad=PAD)
