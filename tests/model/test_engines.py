"""All engines do the same: equal losses, the same bits after a death, one form of checkpoint."""

import json
import random
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from conf.launch import LaunchConfig
from model.engine import refuse_impossible
from model.optimizer import UpdateRule
from model.ranks import Ranks
from model.zero import ZeroEngine, release_builds
from tests.model.engine_runs import LAUNCHES, SETTINGS, STEPS, move_on, run, run_guarded
from tests.model.small_jobs import finish, start_pair
from tests.model.small_tokens import write_small_tokens

LONG = ("zero1_offload", "zero2_offload", "zero3_offload")
"""In the long form only: `zero3_parameters` goes the same way."""
UPDATES = {
    "zero2_fp16": 2e-3,
    "fsdp_fp16": 2e-3,
    "zero1_fp16": 2e-3,
    "zero3_fp16": 2e-3,
    "zero2_fused_adam": 1e-5,
    "zero3_cpu_adam": 1e-5,
    "ddp_muon": 2e-4,
    "fsdp_muon": 2e-4,
    "tensor_muon": 2e-4,
    "pipeline_muon": 2e-4,
    **dict.fromkeys((name for name in LAUNCHES if name.endswith("_bf16")), 2e-3),
    **dict.fromkeys((name for name in LAUNCHES if name.endswith("_recomputed")), 1e-6),
}
"""How far their losses may be from one process's: 16 bits round gradients, DeepSpeed's AdamW divides in another
order than torch's, and torch's Muon rounds to bfloat16 in its iteration. All but the first in the long form
only."""
ENGINES = [
    pytest.param(name, marks=pytest.mark.soak) if name in LONG else name
    for name in LAUNCHES
    if not name.startswith("plain") and name not in UPDATES
]
MOVES = ("ddp-to-fsdp", "fsdp-to-zero3", "zero2-to-tensor", "tensor-to-pipeline", "pipeline-to-ddp")
LAST = f"state/checkpoints/step_{STEPS:09d}"
"""All weights and all optimizer state at the end of a run."""
SAVED = STEPS - SETTINGS.checkpoint_every_steps
"""Steps that who goes on with another's run finds done."""
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Runs:
    """Where the runs of all engines lie, and the steps at which one was killed and one asked to stop."""

    folder: Path
    tokens: Path
    marks: dict[str, tuple[int, int]]

    def figures(self, name: str, figure: str) -> list[float]:
        """A figure of every step that has it."""
        lines = (self.folder / name / "logs" / "metrics.jsonl").read_text("utf-8").splitlines()
        return [line[figure] for line in map(json.loads, lines) if figure in line]


def wanted_engines(session: pytest.Session) -> list[str]:
    """Those that the chosen tests are about."""
    ours = [item for item in session.items if item.path == Path(__file__)]
    chosen = {
        v for item in ours if hasattr(item, "callspec") for v in item.callspec.params.values()
    }
    begun = {move.partition("-to-")[0] for move in MOVES}
    return [name for name in LAUNCHES if not name.startswith("plain") and name in chosen | begun]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runs:
    folder = tmp_path_factory.mktemp("engines")
    tokens = write_small_tokens(folder / "tokens")
    engines = wanted_engines(request.session)
    marks = {name: (random.randint(2, STEPS - 1), random.randint(1, STEPS - 1)) for name in engines}
    rounds = [jobs for name, steps in marks.items() for jobs in rounds_of(name, *steps)]
    on(2, tokens, folder, *rounds, *MOVES)
    run(folder / "plain", tokens, "plain", Ranks())
    run_guarded(folder, tokens, "plain", Ranks())
    return Runs(folder, tokens, marks)


def rounds_of(name: str, killed: int, stopped: int) -> tuple[str, str, str]:
    """An engine's jobs, always two at once."""
    return (
        f"{name}+{name}-guarded",
        f"{name}-killed={killed}+{name}-stopped={stopped}",
        f"{name}-killed+{name}-stopped",
    )


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


