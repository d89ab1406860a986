"""All engines do the same: equal losses, the same bits after a death, one form of checkpoint."""

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from model.ranks import Ranks
from tests.model.engine_runs import LAUNCHES, SETTINGS, run
from tests.model.small_jobs import finish, start_pair
from tests.model.small_tokens import write_small_tokens

ENGINES = tuple(name for name in LAUNCHES if name != "plain")
STEPS = 20
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Runs:
    """Where the runs of all engines lie, and the step at which the broken ones died."""

    folder: Path
    tokens: Path
    deaths: dict[str, int]

    def figures(self, name: str, figure: str) -> list[float]:
        """A figure of every step that has it."""
        lines = (self.folder / name / "logs" / "metrics.jsonl").read_text("utf-8").splitlines()
        return [line[figure] for line in map(json.loads, lines) if figure in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("engines")
    tokens = write_small_tokens(folder / "tokens")
    deaths = {engine: random.randint(2, STEPS - 1) for engine in ENGINES}
    ranks = start_pair(
        "tests.model.engine_runs",
        str(tokens),
        str(folder),
        *(f"{engine}={step}" for engine, step in deaths.items()),
    )
    finish(ranks, timeout=550)
    run(folder / "plain", tokens, "plain", Ranks())
    return Runs(folder, tokens, deaths)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_loss_and_norm_is_that_of_one_process(runs: Runs, engine: str) -> None:
    assert len(runs.figures(engine, "loss")) == STEPS
    for figure, error in (("loss", 1e-6), ("held_loss/zh", 1e-6), ("gradient_norm", 5e-6)):
        wanted, found = runs.figures("plain", figure), runs.figures(engine, figure)
        assert found == pytest.approx(wanted, rel=0, abs=error), figure


@pytest.mark.parametrize("engine", ENGINES)
def test_dead_at_a_random_step_and_run_again_gives_the_same_bits(runs: Runs, engine: str) -> None:
    last = f"state/checkpoints/step_{STEPS:09d}"
    for name in (
        "files/model.safetensors",
        f"{last}/model.safetensors",
        f"{last}/optimizer.safetensors",
    ):
        whole, broken = (runs.folder / e / name for e in (engine, f"{engine}-broken"))
        assert whole.read_bytes() == broken.read_bytes(), (name, runs.deaths[engine])
    assert runs.figures(engine, "loss") == runs.figures(f"{engine}-broken", "loss")


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_goes_on_from_what_two_saved(runs: Runs, tmp_path: Path, engine: str) -> None:
    attempt = tmp_path / "attempt"
    shutil.copytree(runs.folder / engine, attempt)
    # The newest checkpoint is of the end; the one before it is taken.
    shutil.rmtree(attempt / f"state/checkpoints/step_{STEPS:09d}")
    run(attempt, runs.tokens, "plain", Ranks())
    lines = (attempt / "logs" / "metrics.jsonl").read_text("utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert losses == pytest.approx(runs.figures("plain", "loss"), rel=0, abs=1e-6)


def test_weights_are_whole_in_the_artifact(runs: Runs) -> None:
    sizes = {
        engine: (runs.folder / engine / "files/model.safetensors").stat().st_size
        for engine in ("plain", *ENGINES)
    }
    assert len(set(sizes.values())) == 1, sizes
    assert SETTINGS.shape.dropout, "without dropout half of the test is idle"
