"""Held-out pairs under a policy, against plain passes over each answer alone."""

from pathlib import Path

import pytest
import torch

from model.held_pairs import pair_parts
from model.weights import load_model
from storage.preferences import read_preferences
from storage.tokenizer import ChatTokenizer
from tests.model.small_world import write_world


def test_each_answer_has_the_log_probability_of_a_pass_of_its_own(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    write_world(tmp_path, repeats=1)
    tokenizer = ChatTokenizer(tmp_path / "policy" / "tokenizer")
    model = load_model(tmp_path / "policy")
    [part] = pair_parts(tmp_path / "policy", tmp_path / "preferences", lambda: model, tokenizer, 3)
    done: list[tuple[int, int]] = []
    with torch.inference_mode():
        rows = part.make(lambda now, of: done.append((now, of)))
        pairs = list(read_preferences(tmp_path / "preferences", "held"))
        assert [row["id"] for row in rows] == [pair["id"] for pair in pairs]
        assert done == [(3, 5), (5, 5)]
        for row, pair in zip(rows, pairs, strict=True):
            start = tokenizer.render(pair["prompt"], for_generation=True).ids
            for side in ("chosen", "rejected"):
                answer = [*tokenizer.encode_content(pair[side]), tokenizer.im_end]
                ids = torch.tensor([[*start, *answer]])
                logprobs = model.logits(model.hidden(ids)).log_softmax(-1)[0, len(start) - 1 : -1]
                expected = logprobs.gather(1, torch.tensor(answer)[:, None]).sum().item()
                assert row[side] == pytest.approx(expected, abs=1e-3)
                assert row[f"{side}_tokens"] == len(answer)
