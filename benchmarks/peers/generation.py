"""transformers' `generate`: `python generation.py COURSE.json WEIGHTS TURN ANSWER.json`.

Runs in an environment with torch and transformers, which are imported by name. Prompts are taken in their
order, as many at a time as the course says, padded at the left.
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Measure, and write tokens and seconds."""
    course, weights, turn, answer = sys.argv[1:]
    told = json.loads(Path(course).read_text("utf-8"))
    torch.set_num_threads(1)
    model = llama(told, weights)
    torch.manual_seed(int(turn))
    tokens, started = 0, time.process_time()
    for start in range(0, len(told["prompts"]), told["at_once"]):
        tokens += answered(model, told, told["prompts"][start : start + told["at_once"]])
    found = {"tokens": tokens, "processor": time.process_time() - started}
    Path(answer).write_text(json.dumps(found), "utf-8")


def llama(told: dict[str, Any], weights: str) -> Any:
    """Its Llama with the weights of the course."""
    transformers, shape = importlib.import_module("transformers"), told["shape"]
    config = transformers.LlamaConfig(
        vocab_size=told["vocabulary"],
        hidden_size=shape["dim"],
        intermediate_size=told["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=shape["context"],
        rms_norm_eps=shape["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
        tie_word_embeddings=False,
        pad_token_id=told["pad"],
        eos_token_id=told["end"],
        bos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(importlib.import_module("safetensors.torch").load_file(weights))
    return model.eval()


@torch.inference_mode()
def answered(model: Any, told: dict[str, Any], prompts: list[list[int]]) -> int:
    """Tokens of the answers to a batch, their ends included, without what is filled up."""
    longest = max(len(prompt) for prompt in prompts)
    padded = [[told["pad"]] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    made = model.generate(
        input_ids=torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        max_new_tokens=told["new_tokens"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=told["pad"],
        eos_token_id=told["end"],
    )
    return sum(
        row.index(told["end"]) + 1 if told["end"] in row else len(row)
        for row in made[:, longest:].tolist()
    )


if __name__ == "__main__":
    main()
