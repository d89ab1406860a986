"""What the transformer promises: masks, cache, positions, dropout, initial weights, log-probabilities."""

import math

import pytest
import torch
from torch.nn.attention import varlen

from conf.launch import LaunchConfig
from conf.shape import RopeScalingConfig, ShapeConfig
from model import transformer
from model.attention import Documents, eager_attention
from model.engine import build_engine
from model.noise import Noise
from model.optimizer import UpdateRule
from model.ranks import Ranks
from model.transformer import AttentionMask, Cache, Transformer, token_logprobs

SHAPE = ShapeConfig(dim=32, layers=2, heads=4, kv_heads=2, context=64)


def model(seed: int = 1, **fields: object) -> Transformer:
    return Transformer(SHAPE.model_copy(update=fields), 50, seed=seed).eval()


def tokens(rows: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(50, (rows, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_packed_documents_read_as_if_alone() -> None:
    net, one, two = model(), tokens(1, 7), tokens(1, 9, seed=1)
    documents = torch.tensor([[0] * 7 + [1] * 9])
    positions = torch.tensor([[*range(7), *range(9)]])
    packed = net.hidden(
        torch.cat([one, two], 1), positions=positions, mask=AttentionMask(documents=documents)
    )
    alone = torch.cat([net.hidden(one), net.hidden(two)], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-6)


@torch.no_grad()
def test_rotary_positions_are_relative_so_packing_may_leave_them_running() -> None:
    net, ids = model(), tokens(1, 16)
    mask = AttentionMask(documents=torch.tensor([[0] * 7 + [1] * 9]))
    restarted = net.hidden(ids, positions=torch.tensor([[*range(7), *range(9)]]), mask=mask)
    torch.testing.assert_close(net.hidden(ids, mask=mask), restarted, rtol=0, atol=5e-6)


@torch.no_grad()
def test_left_padding_changes_nothing() -> None:
    net, ids = model(), tokens(2, 10)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    mask = AttentionMask(padding=torch.tensor([5, 5]))
    torch.testing.assert_close(
        net.hidden(padded, mask=mask)[:, 5:], net.hidden(ids), rtol=0, atol=2e-6
    )


@torch.no_grad()
def test_future_tokens_change_nothing() -> None:
    net, ids = model(), tokens(2, 12)
    changed = ids.clone()
    changed[:, 8:] = 3
    assert torch.equal(net.hidden(ids)[:, :8], net.hidden(changed)[:, :8])


@pytest.mark.parametrize("padding", [0, 3])
@torch.no_grad()
def test_cached_tokens_equal_the_full_pass(padding: int) -> None:
    net, ids = model(), tokens(2, 12)
    mask = AttentionMask(padding=torch.tensor([padding, 0]))
    cache = Cache(SHAPE, 2, 12)
    pieces = [net.hidden(part, mask=mask, cache=cache) for part in ids.split([5, 1, 4, 2], dim=1)]
    full = net.hidden(ids, mask=mask)
    torch.testing.assert_close(
        torch.cat(pieces, 1)[0, padding:], full[0, padding:], rtol=0, atol=3e-6
    )
    torch.testing.assert_close(torch.cat(pieces, 1)[1], full[1], rtol=0, atol=3e-6)
    assert cache.length == 12


@torch.no_grad()
def test_selected_cache_rows_go_on_as_their_own() -> None:
    net, ids = model(), tokens(3, 8)
    cache = Cache(SHAPE, 3, 8)
    net.hidden(ids[:, :7], cache=cache)
    cache.select(torch.tensor([2, 0]))
    last = net.hidden(ids[[2, 0], 7:], cache=cache)
    torch.testing.assert_close(last[:, 0], net.hidden(ids)[[2, 0], -1], rtol=0, atol=3e-6)


def test_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="65 tokens is longer than the model's context of 64"):
        model().hidden(tokens(1, 65))


def test_each_shape_counts_its_own_parameters() -> None:
    for fields in ({}, {"is_tied": False}, {"has_qkv_bias": True}, {"has_qk_norm": True}):
        net = model(**fields)
        assert sum(p.numel() for p in net.parameters()) == net.shape.parameters(50)


def test_initial_weights_follow_the_stated_deviations() -> None:
    shape = ShapeConfig(dim=128, layers=8, heads=4, kv_heads=4, context=16)
    net = Transformer(shape, 500)
    state = net.state_dict()
    assert state["blocks.3.gate.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    # 0.02 / sqrt(2 x 8) = 0.005
    assert state["blocks.3.ffn_out.weight"].std().item() == pytest.approx(0.005, rel=0.05)
    assert state["blocks.3.attention_out.weight"].std().item() == pytest.approx(0.005, rel=0.05)
    assert torch.equal(state["norm.weight"], torch.ones(128))
    scalar = Transformer(shape, 500, is_scalar=True)
    assert scalar.state_dict()["score_head.weight"].std().item() == pytest.approx(
        1 / math.sqrt(129), rel=0.2
    )


def test_the_seed_alone_decides_the_initial_weights() -> None:
    torch.manual_seed(1)
    first = model(seed=5).state_dict()
    torch.manual_seed(2)
    second, other = model(seed=5).state_dict(), model(seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_dropout_is_a_function_of_seed_and_row_number() -> None:
    ones = torch.ones(4, 30, 40)
    all_rows = Noise(3, torch.arange(4)).drop(ones, site=2, rate=0.25)
    later_two = Noise(3, torch.tensor([2, 3])).drop(ones[:2], site=2, rate=0.25)
    assert torch.equal(all_rows[2:], later_two)
    assert all_rows.unique().tolist() == pytest.approx([0, 1 / 0.75])
    # 4800 draws: three standard deviations of the share are 0.019.
    assert (all_rows == 0).float().mean().item() == pytest.approx(0.25, abs=0.019)
    for other in (Noise(4, torch.arange(4)), Noise(3, torch.arange(4) + 4)):
        assert not torch.equal(all_rows, other.drop(ones, site=2, rate=0.25))
    assert not torch.equal(all_rows, Noise(3, torch.arange(4)).drop(ones, site=3, rate=0.25))


def test_dropout_acts_only_where_noise_is_given() -> None:
    net, ids = model(dropout=0.5), tokens(2, 8)
    quiet = net.hidden(ids)
    assert torch.equal(quiet, net.hidden(ids))
    assert not torch.equal(quiet, net.hidden(ids, noise=Noise(0, torch.arange(2))))


@pytest.mark.parametrize("at_once", [1 << 26, 50 * 4])
def test_logprobs_equal_the_definition_whole_and_in_chunks(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer, "LOGITS_AT_ONCE", at_once)
    source = torch.Generator().manual_seed(0)
    head = torch.randn(50, 8, generator=source, requires_grad=True)
    hidden = torch.randn(3, 6, 8, generator=source, requires_grad=True)
    labels = tokens(3, 6)
    labels[0, :4] = -1
    labels[2, 5] = -100
    found = token_logprobs(head, hidden, labels, temperature=0.7)
    wanted = (hidden @ head.T / 0.7).log_softmax(-1)
    wanted = wanted.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
    gradients = torch.autograd.grad(found.sum(), (head, hidden))
    for got, truth in zip(
        gradients, torch.autograd.grad(wanted.sum(), (head, hidden)), strict=True
    ):
        torch.testing.assert_close(got, truth, rtol=0, atol=2e-5)


def test_no_label_at_all_gives_zeros() -> None:
    found = token_logprobs(torch.ones(50, 8), torch.ones(2, 3, 8), torch.full((2, 3), -1))
    assert found.tolist() == [[0.0] * 3] * 2


ODD = {
    "grouped heads": {},
    "one key head, wide": {"kv_heads": 1, "head_dim": 16},
    "window": {"sliding_window": 5},
    "window in one layer": {"sliding_window": 5, "full_layers": (1,)},
    "no positions in one layer": {"no_rope_layers": (0,), "has_qk_norm": True},
}


@pytest.mark.parametrize("kind", list(ODD))
@torch.no_grad()
def test_fused_attention_equals_its_definition(kind: str) -> None:
    net, ids = model(**ODD[kind]), tokens(2, 20)
    masks = [
        None,
        AttentionMask(padding=torch.tensor([3, 0])),
        AttentionMask(documents=torch.tensor([[0] * 7 + [1] * 13, [0] * 20])),
    ]
    fused = [net.hidden(ids, mask=mask) for mask in masks]
    net.attend_by("eager")
    for mask, found in zip(masks, fused, strict=True):
        torch.testing.assert_close(net.hidden(ids, mask=mask), found, rtol=0, atol=3e-6)


@pytest.mark.parametrize("kind", list(ODD))
@torch.no_grad()
def test_every_kind_of_layer_reads_a_cache_as_the_full_pass(kind: str) -> None:
    net, ids = model(**ODD[kind]), tokens(2, 20)
    cache = Cache(net.shape, 2, 20)
    pieces = [net.hidden(part, cache=cache) for part in ids.split([9, 1, 1, 6, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), net.hidden(ids), rtol=0, atol=3e-6)


def seen(net: Transformer, ids: torch.Tensor, token: int, mask: AttentionMask | None) -> list[int]:
    """Places whose embedding the state of a token depends on, by the gradient."""
    embedded: list[torch.Tensor] = []

    def keep(_module: object, _inputs: object, output: torch.Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    hook = net.embedding.register_forward_hook(keep)
    net.hidden(ids, mask=mask)[0, token].sum().backward()
    hook.remove()
    assert embedded[0].grad is not None
    return embedded[0].grad[0].abs().sum(-1).nonzero().flatten().tolist()


def test_no_token_sees_another_document() -> None:
    net, ids = model(), tokens(1, 12)
    mask = AttentionMask(documents=torch.tensor([[0] * 5 + [1] * 4 + [2] * 3]))
    for attention in ("sdpa", "eager"):
        net.attend_by(attention)
        found = [seen(net, ids, token, mask) for token in range(12)]
        starts = [0] * 5 + [5] * 4 + [9] * 3
        assert found == [list(range(start, token + 1)) for token, start in enumerate(starts)]


@torch.no_grad()
def test_rows_of_many_lengths_of_documents_read_as_by_the_definition() -> None:
    net, ids = model(), tokens(3, 60)
    numbers = torch.zeros(3, 60, dtype=torch.long)
    numbers[0, 25:], numbers[1, [1, 30, 59]] = 4, 1
    mask = AttentionMask(documents=torch.stack([numbers[0], numbers[1].cumsum(0), numbers[2]]))
    found = Documents.of(mask.documents) if mask.documents is not None else None
    assert found is not None
    assert found.lengths == (25, 35, 1, 29, 29, 1, 60)
    assert found.ends.tolist() == [0, 25, 60, 61, 90, 119, 120, 180]
    one_by_one = net.hidden(ids, mask=mask)
    net.attend_by("eager")
    torch.testing.assert_close(one_by_one, net.hidden(ids, mask=mask), rtol=0, atol=3e-6)


def test_a_document_that_comes_again_is_seen_again() -> None:
    net, ids = model(), tokens(1, 60)
    mask = AttentionMask(documents=torch.tensor([[1] * 20 + [0] * 20 + [1] * 20]))
    assert seen(net, ids, 59, mask) == [*range(20), *range(40, 60)]


@pytest.mark.parametrize("window", [0, 5])
@torch.no_grad()
def test_flash_attention_is_told_where_documents_end(
    monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    def by_definition(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, *_: object,
        window_size: tuple[int, int], enable_gqa: bool,
    ) -> torch.Tensor:  # fmt: skip
        assert query.dtype == torch.bfloat16
        assert enable_gqa
        place = torch.arange(len(query))
        own = torch.bucketize(place, ends.long(), right=True)
        allowed = (own == own[:, None]) & (place <= place[:, None])
        if window_size[0] >= 0:
            allowed &= place >= place[:, None] - window_size[0]
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        mixed = eager_attention(query, key, value, allowed, is_causal=False)
        return mixed[0].transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", by_definition)
    net, ids = Transformer(SHAPE.model_copy(update={"sliding_window": window}), 50), tokens(2, 20)
    mask = AttentionMask(documents=torch.tensor([[0] * 7 + [1] * 13, [0] * 20]))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = net.hidden(ids, mask=mask)
        net.attend_by("flash")
        torch.testing.assert_close(net.hidden(ids, mask=mask), wanted, rtol=0, atol=0.05)


def test_packed_documents_have_the_loss_and_gradients_of_rows_of_their_own() -> None:
    ids = tokens(1, 18)
    labels = ids.roll(-1, 1)
    labels[0, [6, 17]] = -1  # nothing follows the last token of a document
    documents = AttentionMask(documents=torch.tensor([[0] * 7 + [1] * 11]))

    def gradients(net: Transformer, rows: list[tuple[slice, AttentionMask | None]]) -> list[float]:
        nats = sum(
            -token_logprobs(
                net.head_weight, net.hidden(ids[:, here], mask=mask), labels[:, here]
            ).sum()
            for here, mask in rows
        )
        assert isinstance(nats, torch.Tensor)
        nats.backward()
        return [
            nats.item(),
            *(w.grad.norm().item() for w in net.parameters() if w.grad is not None),
        ]

    packed = gradients(model(), [(slice(0, 18), documents)])
    apart = gradients(model(), [(slice(0, 7), None), (slice(7, 18), None)])
    assert packed == pytest.approx(apart, rel=1e-5)
    assert packed[0] == pytest.approx(apart[0], rel=1e-6)


def test_a_window_reaches_so_many_tokens_back_in_every_layer() -> None:
    ids = tokens(1, 12)
    # One layer sees 4 tokens, itself among them; two layers reach 2 x 3 back; a full one sees all.
    assert seen(model(layers=1, sliding_window=4), ids, 11, None) == [8, 9, 10, 11]
    assert seen(model(layers=2, sliding_window=4), ids, 11, None) == list(range(5, 12))
    assert seen(model(layers=2, sliding_window=4, full_layers=(0,)), ids, 11, None) == list(
        range(12)
    )


@torch.no_grad()
def test_layers_without_positions_do_not_tell_the_order_of_what_came_before() -> None:
    ids = tokens(1, 8)
    turned = torch.cat([ids[:, :7].flip(1), ids[:, 7:]], 1)
    blind, told = model(layers=1, no_rope_layers=(0,)), model(layers=1)
    last, other = blind.hidden(ids)[0, -1], blind.hidden(turned)[0, -1]
    torch.testing.assert_close(last, other, rtol=0, atol=2e-6)
    assert not torch.allclose(told.hidden(ids)[0, -1], told.hidden(turned)[0, -1], atol=1e-4)


def test_stretched_frequencies_by_hand() -> None:
    # head width 8, base 10,000: frequencies 1, 0.1, 0.01, 0.001 turn 16 / (2 pi) x f times in the
    # original context of 16: 2.546, 0.2546, ... With bounds 0.5 and 2 the first is kept, the others
    # are divided by 4; with bounds 0.1 and 0.5 the second keeps a share of (0.2546 - 0.1) / 0.4.
    def frequencies(low: float, high: float) -> list[float]:
        scaling = RopeScalingConfig(
            factor=4, low_freq_factor=low, high_freq_factor=high, original_context=16
        )
        net = model(dim=32, heads=4, rope_scaling=scaling)
        return torch.atan2(-net.sine[1, :4], net.cosine[1, :4]).tolist()

    assert frequencies(0.5, 2) == pytest.approx([1, 0.1 / 4, 0.01 / 4, 0.001 / 4], rel=1e-5)
    kept = (1.6 / (2 * math.pi) - 0.1) / 0.4
    assert frequencies(0.1, 0.5)[1] == pytest.approx(0.1 * kept + 0.1 / 4 * (1 - kept), rel=1e-5)


def test_shapes_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="full_layers are exceptions from sliding_window"):
        ShapeConfig(full_layers=(0,))
    with pytest.raises(ValueError, match="no_rope_layers names layer 3, the last of 3 layers is 2"):
        ShapeConfig(layers=3, no_rope_layers=(3,))
    with pytest.raises(ValueError, match="low_freq_factor=4 is not below high_freq_factor=4"):
        RopeScalingConfig(factor=8, low_freq_factor=4)


def test_the_launch_settings_choose_the_attention() -> None:
    net = model()
    build_engine(net, LaunchConfig(attention="eager"), Ranks(), UpdateRule())
    assert [block.attention for block in net.blocks] == ["eager", "eager"]
    with pytest.raises(ValueError, match="flash runs on CUDA in 16 bits, not on cpu in fp32"):
        build_engine(net, LaunchConfig(attention="flash"), Ranks(), UpdateRule())
