"""TRL's PPO: `python ppo_step.py COURSE.json WEIGHTS ANSWER.json`.

Runs in an environment with torch, transformers and trl 1.12, which are imported by name. Gradient
checkpointing and bfloat16, which it turns on by itself, are off, as on our side.
"""

import importlib
import json
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


def main() -> None:
    """Measure, and write the seconds of all iterations but the first."""
    course, weights, answer = sys.argv[1:]
    told = json.loads(Path(course).read_text("utf-8"))
    torch.set_num_threads(1)
    callback = _clock()
    llama = importlib.import_module("generation").llama  # beside this file
    policy, reference = (llama(told, weights) for _ in range(2))
    trainer = importlib.import_module("trl.experimental.ppo").PPOTrainer(
        args=_arguments(told),
        processing_class=SimpleNamespace(pad_token_id=told["pad"], eos_token_id=told["end"]),
        model=policy,
        ref_model=reference,
        reward_model=_scalar(policy.config),
        value_model=_scalar(policy.config),
        train_dataset=[{"input_ids": prompt} for prompt in told["prompts"]],
        eval_dataset=[{"input_ids": told["prompts"][0]}],
        data_collator=partial(_padded, told["pad"]),
        callbacks=[callback],
    )
    trainer.train()
    found = {"processor": callback.marks[-1] - callback.marks[0]}
    Path(answer).write_text(json.dumps(found), "utf-8")


def _arguments(told: dict[str, Any]) -> Any:
    return importlib.import_module("trl.experimental.ppo").PPOConfig(
        output_dir=told["folder"],
        per_device_train_batch_size=told["rollout_rows"],
        gradient_accumulation_steps=1,
        num_mini_batches=told["rollout_rows"] // told["minibatch_rows"],
        num_ppo_epochs=told["epochs"],
        total_episodes=told["iterations"] * told["rollout_rows"],
        response_length=told["new_tokens"],
        temperature=1.0,
        stop_token="eos",
        missing_eos_penalty=1.0,
        learning_rate=told["learning_rate"],
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def _scalar(config: Any) -> Any:
    transformers = importlib.import_module("transformers")
    values = {**config.to_dict(), "num_labels": 1}
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**values))


def _padded(pad: int, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    prompts = [row["input_ids"] for row in rows]
    longest = max(len(prompt) for prompt in prompts)
    return {"input_ids": torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])}


def _clock() -> Any:
    """A callback with the seconds of the processor at the end of each iteration, in `marks`."""

    class Clock(importlib.import_module("transformers").TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.marks.append(time.process_time())

    return Clock()


if __name__ == "__main__":
    main()