@pytest.mark.parametrize("end", ["killed", "stopped"])
@pytest.mark.parametrize("engine", ENGINES)
def test_ended_at_a_random_step_and_run_again_gives_the_same_bits(
    runs: Runs, engine: str, end: str
) -> None:
    # Stopped by a request to one rank, behind which all had saved that step.
    assert_same_bits(runs.folder / engine, runs.folder / f"{engine}-{end}")
    assert runs.figures(engine, "loss") == runs.figures(f"{engine}-{end}", "loss")


@pytest.mark.parametrize("move", MOVES)
def test_another_engine_goes_on_with_what_one_saved(runs: Runs, move: str) -> None:
    losses = runs.figures(move, "loss")
    assert losses == pytest.approx(runs.figures("plain", "loss"), rel=0, abs=1e-6)
    # It was no run from the start.
    assert losses[:SAVED] == runs.figures(move.partition("-to-")[0], "loss")[:SAVED]


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_goes_on_from_what_two_saved(runs: Runs, engine: str) -> None:
    move_on(runs.folder, engine, "plain", runs.tokens, Ranks())
    losses = runs.figures(f"{engine}-to-plain", "loss")
    assert losses == pytest.approx(runs.figures("plain", "loss"), rel=0, abs=1e-6)


def test_weights_are_whole_in_the_artifact(runs: Runs) -> None:
    sizes = {
        engine: (runs.folder / engine / "files/model.safetensors").stat().st_size
        for engine in ("plain", *runs.marks)
    }
    assert len(set(sizes.values())) == 1, sizes
    assert SETTINGS.shape.dropout, "without dropout half of the test is idle"


def test_each_stage_of_a_pipeline_writes_what_it_has(runs: Runs) -> None:
    first, last = (
        set(load_file(path))
        for path in sorted((runs.folder / "pipeline" / LAST / "weights").glob("*.safetensors"))
    )
    assert {"embedding.weight", "blocks.0.query.weight"} <= first
    assert {"norm.weight", "blocks.1.query.weight"} <= last
    assert not first & last
    assert first | last == set(load_file(runs.folder / "plain" / "files/model.safetensors"))


def test_a_device_without_bfloat16_or_flash_attention_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    ranks, half = Ranks(device=torch.device("cuda")), UpdateRule(precision="bf16")
    with pytest.raises(ValueError, match="T4 has no bfloat16; use precision=fp16 or"):
        refuse_impossible(LaunchConfig(), ranks, half, SETTINGS.shape)
    flash, half = LaunchConfig(attention="flash"), UpdateRule(precision="fp16")
    with pytest.raises(ValueError, match="T4 has no FlashAttention"):
        refuse_impossible(flash, ranks, half, SETTINGS.shape)


