"""A small pretraining as the first node runs it: `python -m tests.tasks.node_zero FOLDER LAUNCH` with the
tokens in FOLDER/tokens."""

import sys
from pathlib import Path

from conf.launch import LaunchConfig
from conf.pretrain import PretrainConfig
from conf.shape import ShapeConfig
from storage.store import Store
from storage.tokens import Tokens
from tasks.pretrain import pretrain
from tasks.stage import Job

STEPS = 40


def train(root: Path, tokens: Path, launch: LaunchConfig) -> Job:
    """The stage's function on small data."""
    job = Job(node="pretrain", stage="pretrain", path=root / "attempt", store=Store(root))
    settings = PretrainConfig(
        shape=ShapeConfig(dim=32, layers=2, heads=4, kv_heads=2, context=32, dropout=0.1),
        tokens=STEPS * 128,
        batch_tokens=128,
        learning_rate=3e-3,
        evaluate_every_steps=0,
        checkpoint_every_steps=5,
        launch=launch,
    )
    pretrain(job, tokens=Tokens(tokens), settings=settings)
    return job


def main() -> None:
    """Train on this node and the others."""
    folder = Path(sys.argv[1])
    train(folder, folder / "tokens", LaunchConfig.model_validate_json(sys.argv[2]))


if __name__ == "__main__":
    main()
