"""Losses and gradients of SFT, reward and DPO equal TRL's on TRL's own batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conf.dpo import DpoConfig
from conf.reward import RewardConfig
from conf.sft import SftConfig
from model import reward, sft
from model.dialogues import Dialogue, Pair, labelled_logprobs, pair_tensors
from model.dpo import dpo_batch, dpo_loss, step_loss
from model.packing import Packing
from model.reward import last_token_scores, reward_loss
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


def dialogues(folder: Path, name: str) -> list[Dialogue]:
    arrays = oracle_arrays(folder / "batches.npz", name)
    fields = (arrays[field].tolist() for field in ("input_ids", "labels", "attention_mask"))
    return [
        Dialogue(ids[: sum(mask)], [label >= 0 for label in labels[: sum(mask)]], str(row), "")
        for row, (ids, labels, mask) in enumerate(zip(*fields, strict=True))
    ]


def sft_loss(model: Transformer, rows: list[Dialogue], totals: dict[str, float]) -> Tensor:
    return sft.step_loss(SftConfig())(model, sft.sft_batch(rows), totals)["loss"]


@pytest.mark.parametrize("name", ["sft_assistant_only", "sft_all_tokens"])
def test_sft(name: str, shared_oracle: Path, expected: dict[str, Any]) -> None:
    model = oracle_model(shared_oracle, "policy")
    rows = dialogues(shared_oracle, name)
    loss = sft_loss(model, rows, dict(sft.sft_batch(rows).weights))
    expect(loss, model, expected[name])


def test_sft_in_micro_batches_has_the_gradient_of_the_whole_step(
    shared_oracle: Path, expected: dict[str, Any]
) -> None:
    model = oracle_model(shared_oracle, "policy")
    rows = dialogues(shared_oracle, "sft_assistant_only")
    totals = dict(sft.sft_batch(rows).weights)
    losses = [sft_loss(model, [row], totals) for row in rows]
    expect(torch.stack(losses).sum(), model, expected["sft_assistant_only"])


def test_sft_weighed_by_probability(shared_oracle: Path, expected: dict[str, Any]) -> None:
    model = oracle_model(shared_oracle, "policy")
    batch = sft.sft_batch(dialogues(shared_oracle, "sft_dft"))
    logprobs = labelled_logprobs(model, batch.tensors)
    loss = -(logprobs.exp().detach() * logprobs).sum() / batch.weights["tokens"]
    expect(loss, model, expected["sft_dft"])


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


def pairs(folder: Path, name: str) -> list[Pair]:
    """The oracle's pairs; all that both answers begin with counts as prompt, without a completion mask."""
    arrays = oracle_arrays(folder / "batches.npz", name)
    sides = [
        ids[: sum(mask)]
        for ids, mask in zip(
            arrays["input_ids"].tolist(), arrays["attention_mask"].tolist(), strict=True
        )
    ]
    margins = arrays.get("margin", torch.zeros(3)).tolist()
    found: list[Pair] = []
    for row, (chosen, rejected) in enumerate(zip(sides[:3], sides[3:], strict=True)):
        length = 1
        if "completion_mask" in arrays:
            length = int(arrays["completion_mask"][row].int().argmax())
        found.append(
            Pair(chosen[:length], chosen[length:], rejected[length:], margins[row], str(row))
        )
    return found


@pytest.mark.parametrize(("name", "centring"), [("rm", 0.0), ("rm_center", 0.01), ("rm_margin", 0)])
def test_reward(name: str, centring: float, shared_oracle: Path, expected: dict[str, Any]) -> None:
    model = oracle_model(shared_oracle, "reward")
    batch = reward.reward_batch(pairs(shared_oracle, name))
    arrays = oracle_arrays(shared_oracle / "batches.npz", name)
    assert batch["ids"].numel() < arrays["attention_mask"].sum() - 30  # prompts are there once
    alone = [
        ids[:length]
        for ids, length in zip(
            arrays["input_ids"].tolist(), arrays["attention_mask"].sum(1).tolist(), strict=True
        )
    ]
    for scores in (reward.wanted_scores(model, batch.tensors), last_token_scores(model, alone)):
        torch.testing.assert_close(scores, arrays["scores"], rtol=TOLERANCE, atol=1e-6)
    settings = RewardConfig(centring=centring, margin_weight=1.0)
    figures = reward.step_loss(settings)(model, batch, batch.weights)
    expect(figures["loss"], model, expected[name])


