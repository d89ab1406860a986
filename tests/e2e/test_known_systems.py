"""The recipes of known systems have their sizes, and run end to end, shortened to two layers and a few
steps; in the short form narrow, too, and with the workers in this process."""

import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from conf.pretrain import PretrainConfig
from conf.settings import Settings
from conf.tokenizer import TokenizerConfig
from conf.world import WorldConfig
from flows.graph import load_graph
from model.journal import Journal
from model.ranks import Ranks
from storage.artifact import Artifact
from storage.checkpoint import Export, Policy
from tasks import launch
from tasks.stage import Job
from tasks.world import world
from tests.e2e.building import build

SHORT = [
    "launch.threads=1",
    "tokenizer.vocabulary=500",
    "pretrain.shape.layers=2",
    "pretrain.tokens=2048",
    "pretrain.held_tokens=600",
    "sft.max_steps=1",
    "sft.batch_rows=2",
    "sft.held_rows=2",
    "evaluate_pretrain.held_documents=2",
    "evaluate_sft.held_documents=2",
    "evaluate_pretrain.prompts=[Hello]",
    "evaluate_sft.prompts=[Hello]",
    "evaluate_pretrain.max_new_tokens=4",
    "evaluate_sft.max_new_tokens=4",
    "evaluate_sft.held_questions=2",
]
SHORT_PPO = [
    "reward.max_steps=1",
    "reward.batch_rows=2",
    "reward.scale_answers=2",
    "reward.max_new_tokens=4",
    "ppo.iterations=1",
    "ppo.rollout_rows=2",
    "ppo.minibatch_rows=2",
    "ppo.max_new_tokens=4",
    "ppo.held_prompts=2",
    "evaluate_ppo.held_documents=2",
    "evaluate_ppo.prompts=[Hello]",
    "evaluate_ppo.max_new_tokens=4",
    "evaluate_ppo.held_questions=2",
]

NARROW = [
    "pretrain.shape.dim=64",
    "pretrain.shape.ffn=96",
    "pretrain.shape.context=128",
    "pretrain.batch_tokens=1024",
]


def data(folder: Path) -> Path:
    """A folder laid out as the recipe `small` reads it, of the demo world's files."""
    made = folder / "made"
    (made / "files").mkdir(parents=True)
    job = Job(node="world", stage="world", path=made, store=None)  # type: ignore[arg-type]
    settings = WorldConfig(warcs=4, good_pages=24, animals=6, chats=60, pairs=60, held_pairs=10)
    files = world(job, settings=settings).files
    shutil.copytree(files / "crawl", folder / "data" / "crawl")
    shutil.copytree(files / "chats", folder / "data" / "sft" / "world")
    shutil.copytree(files / "preferences", folder / "data" / "preference" / "world")
    return folder


def work_here(
    job: Job, module: str, settings: Settings, inputs: Mapping[str, Artifact]
) -> dict[str, Any]:
    """What a worker does, in this process: to start one takes seconds."""
    told = launch._job_file(job, settings, settings.launch, inputs)  # type: ignore[attr-defined]
    job.state.mkdir(parents=True, exist_ok=True)
    return import_module(module).work(told, Ranks(), Journal(job.logs))


@pytest.fixture
def workers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pretrain", "sft", "reward", "ppo", "evaluate", "export"):
        monkeypatch.setattr(f"tasks.{name}.run_worker", work_here)


def counted(policy: Artifact) -> tuple[int, ...]:
    assert isinstance(policy, Policy)
    shape = policy.card.shape
    return (shape.dim, shape.heads, shape.kv_heads, shape.ffn_width, shape.context)


@pytest.mark.parametrize(
    ("recipe", "overrides", "millions"),
    [
        ("baby_llama2", [], 91.64),
        # four more layers of 4 x 512^2 + 3 x 512 x 1376 = 3.162M
        ("baby_llama2", ["pretrain.shape.layers=12"], 91.64 + 4 * 3.162),
        ("baby_llama2", ["shape=218m"], 218.13),
        ("zero_chatgpt", [], 159.39),
    ],
)
def test_they_are_sound_and_have_the_sizes_that_they_are_known_by(
    recipe: str, overrides: list[str], millions: float, tmp_path: Path
) -> None:
    for name in ("sft/one/a.jsonl", "preference/one/a.jsonl", "crawl/a.warc.gz"):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).touch()
    nodes = load_graph(recipe, ["data=data", *overrides], base=tmp_path).nodes
    settings, tokenizer = nodes["pretrain"].settings, nodes["tokenizer"].settings
    assert isinstance(settings, PretrainConfig)
    assert isinstance(tokenizer, TokenizerConfig)
    shape = settings.shape
    norms = (2 * shape.layers + 1) * shape.dim
    counted_parameters = shape.parameters(tokenizer.vocabulary) - norms
    assert counted_parameters / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.usefixtures("workers_here")
@pytest.mark.parametrize(
    ("recipe", "overrides", "last"),
    [("baby_llama2", SHORT, "sft"), ("zero_chatgpt", [*SHORT, *SHORT_PPO], "ppo")],
)
def test_in_short_they_run_from_raw_files_to_an_export(
    recipe: str, overrides: list[str], last: str, tmp_path: Path
) -> None:
    built = build(recipe, ["data=data", *overrides, *NARROW], data(tmp_path))
    assert counted(built["pretrain"])[3:] == counted(built[last])[3:] == (96, 128)
    assert ("ppo" in built) == (last == "ppo")
    assert isinstance(built["export"], Export)


@pytest.mark.soak
def test_baby_llama2_pretrains_fine_tunes_and_leaves(tmp_path: Path) -> None:
    built = build(
        "baby_llama2", ["data=data", *SHORT, "pretrain.batch_tokens=1024"], data(tmp_path)
    )
    assert counted(built["pretrain"]) == counted(built["sft"]) == (512, 8, 8, 1376, 512)
    assert not {"reward", "ppo", "dpo"} & set(built)
    assert isinstance(built["export"], Export)


@pytest.mark.soak
def test_zero_chatgpt_goes_on_to_ppo(tmp_path: Path) -> None:
    overrides = ["data=data", *SHORT, *SHORT_PPO, "pretrain.batch_tokens=2048"]
    built = build("zero_chatgpt", overrides, data(tmp_path))
    assert counted(built["ppo"]) == (512, 16, 16, 2752, 1024)
    assert isinstance(built["export"], Export)
