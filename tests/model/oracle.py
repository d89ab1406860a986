"""Loads the oracle: models in Hugging Face's names, batches and expected numbers made by TRL."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from conf.shape import ShapeConfig
from model.huggingface import from_hf, to_hf
from model.transformer import Transformer

SHAPE = ShapeConfig(
    dim=32, layers=2, heads=4, kv_heads=2, ffn=88, context=512, rope_theta=1e4, is_tied=False
)
VOCABULARY = 320
PAD = 0


def oracle_model(folder: Path, name: str) -> Transformer:
    """One of the oracle's models."""
    state = from_hf(load_file(folder / f"{name}.safetensors"))
    model = Transformer(SHAPE, VOCABULARY, is_scalar="score_head.weight" in state)
    model.load_state_dict(state)
    return model


def oracle_arrays(path: Path, name: str) -> dict[str, Tensor]:
    """The arrays NAME/... of an npz file, or all under their whole names."""
    prefix = f"{name}/" if name else ""
    with np.load(path) as arrays:
        return {
            key.removeprefix(prefix): torch.from_numpy(arrays[key])
            for key in arrays.files
            if key.startswith(prefix)
        }


def oracle_numbers(path: Path) -> dict[str, Any]:
    """Expected numbers."""
    return json.loads(path.read_text("utf-8"))


def gradient_norms(model: Transformer) -> tuple[float, dict[str, float]]:
    """Norm of all gradients, and of each parameter's under Hugging Face's name."""
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    norms = {name: float(gradient.norm()) for name, gradient in to_hf(gradients).items()}
    return sum(norm**2 for norm in norms.values()) ** 0.5, norms
