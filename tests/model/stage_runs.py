"""Every stage that learns on every engine, in one pair of ranks: `python -m tests.model.stage_runs WORLD
FOLDER STAGE/ENGINE ...` writes each run into FOLDER/STAGE-ENGINE."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conf.dpo import DpoConfig
from conf.launch import LaunchConfig
from conf.lora import LoraConfig
from conf.ppo import PpoConfig
from conf.reward import RewardConfig
from conf.settings import Settings
from conf.sft import SftConfig
from model import dpo, ppo, reward, sft
from model.journal import Journal
from model.ranks import Ranks, join_ranks
from tests.model.engine_runs import placed
from tests.model.small_world import make_job

WORKS: dict[str, Callable[..., dict[str, Any]]] = {
    "sft": sft.work,
    "lora": sft.work,
    "reward": reward.work,
    "dpo": dpo.work,
    "ppo": ppo.work,
    "grpo": ppo.work,
}
PPO = PpoConfig(
    iterations=2,
    rollout_rows=8,
    minibatch_rows=4,
    max_new_tokens=8,
    learning_rate=1e-4,
    held_prompts=4,
)
SETTINGS: dict[str, Settings] = {
    "sft": SftConfig(max_steps=4, batch_rows=8, learning_rate=3e-3, evaluate_every_steps=2),
    "lora": SftConfig(max_steps=4, batch_rows=8, learning_rate=1e-2, lora=LoraConfig(rank=3)),
    "reward": RewardConfig(
        max_steps=4,
        batch_rows=8,
        learning_rate=3e-3,
        evaluate_every_steps=2,
        on_gate="keep_best",
        scale_answers=8,
        max_new_tokens=8,
    ),
    "dpo": DpoConfig(max_steps=4, batch_rows=8, learning_rate=1e-3, evaluate_every_steps=2),
    "ppo": PPO,
    # rloo differs from it in one formula, on the whole rollout.
    "grpo": PPO.model_copy(
        update={"method": "grpo", "samples_per_prompt": 4, "kl_in": "loss", "kl_estimator": "k3"}
    ),
}
INPUTS = {
    "sft": ("policy", "conversations"),
    "lora": ("policy", "conversations"),
    "reward": ("policy", "preferences"),
    "dpo": ("policy", "preferences"),
    "ppo": ("policy", "reward", "conversations"),
    "grpo": ("policy", "reward", "conversations"),
}


def run(stage: str, engine: str, world: Path, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """The stage's job from start to end; its figures."""
    launch, ranks = placed(engine, ranks)
    settings = SETTINGS[stage].model_copy(update={"launch": launch})
    inputs = {name: world / name for name in INPUTS[stage]}
    job = make_job(folder / f"{stage}-{engine}", stage, settings, inputs, launch)
    ranks.wait()
    figures = WORKS[stage](job, ranks, Journal(job.logs, is_writer=ranks.is_first))
    ranks.wait()
    return figures


def main() -> None:
    """Entry of each rank."""
    world, folder = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = join_ranks(LaunchConfig(engine="ddp", processes=2, threads=1, device="cpu"))
    for wish in sys.argv[3:]:
        stage, _, engine = wish.partition("/")
        run(stage, engine, world, folder, ranks)
    ranks.leave()


if __name__ == "__main__":
    main()
