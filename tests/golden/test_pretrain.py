"""Losses of 20 steps, frozen: a change here is a change of what pretraining computes, and wants a
new version of the stage. `UPDATE_GOLDEN=1` writes them anew."""

import json
import os
from pathlib import Path

import pytest
import torch

from conf.contract import JobFile
from conf.launch import LaunchConfig
from conf.pretrain import PhaseConfig, PretrainConfig
from conf.shape import ShapeConfig
from model.journal import Journal
from model.pretrain import work
from model.ranks import Ranks
from tests.model.small_jobs import write_job
from tests.model.small_tokens import write_small_tokens

GOLDEN = Path(__file__).with_name("pretrain.json")
SETTINGS = PretrainConfig(
    shape=ShapeConfig(dim=32, layers=2, heads=4, kv_heads=2, context=32, dropout=0.1),
    tokens=20 * 256,
    batch_tokens=256,
    learning_rate=5e-3,
    phases=(PhaseConfig(tokens=0.5, mix={"en": 0.6, "zh": 0.4}), PhaseConfig(tokens=0.5)),
    is_document_masked=True,
    evaluate_every_steps=10,
    seed=11,
)


def test_twenty_losses_are_the_frozen_ones(tmp_path: Path) -> None:
    tokens = write_small_tokens(tmp_path / "tokens")
    job = write_job(
        tmp_path / "attempt", "pretrain", SETTINGS, {"tokens": tokens}, LaunchConfig(threads=1)
    )
    state = torch.get_rng_state()
    work(
        JobFile.model_validate_json(job.read_text("utf-8")),
        Ranks(),
        Journal(tmp_path / "attempt" / "logs"),
    )
    assert torch.equal(torch.get_rng_state(), state), "training drew from the global generator"
    lines = (tmp_path / "attempt" / "logs" / "metrics.jsonl").read_text("utf-8").splitlines()
    found = {
        name: [line[name] for line in map(json.loads, lines) if name in line]
        for name in ("loss", "lr", "gradient_norm", "held_loss/zh", "held_bits_per_byte/en")
    }
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    for name, wanted in json.loads(GOLDEN.read_text("utf-8")).items():
        assert found[name] == pytest.approx(wanted, rel=1e-4), name
