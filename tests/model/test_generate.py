"""Generation: the cache, the padding and the batch change nothing; the noise is a pure function."""

import pytest
import torch

from conf.shape import ShapeConfig
from model.generate import generate, generate_batches, left_pad, uniform_noise
from model.transformer import Transformer, token_logprobs

PAD, EOS = 0, 3
SHAPE = ShapeConfig(dim=32, layers=2, heads=4, kv_heads=2, context=64)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]


@pytest.fixture(scope="module")
def model() -> Transformer:
    made = Transformer(SHAPE, 40, seed=3)
    with torch.no_grad():
        for parameter in made.parameters():  # larger weights: the choice of tokens must matter
            if parameter.dim() > 1:
                parameter.mul_(12.0)
    return made.requires_grad_(False).eval()


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
    batched = generate_batches(model, PROMPTS, batch_rows=2, **settings)  # type: ignore[arg-type]
    assert batched.ids.tolist() == together.ids.tolist()
    assert batched.ended.tolist() == together.ended.tolist()


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


def test_padding_is_at_the_left_and_absent_where_rows_are_equal() -> None:
    ids, padding = left_pad([[1, 2, 3], [4]], PAD)
    assert ids.tolist() == [[1, 2, 3], [PAD, PAD, 4]]
    assert padding is not None
    assert padding.tolist() == [0, 2]
    assert left_pad([[1, 2], [3, 4]], PAD)[1] is None


def test_what_does_not_fit_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="do not fit the context of 64"):
        generate(model, [[1] * 60], max_new_tokens=5, temperature=1, seed=0, eos=EOS, pad=PAD)
    with pytest.raises(ValueError, match="no tokens"):
        generate(model, [[1], []], max_new_tokens=5, temperature=1, seed=0, eos=EOS, pad=PAD)