def test_a_group_whose_decay_has_changed_on_a_load_ends_the_job() -> None:
    engine = SimpleNamespace(_decays=[0.1, 0.0], _zero=SimpleNamespace(param_groups=[{}, {}]))
    for decays, is_refused in (((0.1, 0.0), False), ((0.1, 0.1), True)):
        for group, decay in zip(engine._zero.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        with pytest.raises(AssertionError) if is_refused else nullcontext():
            ZeroEngine._check_groups(engine)


def test_the_lock_of_a_build_that_died_is_removed_and_that_of_a_living_one_stays(
    tmp_path: Path,
) -> None:
    dead, living = (tmp_path / "py311_cpu" / name / "lock" for name in ("fused_adam", "cpu_adam"))
    for lock in (dead, living):
        lock.parent.mkdir(parents=True)
        lock.touch()
    with living.open("rb"):
        release_builds(tmp_path)
        assert (dead.exists(), living.exists()) == (False, True)
    release_builds(tmp_path)
    assert not living.exists()


@pytest.mark.parametrize(
    "name",
    [
        "zero2_fp16",
        *(
            pytest.param(name, marks=pytest.mark.soak)
            for name in list(UPDATES)[1:]
            if not name.startswith("plain")
        ),
    ],
)
def test_other_updates_give_the_loss_of_one_process_and_resume(runs: Runs, name: str) -> None:
    kind = name.rpartition("_")[2]
    plain = f"plain_{kind}" if f"plain_{kind}" in LAUNCHES else "plain"
    if not (runs.folder / plain).exists():
        run(runs.folder / plain, runs.tokens, plain, Ranks())
    wanted = runs.figures(plain, "loss")
    assert runs.figures(name, "loss") == pytest.approx(wanted, rel=0, abs=UPDATES[name])
    assert_same_bits(runs.folder / name, runs.folder / f"{name}-killed")
    if kind == "fp16":
        overflows = runs.figures(plain, "overflows")
        assert 0 < overflows[-1] < STEPS / 2
        assert runs.figures(name, "overflows") == overflows
        assert runs.figures(f"{name}-killed", "overflows") == overflows


def assert_same_bits(whole: Path, broken: Path) -> None:
    """Equal weights and optimizer state at the ends of two runs."""
    ends, others = (
        {path.relative_to(run): path.read_bytes()
         for path in [run / "files/model.safetensors", *(run / LAST).glob("*/*.safetensors")]}
        for run in (whole, broken)
    )  # fmt: skip
    assert ends.keys() == others.keys()
    assert {path.parts[-2] for path in ends} >= {"weights", "optimizer"}
    # Said of names: showing how megabytes differ takes many minutes.
    assert [name for name, content in ends.items() if content != others[name]] == []


@pytest.mark.soak
@pytest.mark.parametrize("name", ["tensor", "pipeline", "ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_four_processes_do_what_two_do_and_go_on_from_them(
    runs: Runs, tmp_path: Path, name: str
) -> None:
    killed, stopped = random.randint(2, STEPS - 1), random.randint(1, STEPS - 1)
    on(4, runs.tokens, tmp_path, *rounds_of(name, killed, stopped))
    four = replace(runs, folder=tmp_path)
    for figure in ("loss", "held_loss/zh"):
        wanted = runs.figures("plain", figure)
        # Four partial sums of a loss near 6, of which a float32 tells 5e-7 apart.
        assert four.figures(name, figure) == pytest.approx(wanted, rel=0, abs=2e-6), figure
    for end in ("killed", "stopped"):
        assert four.figures(name, "loss") == four.figures(f"{name}-{end}", "loss")
    move = f"{name}-to-{name}"
    on(2, runs.tokens, tmp_path, move)
    on(4, runs.tokens, runs.folder, move)
    for moved, begun in ((four, four), (runs, runs)):
        losses = moved.figures(move, "loss")
        assert losses == pytest.approx(runs.figures("plain", "loss"), rel=0, abs=2e-6)
        assert losses[:SAVED] == begun.figures(name, "loss")[:SAVED]


@pytest.mark.soak
def test_ranks_whose_last_part_is_not_full_resume_to_the_same_bits(tmp_path: Path) -> None:
    tokens = write_small_tokens(tmp_path / "tokens")
    # A third of 32 weights is 11, and of the last rank's part one is filling.
    on(3, tokens, tmp_path, *rounds_of("zero3", 7, 5))
    assert_same_bits(tmp_path / "zero3", tmp_path / "zero3-killed")


def on(processes: int, tokens: Path, folder: Path, *rounds: str) -> None:
    """Run the module of runs on so many processes."""
    folder.mkdir(exist_ok=True)
    arguments = (str(tokens), str(folder), *rounds)
    ranks = start_pair("tests.model.engine_runs", *arguments, processes=processes)
    finish(ranks, timeout=1500)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["plain", "ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_five_kills_leave_the_bits_of_an_unbroken_run(tmp_path: Path, name: str) -> None:
    tokens = write_small_tokens(tmp_path / "tokens")
    processes = 1 if name == "plain" else 2
    deaths = sorted(random.sample(range(2, STEPS), 5))
    kills = [f"{name}-killed={death}" for death in deaths]
    on(processes, tokens, tmp_path, name, *kills, f"{name}-killed")
    assert_same_bits(tmp_path / name, tmp_path / f"{name}-killed")
