"""What is to measure a CUDA machine runs where little is installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BARE = """
import runpy, sys

class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"yaml", "prefect", "mlflow", "polars", "pyarrow", "pytest", "rich", "hydra"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Bare())
runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""
"""Runs `benchmarks.gpu` where what a worker does not need is not installed."""


@pytest.mark.slow
def test_it_runs_with_a_workers_needs_alone(tmp_path: Path) -> None:
    parts = ("speed", "packed")
    arguments = [sys.executable, "-c", BARE, "--tiny", "--out", str(tmp_path), *parts]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    rates = [found["speed"][f"tiny, {name}"] for name in ("fused head alone", "neither")]
    assert all(rate["tokens_per_second"] > 0 for rate in rates)
    # The loss of random ids over 512: log 512, whichever way the head goes.
    assert [rate["first_loss"] for rate in rates] == pytest.approx([6.24, 6.24], abs=0.1)
    packed = found["packed"]
    assert packed["difference_of_first_losses"] <= packed["allowed"]
