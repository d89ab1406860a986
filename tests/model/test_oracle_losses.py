"""Losses and gradients of SFT, reward and DPO equal TRL's on TRL's own batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.batches import Batch
from model.dpo import answer_logprobs, dpo_loss
from model.reward import last_token_scores, reward_loss
from model.sft import sft_loss
from model.transformer import AttentionMask, Transformer, token_logprobs
from tests.model.oracle import gradient_norms, oracle_arrays, oracle_model, oracle_numbers

TOLERANCE = 1e-5
BETA = 0.1


def expect(loss: Tensor, model: Transformer, expected: dict[str, Any]) -> None:
    """The loss, the norm of all gradients and of each parameter's are the oracle's."""
    assert loss.item() == pytest.approx(expected["loss"], rel=TOLERANCE)
    loss.backward()
    total, each = gradient_norms(model)
    assert total == pytest.approx(expected["grad_norm"]["total"], rel=TOLERANCE)
    for name, norm in expected["grad_norm"]["per_param"].items():
        assert each[name] == pytest.approx(norm, rel=TOLERANCE, abs=1e-6), name


@pytest.fixture
def expected(shared_oracle: Path) -> dict[str, Any]:
    return oracle_numbers(shared_oracle / "expected.json")


@pytest.mark.parametrize("name", ["sft_assistant_only", "sft_all_tokens"])
def test_sft(name: str, shared_oracle: Path, expected: dict[str, Any]) -> None:
    model = oracle_model(shared_oracle, "policy")
    arrays = oracle_arrays(shared_oracle / "batches.npz", name)
    labels = arrays["labels"][:, 1:]
    tokens = float((labels >= 0).sum())
    batch = Batch({"ids": arrays["input_ids"][:, :-1], "labels": labels}, {"tokens": tokens}, 0)
    expect(sft_loss(model, batch, {"tokens": tokens})["loss"], model, expected[name])


def test_sft_in_micro_batches_has_the_gradient_of_the_whole_step(
    shared_oracle: Path, expected: dict[str, Any]
) -> None:
    model = oracle_model(shared_oracle, "policy")
    arrays = oracle_arrays(shared_oracle / "batches.npz", "sft_assistant_only")
    labels = arrays["labels"][:, 1:]
    totals = {"tokens": float((labels >= 0).sum())}
    loss = torch.zeros(())
    for row in range(3):
        batch = Batch(
            {"ids": arrays["input_ids"][row : row + 1, :-1], "labels": labels[row : row + 1]}, {}, 0
        )
        loss = loss + sft_loss(model, batch, totals)["loss"]
    expect(loss, model, expected["sft_assistant_only"])


def test_packed_dialogues_do_not_see_one_another(
    shared_oracle: Path, expected: dict[str, Any]
) -> None:
    model = oracle_model(shared_oracle, "policy")
    arrays = oracle_arrays(shared_oracle / "batches.npz", "sft_packed_bfd")
    ids, labels, positions = (
        arrays[key][:, :-1] if key != "labels" else arrays[key][:, 1:]
        for key in ("input_ids", "labels", "position_ids")
    )
    documents = (positions == 0).cumsum(1)
    hidden = model.hidden(ids, positions=positions, mask=AttentionMask(documents=documents))
    loss = -token_logprobs(model.head_weight, hidden, labels).sum() / (labels >= 0).sum()
    expect(loss, model, expected["sft_packed_bfd"])


@pytest.mark.parametrize(("name", "centring"), [("rm", 0.0), ("rm_center", 0.01), ("rm_margin", 0)])
def test_reward(name: str, centring: float, shared_oracle: Path, expected: dict[str, Any]) -> None:
    model = oracle_model(shared_oracle, "reward")
    arrays = oracle_arrays(shared_oracle / "batches.npz", name)
    scores = last_token_scores(model, arrays["input_ids"], arrays["attention_mask"].sum(1))
    torch.testing.assert_close(scores, arrays["scores"], rtol=TOLERANCE, atol=1e-6)
    chosen, rejected = scores.chunk(2)
    margin = arrays.get("margin", torch.zeros(3))
    loss = reward_loss(chosen, rejected, margin, centring=centring).mean()
    expect(loss, model, expected[name])


def dpo_inputs(folder: Path, model: Transformer) -> tuple[list[Tensor], Tensor, Tensor]:
    """Chosen and rejected log-probabilities of policy and reference, (3,) each, the answers' lengths
    and the policy's log-probabilities per token."""
    arrays = oracle_arrays(folder / "batches.npz", "dpo")
    ids, mask = arrays["input_ids"], arrays["completion_mask"].bool()[:, 1:]
    labels = torch.where(mask, ids[:, 1:], -1)
    per_token = token_logprobs(model.head_weight, model.hidden(ids[:, :-1]), labels)
    torch.testing.assert_close(
        per_token[mask], arrays["policy_per_token_logps"][mask], rtol=TOLERANCE, atol=1e-5
    )
    policy = answer_logprobs(model, ids[:, :-1], labels)
    with torch.no_grad():
        reference = answer_logprobs(oracle_model(folder, "ref"), ids[:, :-1], labels)
    torch.testing.assert_close(reference[:3], arrays["ref_chosen_logps"], rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(reference[3:], arrays["ref_rejected_logps"], rtol=TOLERANCE, atol=0)
    return [*policy.chunk(2), *reference.chunk(2)], mask.sum(1), per_token


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "robust", "ipo"])
def test_dpo(loss: Any, shared_oracle: Path, expected: dict[str, Any]) -> None:
    model = oracle_model(shared_oracle, "policy")
    logprobs, lengths, _ = dpo_inputs(shared_oracle, model)
    if loss == "ipo":  # TRL's way: means over the tokens of an answer
        chosen, rejected = lengths.chunk(2)
        divisors = (chosen, rejected, chosen, rejected)
        logprobs = [x / n for x, n in zip(logprobs, divisors, strict=True)]
    smoothing = 0.1 if loss == "robust" else 0.0
    each = dpo_loss(*logprobs, beta=BETA, loss=loss, label_smoothing=smoothing)
    expect(each.mean(), model, expected[f"dpo_{loss}"])


def test_dpo_with_the_likelihood_of_the_chosen(
    shared_oracle: Path, expected: dict[str, Any]
) -> None:
    model = oracle_model(shared_oracle, "policy")
    logprobs, lengths, per_token = dpo_inputs(shared_oracle, model)
    likelihood = -per_token[:3].sum() / lengths[:3].sum()
    loss = dpo_loss(*logprobs, beta=BETA).mean() + 0.5 * likelihood
    expect(loss, model, expected["dpo_rpo"])


def test_dpo_rewards_are_those_that_are_logged(
    shared_oracle: Path, expected: dict[str, Any]
) -> None:
    model = oracle_model(shared_oracle, "policy")
    (policy_chosen, _, reference_chosen, _), _, _ = dpo_inputs(shared_oracle, model)
    reward = BETA * (policy_chosen - reference_chosen).mean().item()
    metrics = expected["dpo_sigmoid"]["metrics"]
    assert reward == pytest.approx(metrics["rewards/chosen"], rel=1e-4)
