"""SFT, reward, DPO and PPO learn the same on every engine, also where no rank holds the whole model."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

from model.ranks import Ranks
from tests.model.small_jobs import finish, start_pair
from tests.model.small_world import SHAPE, write_world
from tests.model.stage_runs import SETTINGS, run

ENGINES = ("ddp", "fsdp", "tensor", "pipeline", "zero2", "zero3")
# Low-rank corrections want matrices that nobody cuts into pieces.
RUNS = [wish for wish in itertools.product(SETTINGS, ENGINES) if wish != ("lora", "tensor")]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs, STAGE-ENGINE."""
    folder = tmp_path_factory.mktemp("stages")
    world = folder / "world"
    # Two processes share the heads.
    write_world(world, shape=SHAPE.model_copy(update={"kv_heads": 2}))
    for stage in SETTINGS:
        run(stage, "plain", world, folder, Ranks())
        if stage == "reward":
            shutil.copytree(folder / "reward-plain" / "files", world / "reward")
    wishes = ["/".join(wish) for wish in RUNS]
    finish(start_pair("tests.model.stage_runs", str(world), str(folder), *wishes), timeout=400)
    return folder


@pytest.mark.parametrize(("stage", "engine"), RUNS)
def test_every_figure_is_that_of_one_process(runs: Path, stage: str, engine: str) -> None:
    wanted, found = (lines(runs / f"{stage}-{name}") for name in ("plain", engine))
    assert len(found) == len(wanted)
    for here, there in zip(found, wanted, strict=True):
        assert here == pytest.approx(there, rel=1e-5, abs=1e-5)


def lines(attempt: Path) -> list[dict[str, float]]:
    """Metrics of every step, without what the clock decides, and without the share of answers that DPO
    has in the right order, which at its first step are all ties."""
    clocks = ("time", "tokens_per_second", "data_wait_share", "peak_memory_bytes", "accuracy")
    text = (attempt / "logs" / "metrics.jsonl").read_text("utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in clocks} for line in found]
