"""A policy written for other programs, and checked. Worker: `python -m model.convert JOBFILE`."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from conf.contract import JobFile
from conf.export import ExportConfig
from model.gguf import read_gguf, write_gguf
from model.huggingface import generation_config, hf_config, read_hf, to_hf
from model.journal import Journal
from model.ranks import Ranks
from model.transformer import Transformer
from model.weights import load_model, save_tensors
from model.worker import run
from storage.checkpoint import CONFIG, TOKENIZER, WEIGHTS
from storage.tokenizer import CONFIG_FILE, MODEL_FILE, chat_template, read_meta, tokenizer_config

GGUF_FILE = "model.gguf"
LARGEST_DIFFERENCE = {"fp32": 1e-5, "bf16": 0.25}
"""Between the logits of the policy and of what was written and read again."""
PROBE_ROWS, PROBE_TOKENS, MOST_PROBE_TOKENS = 4, 64, 1024


def main() -> None:
    """Entry of the worker."""
    run(work)


def work(job: JobFile, ranks: Ranks, journal: Journal) -> dict[str, Any]:
    """Write the job's policy in the form asked for and compare the logits of what was written."""
    settings = ExportConfig.model_validate(job.settings)
    policy = Path(job.inputs["policy"])
    model, precision = load_model(policy, is_scalar=False), settings.precision
    match settings.target:
        case "hf":
            write_hf(job.files, model, policy / TOKENIZER, precision=precision)
            written = read_hf(job.files)
        case "gguf":
            write_gguf(job.files / GGUF_FILE, model, policy / TOKENIZER, precision=precision)
            written = read_gguf(job.files / GGUF_FILE, rope_scaling=model.shape.rope_scaling)
    difference = checked(model, written, precision)
    (job.files / "export.json").write_text(
        json.dumps({"target": settings.target, "precision": settings.precision}), "utf-8"
    )
    size = sum(path.stat().st_size for path in job.files.iterdir())
    return {"logit_difference": difference, "bytes": size, "target": settings.target}


def write_hf(files: Path, model: Transformer, tokenizer: Path, *, precision: str = "fp32") -> None:
    """Write weights, configuration and tokenizer so that transformers 4 and 5 load them alike."""
    files.mkdir(parents=True, exist_ok=True)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    state = {name: weight.to(kind) for name, weight in to_hf(model.state_dict()).items()}
    save_tensors(files / WEIGHTS, state, metadata={"format": "pt"})
    meta = read_meta(tokenizer)
    _write(files / CONFIG, hf_config(model, meta, precision))
    _write(files / "generation_config.json", generation_config(meta))
    _write(files / CONFIG_FILE, tokenizer_config(tokenizer, context=model.shape.context))
    (files / "chat_template.jinja").write_text(chat_template(meta.system), "utf-8")
    shutil.copyfile(tokenizer / MODEL_FILE, files / MODEL_FILE)


def checked(model: Transformer, written: Transformer, precision: str) -> float:
    """How far the logits of what was written lie from the model's; ValueError where rounding cannot be why."""
    difference, most = compare(model, written), LARGEST_DIFFERENCE[precision]
    if not difference <= most:
        raise ValueError(
            f"logits of the written model differ by {difference} from the policy's, at most {most} is "
            f"rounding; do not use this export"
        )
    return difference


@torch.no_grad()
def compare(one: Transformer, other: Transformer) -> float:
    """Largest difference between the logits of two models on the same random tokens."""
    generator = torch.Generator().manual_seed(0)
    # Long enough that a sliding window leaves something out.
    wanted = max(PROBE_TOKENS, one.shape.sliding_window + PROBE_TOKENS)
    tokens = min(wanted, one.shape.context, MOST_PROBE_TOKENS)
    ids = torch.randint(one.vocabulary, (PROBE_ROWS, tokens), generator=generator)
    logits = one.logits(one.hidden(ids)) - other.logits(other.hidden(ids))
    return float(logits.abs().max())


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
