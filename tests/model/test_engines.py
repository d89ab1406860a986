"""All engines do the same: equal losses, the same bits after a death, one form of checkpoint."""

import json
import random
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from model.ranks import Ranks
from tests.model.engine_runs import LAUNCHES, SETTINGS, STEPS, move_on, run, run_guarded
from tests.model.small_jobs import finish, start_pair
from tests.model.small_tokens import write_small_tokens

ENGINES = tuple(name for name in LAUNCHES if name != "plain")
MOVES = ("ddp-to-fsdp", "fsdp-to-zero3", "zero2-to-tensor", "tensor-to-pipeline", "pipeline-to-ddp")
ENDS = (
    "files/model.safetensors",
    f"state/checkpoints/step_{STEPS:09d}/model.safetensors",
    f"state/checkpoints/step_{STEPS:09d}/optimizer.safetensors",
)
"""All weights and all optimizer state at the end of a run."""
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
        *MOVES,
    )
    finish(ranks, timeout=550)
    run(folder / "plain", tokens, "plain", Ranks())
    run_guarded(folder, tokens, "plain", Ranks())
    return Runs(folder, tokens, deaths)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_loss_and_norm_is_that_of_one_process(runs: Runs, engine: str) -> None:
    assert len(runs.figures(engine, "loss")) == STEPS
    for figure, error in (("loss", 1e-6), ("held_loss/zh", 1e-6), ("gradient_norm", 5e-6)):
        wanted, found = runs.figures("plain", figure), runs.figures(engine, figure)
        assert found == pytest.approx(wanted, rel=0, abs=error), figure


@pytest.mark.parametrize("engine", ENGINES)
def test_the_guard_leaves_out_the_steps_that_it_does_in_one_process(
    runs: Runs, engine: str
) -> None:
    wanted, found = (runs.figures(f"{name}-guarded", "skipped") for name in ("plain", engine))
    assert found == wanted
    assert 0 < wanted[-1] < STEPS
    losses = runs.figures("plain-guarded", "loss")
    assert runs.figures(f"{engine}-guarded", "loss") == pytest.approx(losses, rel=0, abs=2e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_dead_at_a_random_step_and_run_again_gives_the_same_bits(runs: Runs, engine: str) -> None:
    for name in ENDS:
        whole, broken = (runs.folder / e / name for e in (engine, f"{engine}-broken"))
        assert whole.read_bytes() == broken.read_bytes(), (name, runs.deaths[engine])
    assert runs.figures(engine, "loss") == runs.figures(f"{engine}-broken", "loss")


@pytest.mark.parametrize("move", MOVES)
def test_another_engine_goes_on_with_what_one_saved(runs: Runs, move: str) -> None:
    losses = runs.figures(move, "loss")
    assert losses == pytest.approx(runs.figures("plain", "loss"), rel=0, abs=1e-6)
    # It was no run from the start.
    assert losses[:16] == runs.figures(move.partition("-to-")[0], "loss")[:16]


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_goes_on_from_what_two_saved(runs: Runs, engine: str) -> None:
    move_on(runs.folder, engine, "plain", runs.tokens, Ranks())
    losses = runs.figures(f"{engine}-to-plain", "loss")
    assert losses == pytest.approx(runs.figures("plain", "loss"), rel=0, abs=1e-6)


def test_weights_are_whole_in_the_artifact(runs: Runs) -> None:
    sizes = {
        engine: (runs.folder / engine / "files/model.safetensors").stat().st_size
        for engine in ("plain", *ENGINES)
    }
    assert len(set(sizes.values())) == 1, sizes
    assert SETTINGS.shape.dropout, "without dropout half of the test is idle"


@pytest.mark.soak
@pytest.mark.parametrize("name", ["tensor", "pipeline", "ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_four_processes_do_what_two_do_and_go_on_from_them(
    runs: Runs, tmp_path: Path, name: str
) -> None:
    wishes = [f"{name}={random.randint(2, STEPS - 1)}"]
    on(4, runs.tokens, tmp_path, *wishes)
    four = replace(runs, folder=tmp_path)
    for figure in ("loss", "held_loss/zh"):
        wanted = runs.figures("plain", figure)
        assert four.figures(name, figure) == pytest.approx(wanted, rel=0, abs=1e-6), figure
    assert four.figures(name, "loss") == four.figures(f"{name}-broken", "loss")
    move = f"{name}-to-{name}"
    on(2, runs.tokens, tmp_path, move)
    on(4, runs.tokens, runs.folder, move)
    for moved, begun in ((four, four), (runs, runs)):
        losses = moved.figures(move, "loss")
        assert losses == pytest.approx(runs.figures("plain", "loss"), rel=0, abs=1e-6)
        assert losses[:16] == begun.figures(name, "loss")[:16]


def on(processes: int, tokens: Path, folder: Path, *wishes: str, code: int = 0) -> None:
    """Run the module of runs on so many processes."""
    arguments = (str(tokens), str(folder), *wishes)
    finish(start_pair("tests.model.engine_runs", *arguments, processes=processes), code=code)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["plain", "ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_five_kills_leave_the_bits_of_an_unbroken_run(tmp_path: Path, name: str) -> None:
    tokens = write_small_tokens(tmp_path / "tokens")
    processes = 1 if name == "plain" else 2
    deaths = sorted(random.sample(range(2, STEPS), 5))
    on(processes, tokens, tmp_path / "whole", f"{name}!0")
    for death in deaths:
        on(processes, tokens, tmp_path / "killed", f"{name}!{death}", code=-signal.SIGKILL)
    on(processes, tokens, tmp_path / "killed", f"{name}!0")
    for file in ENDS:
        whole, killed = (tmp_path / folder / name / file for folder in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes(), (file, deaths)