def test_reward_per_token_is_deepspeed_chats_where_it_counts_the_same_tokens(
    shared_oracle: Path,
) -> None:
    arrays = oracle_arrays(shared_oracle / "batches.npz", "rm")
    peers = oracle_arrays(shared_oracle / "peers.npz", "dschat")
    chosen, rejected = peers["rm_token_rewards"].chunk(2)
    ids, lengths = arrays["input_ids"], arrays["attention_mask"].sum(1)
    losses: list[Tensor] = []
    for row in range(3):
        start = int((ids[row] != ids[row + 3]).int().argmax())
        end = int(max(lengths[row], lengths[row + 3]))  # padding of the shorter one counts there
        scores = chosen[row, start:end], rejected[row, start:end]
        losses.append(reward_loss(*scores, torch.zeros(end - start), centring=0.0).mean())
    wanted = oracle_numbers(shared_oracle / "peers_expected.json")["dschat/rm_loss"]
    assert torch.stack(losses).mean().item() == pytest.approx(wanted, rel=TOLERANCE)


def dpo_figures(
    folder: Path, model: Transformer, **settings: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """Figures of a step on the oracle's pairs, prompts shared, and the policy's log-probabilities."""
    arrays = oracle_arrays(folder / "batches.npz", "dpo")
    rows = pairs(folder, "dpo")
    with torch.no_grad():
        reference = labelled_logprobs(oracle_model(folder, "ref"), pair_tensors(rows)).sum(-1)
    chosen, rejected = reference.chunk(2)
    torch.testing.assert_close(chosen, arrays["ref_chosen_logps"], rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(rejected, arrays["ref_rejected_logps"], rtol=TOLERANCE, atol=0)
    batch = dpo_batch(rows, torch.stack([chosen, rejected], 1))
    per_token = labelled_logprobs(model, batch.tensors)
    torch.testing.assert_close(
        per_token[batch["labels"] >= 0],
        arrays["policy_per_token_logps"][arrays["completion_mask"].bool()[:, 1:]],
        rtol=TOLERANCE,
        atol=1e-5,
    )
    config = DpoConfig.model_validate({"beta": BETA, "rpo_alpha": 0.0, **settings})
    return step_loss(config)(model, batch, batch.weights), per_token


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "robust", "ipo", "apo_zero", "rpo"])
def test_dpo(loss: Any, shared_oracle: Path, expected: dict[str, Any]) -> None:
    model = oracle_model(shared_oracle, "policy")
    settings: dict[str, Any] = {
        "robust": {"loss": "robust", "label_smoothing": 0.1},
        "rpo": {"rpo_alpha": 0.5},
    }.get(loss, {"loss": loss})
    figures, _ = dpo_figures(shared_oracle, model, **settings)
    expect(figures["loss"], model, expected[f"dpo_{loss}"])


def test_dpo_rewards_are_those_that_are_logged(
    shared_oracle: Path, expected: dict[str, Any]
) -> None:
    figures, _ = dpo_figures(shared_oracle, oracle_model(shared_oracle, "policy"))
    metrics = expected["dpo_sigmoid"]["metrics"]
    for ours, theirs in (
        ("chosen_reward", "chosen"), ("rejected_reward", "rejected"), ("margin", "margins"),
        ("accuracy", "accuracies"),
    ):  # fmt: skip
        assert figures[ours].item() == pytest.approx(metrics[f"rewards/{theirs}"], rel=1e-4)


def policy_and_logprobs(folder: Path) -> tuple[Transformer, Tensor, Tensor]:
    """The policy, its log-probabilities of each label (6, L), and the reference's of each answer (6,)."""
    model = oracle_model(folder, "policy")
    _, per_token = dpo_figures(folder, model)
    arrays = oracle_arrays(folder / "batches.npz", "dpo")
    return model, per_token, torch.cat([arrays["ref_chosen_logps"], arrays["ref_rejected_logps"]])


