"""Programs that are no dependency of ours read what is exported: llama.cpp, and transformers 4.

Each lives in a folder of its own below `.bench/`, made when it is missing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.work import environment
from conf.compose import FOLDER
from conf.shape import ShapeConfig
from model.gguf import write_gguf
from model.transformer import Transformer
from tests.model.test_gguf import KINDS, model
from tests.model.tiny import tiny_tokenizer

pytestmark = pytest.mark.soak
ROOT = Path(__file__).resolve().parents[2]
TRANSFORMERS_4 = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.0")
TEXTS = "The cat eats rice. 猫吃米饭 2026! <|im_end|>"


def answers_of_llama_cpp(folder: Path, path: Path, ids: list[int], vocabulary: int) -> Any:
    python = environment("llama_cpp", ("xllamacpp==2026.10.11549",))
    asked, answer = folder / "asked.json", folder / "answer.json"
    asked.write_text(json.dumps({"text": TEXTS, "ids": ids, "vocabulary": vocabulary}), "utf-8")
    script = Path(__file__).with_name("llama_cpp_answers.py")
    done = subprocess.run(
        [python, script, path, asked, answer], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(answer.read_text("utf-8"))


def check_with_llama_cpp(folder: Path, ours: Transformer) -> None:
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    with torch.no_grad():
        # At their first size weights hardly move the logits: keys in the wrong order would pass.
        for weight in ours.parameters():
            if weight.dim() == 2:
                weight.mul_(1.5 / ours.shape.dim**0.5 / weight.std())
    write_gguf(folder / "model.gguf", ours, folder / "tokenizer")
    ids = torch.randint(4, 400, (1, 40), generator=torch.Generator().manual_seed(0))
    found = answers_of_llama_cpp(folder, folder / "model.gguf", ids[0].tolist(), 400)
    assert found["tokens"] == tokenizer.encode(TEXTS)
    with torch.inference_mode():
        wanted = torch.log_softmax(ours.logits(ours.hidden(ids))[0, -1].double(), -1)
    difference = (torch.tensor(found["logprobs"]) - wanted).abs().max().item()
    # It computes parts in float16 (in bfloat16 ours differ by 0.05; with keys in the wrong order by 7).
    assert difference <= 0.03


@pytest.mark.parametrize("kind", list(KINDS))
def test_llama_cpp_computes_the_same(kind: str, tmp_path: Path) -> None:
    check_with_llama_cpp(tmp_path, model(**KINDS[kind]))


@pytest.mark.parametrize("preset", sorted(path.stem for path in (FOLDER / "shape").glob("*.yaml")))
def test_llama_cpp_computes_a_block_of_every_named_shape(preset: str, tmp_path: Path) -> None:
    fields = yaml.safe_load((FOLDER / "shape" / f"{preset}.yaml").read_text("utf-8"))
    shape = ShapeConfig.model_validate(fields | {"layers": 1})
    check_with_llama_cpp(tmp_path, Transformer(shape, 400, seed=2))


def test_transformers_4_reads_and_writes_the_same_folders(tmp_path: Path) -> None:
    folder = ROOT / ".bench" / "transformers-4.57"
    if not folder.exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*install, tmp_path / "packages", *TRANSFORMERS_4], check=True)
        (tmp_path / "packages").rename(folder)
    # Before our own environment's, whose torch it shares.
    path = os.pathsep.join([str(folder), str(ROOT)])
    tests = ["tests/model/test_convert.py", "tests/model/test_huggingface.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
