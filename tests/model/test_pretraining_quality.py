"""What the comparison with litgpt scores, and how its weights are read."""

import pytest
import torch

from benchmarks.pretraining_quality import LITGPT_NAMES, nats_of, of_litgpt
from conf.shape import ShapeConfig
from model.transformer import Transformer

SHAPE = ShapeConfig(dim=16, layers=2, heads=4, kv_heads=2, context=16)


def test_every_token_but_the_first_is_scored_once() -> None:
    model = Transformer(SHAPE, 30, seed=1)
    tokens = torch.randint(30, (40,), generator=torch.Generator().manual_seed(0))
    wanted = 0.0
    # Windows of 16 predictions: tokens 1 to 16 and 17 to 32, and 33 to 39 at the end of a third one.
    for first, last, scored in ((0, 16, 16), (16, 32, 16), (23, 39, 7)):
        window = tokens[first : last + 1]
        with torch.no_grad():
            logprobs = torch.log_softmax(model.logits(model.hidden(window[None, :-1]))[0], -1)
        wanted -= logprobs[torch.arange(16), window[1:]][-scored:].sum().item()
    assert nats_of(model, tokens.tolist()) == pytest.approx(wanted, rel=1e-5)
    assert nats_of(model, tokens[:1].tolist()) == 0


def test_weights_of_litgpt_get_our_names() -> None:
    model = Transformer(SHAPE, 30, seed=1)
    theirs = {
        "lm_head.weight": model.embedding.weight,
        "transformer.ln_f.weight": model.norm.weight,
    }
    state = model.state_dict()
    for layer in range(2):
        for name, other in LITGPT_NAMES.items():
            theirs[f"transformer.h.{layer}.{other}.weight"] = state[f"blocks.{layer}.{name}.weight"]
        parts = [state[f"blocks.{layer}.{name}.weight"] for name in ("query", "key", "value")]
        theirs[f"transformer.h.{layer}.attn.qkv.weight"] = torch.cat(parts)
    found = of_litgpt(theirs, SHAPE)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