def log_ratios(policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chosen, rejected = (policy - reference).chunk(2)
    return chosen, rejected, chosen - rejected


def discopop(gain: Tensor) -> Tensor:
    """Lu et al. 2024, equation 6, at temperature 0.05."""
    gate = (BETA * gain / 0.05).sigmoid()
    return -F.logsigmoid(BETA * gain) * (1 - gate) + (-BETA * gain).exp() * gate


OTHERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "exo_pair": lambda c, r, g: (
        (BETA * g).sigmoid() * (F.logsigmoid(BETA * g) - torch.tensor(0.9).log())
        + (-BETA * g).sigmoid() * (F.logsigmoid(-BETA * g) - torch.tensor(0.1).log())
    ),
    "nca_pair": lambda c, r, g: (
        -F.logsigmoid(BETA * c) - (F.logsigmoid(-BETA * c) + F.logsigmoid(-BETA * r)) / 2
    ),
    "sppo_hard": lambda c, r, g: (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2,
    "apo_down": lambda c, r, g: (BETA * c).sigmoid() + 1 - (BETA * g).sigmoid(),
    "discopop": lambda c, r, g: discopop(g),
    "bco_pair": lambda c, r, g: -F.logsigmoid(BETA * c) - F.logsigmoid(-BETA * r),
}


@pytest.mark.parametrize("name", OTHERS)
def test_losses_that_are_no_setting_come_out_of_the_same_log_probabilities(
    name: str, shared_oracle: Path, expected: dict[str, Any]
) -> None:
    model, per_token, reference = policy_and_logprobs(shared_oracle)
    loss = OTHERS[name](*log_ratios(per_token.sum(-1), reference)).mean()
    expect(loss, model, expected[f"dpo_{name}"])


def test_the_sorted_gains_of_a_batch(shared_oracle: Path, expected: dict[str, Any]) -> None:
    """Melnyk et al. 2024 (AOT), on pairs."""
    model, per_token, reference = policy_and_logprobs(shared_oracle)
    (chosen, rejected), known = per_token.sum(-1).chunk(2), reference.chunk(2)
    gain = (chosen - rejected).sort().values - (known[0] - known[1]).sort().values
    expect(-F.logsigmoid(BETA * gain).mean(), model, expected["dpo_aot"])


def test_tokens_beyond_the_shorter_answer_count_half(
    shared_oracle: Path, expected: dict[str, Any]
) -> None:
    """Liu et al. 2024 (LD-DPO), alpha 1/2."""
    model, per_token, _ = policy_and_logprobs(shared_oracle)
    tensors = pair_tensors(pairs(shared_oracle, "dpo"))
    with torch.no_grad():
        reference = labelled_logprobs(oracle_model(shared_oracle, "ref"), tensors)
    lengths = (tensors["labels"] >= 0).sum(1)
    shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
    weights = 1 - (torch.arange(per_token.shape[1]) >= shorter[:, None]) / 2
    _, _, gain = log_ratios((per_token * weights).sum(-1), (reference * weights).sum(-1))
    expect(-F.logsigmoid(BETA * gain).mean(), model, expected["dpo_sigmoid_ld"])


def test_pairs_weigh_what_the_policy_would_say(
    shared_oracle: Path, expected: dict[str, Any]
) -> None:
    """Zhou et al. 2024 (WPO), equation 3 with its alignment of the weights."""
    model, per_token, reference = policy_and_logprobs(shared_oracle)
    tensors = pair_tensors(pairs(shared_oracle, "dpo"))
    is_label = tensors["labels"] >= 0
    with torch.no_grad():
        states = model.hidden(tensors["ids"], packing=Packing.of(tensors))[0]
        own = torch.logsumexp(2 * model.logits(states).log_softmax(-1), -1)
        own = torch.zeros(is_label.shape).masked_scatter(is_label, own)
        chosen, rejected = ((per_token - own).sum(1) / is_label.sum(1)).chunk(2)
        weights = (chosen + rejected).exp().clamp(max=1)
    _, _, gain = log_ratios(per_token.sum(-1), reference)
    expect((-F.logsigmoid(BETA * gain) * weights).mean(), model, expected["dpo_sigmoid_wpo"])


def test_gains_per_token(shared_oracle: Path, expected: dict[str, Any]) -> None:
    model, per_token, reference = policy_and_logprobs(shared_oracle)
    lengths = (pair_tensors(pairs(shared_oracle, "dpo"))["labels"] >= 0).sum(1)
    _, _, gain = log_ratios(per_token.sum(-1) / lengths, reference / lengths)
    expect(-F.logsigmoid(BETA * gain).mean(), model, expected["dpo_sigmoid_norm"])


def test_the_likelihood_term_alone(shared_oracle: Path, expected: dict[str, Any]) -> None:
    model = oracle_model(shared_oracle, "policy")
    figures, _ = dpo_figures(shared_oracle, model)
    expect(figures["chosen_loss"], model, expected["dpo_sft"])


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_without_a_reference(
    name: Any, shared_oracle: Path, expected: dict[str, Any]
) -> None:
    model = oracle_model(shared_oracle, "policy")
    arrays = oracle_arrays(shared_oracle / "batches.npz", name)
    means: list[Tensor] = []
    for side in ("chosen", "rejected"):
        ids, labels = arrays[f"{side}_input_ids"], arrays[f"{side}_labels"][:, 1:]
        labels = labels.where(labels >= 0, -1)
        found = token_logprobs(model.head_weight, model.hidden(ids[:, :-1]), labels)
        means.append(found.sum(1) / (labels >= 0).sum(1))
    zeros = torch.zeros(3)
    beta = {"simpo": 2.0, "orpo": 0.1}[name]
    loss = dpo_loss(means[0], means[1], zeros, zeros, beta=beta, gamma=0.5, loss=name).mean()
    if (
        name == "orpo"
    ):  # TRL's likelihood term takes the prompt in, the paper's and ours the answer alone
        ids, is_real = arrays["chosen_input_ids"], arrays["chosen_attention_mask"].bool()
        labels = ids[:, 1:].where(is_real[:, 1:], -1)
        found = token_logprobs(model.head_weight, model.hidden(ids[:, :-1]), labels)
        loss = loss - found.sum() / (labels >= 0).sum()
    expect(loss, model, expected[name])
