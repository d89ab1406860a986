"""The weights that did best so far in a training, kept beside its checkpoints."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from model.ranks import Ranks
from model.transformer import Transformer
from model.weights import load_tensors, save_tensors, tensor_of


@dataclass
class Best:
    """The weights with the highest score; survives a kill together with the checkpoints.

    A replay after a kill gives the same scores and offers none that is better than its own future, so
    the file may be newer than the checkpoint.
    """

    path: Path
    ranks: Ranks

    def offer(self, model: Transformer, step: int, score: float) -> None:
        """Keep the model's weights if no earlier step had as high a score."""
        # So written that what is no number is none.
        if not (self.ranks.is_first and score > self._score()):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".draft")
        mark = {
            "score": torch.tensor([score], dtype=torch.float64),
            "step": torch.tensor([step]),
        }
        save_tensors(draft, {**model.state_dict(), **mark})
        draft.replace(self.path)

    def restore(self, model: Transformer) -> int:
        """Give the model the kept weights; the step that they are of."""
        self.ranks.wait()
        tensors = load_tensors(self.path)
        tensors.pop("score")
        step = int(tensors.pop("step"))
        model.load_state_dict(tensors)
        return step

    def _score(self) -> float:
        if not self.path.exists():
            return -math.inf
        return float(tensor_of(self.path, "score"))
