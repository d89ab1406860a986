"""Steps of TRL's trainers: `python alignment_steps.py KIND COURSE.json ANSWER.json`.

Runs in an environment with trl, which is imported by name. Activations are not computed again and all is
float32, as on our side; else its defaults.
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

EOS = 1
REFUSED = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}


def main() -> None:
    """Train over the rows of the course twice, and write the seconds of the processor of the second time."""
    kind, course, answer = sys.argv[1:]
    settings = json.loads(Path(course).read_text("utf-8"))
    torch.set_num_threads(1)
    trainer = {"sft": _sft, "reward": _reward, "dpo": _dpo, "dpo_known": _dpo}[kind](settings, kind)
    steps = len(settings["rows"]) // settings["batch_rows"]
    clock = _Clock(steps)
    trainer.add_callback(clock.callback())
    trainer.train()
    Path(answer).write_text(json.dumps({"processor": clock.seconds}), "utf-8")


class _Clock:
    """Seconds of the processor from the end of one step to that of a later one."""

    def __init__(self, steps: int) -> None:
        self._steps, self._started, self.seconds = steps, 0.0, 0.0

    def callback(self) -> Any:
        """What a trainer calls."""
        transformers = importlib.import_module("transformers")
        clock = self

        class Callback(transformers.TrainerCallback):  # pyright: ignore[reportUntypedBaseClass]
            def on_step_end(self, *given: Any, **others: Any) -> None:
                _, state, _ = given
                if state.global_step == clock._steps:
                    clock._started = time.process_time()
                if state.global_step == 2 * clock._steps:
                    clock.seconds = time.process_time() - clock._started

        return Callback()


def _sft(settings: dict[str, Any], kind: str) -> Any:
    trl = importlib.import_module("trl")
    rows = [
        {"prompt": _text(row["prompt"]), "completion": " " + _text(row["chosen"][:-1])}
        for row in settings["rows"]
    ]
    arguments = trl.SFTConfig(max_length=None, **_arguments(settings))
    return trl.SFTTrainer(_model(settings), args=arguments, **_inputs(rows, settings))


def _reward(settings: dict[str, Any], kind: str) -> Any:
    trl = importlib.import_module("trl")
    rows = [
        {side: f"{_text(row['prompt'])} {_text(row[side][:-1])}" for side in ("chosen", "rejected")}
        for row in settings["rows"]
    ]
    arguments = trl.RewardConfig(max_length=None, **_arguments(settings))
    model = _model(settings, "LlamaForSequenceClassification")
    return trl.RewardTrainer(model, args=arguments, **_inputs(rows, settings))


def _dpo(settings: dict[str, Any], kind: str) -> Any:
    trl = importlib.import_module("trl")
    rows = [
        {
            "prompt": _text(row["prompt"]),
            **{side: " " + _text(row[side][:-1]) for side in ("chosen", "rejected")},
        }
        for row in settings["rows"]
    ]
    arguments = trl.DPOConfig(
        max_length=None, precompute_ref_log_probs=kind == "dpo_known", **_arguments(settings)
    )
    return trl.DPOTrainer(
        _model(settings), ref_model=_model(settings), args=arguments, **_inputs(rows, settings)
    )


def _text(ids: list[int]) -> str:
    return " ".join(f"t{number}" for number in ids)


def _arguments(settings: dict[str, Any]) -> dict[str, Any]:
    steps = len(settings["rows"]) // settings["batch_rows"]
    return {
        **REFUSED,
        "output_dir": settings["folder"],
        "per_device_train_batch_size": settings["batch_rows"],
        "max_steps": 2 * steps,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def _inputs(rows: list[dict[str, str]], settings: dict[str, Any]) -> dict[str, Any]:
    tokenizers = importlib.import_module("tokenizers")
    words = {"<pad>": 0, "<eos>": EOS, **{f"t{n}": n for n in range(2, settings["vocabulary"])}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = importlib.import_module("transformers").PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")
    dataset = importlib.import_module("datasets").Dataset.from_list(rows)
    return {"train_dataset": dataset, "processing_class": tokenizer}


def _model(settings: dict[str, Any], name: str = "LlamaForCausalLM") -> Any:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    shape = settings["shape"]
    config = transformers.LlamaConfig(
        vocab_size=settings["vocabulary"],
        hidden_size=shape["dim"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=shape["context"],
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=EOS,
        **({"num_labels": 1} if name != "LlamaForCausalLM" else {}),
    )
    return getattr(transformers, name)(config)


if __name__ == "__main__":
    main()
