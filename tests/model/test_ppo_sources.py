"""PPO from start to end on every source of reward and of truth, and going on after kills."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.contract import JobFile
from conf.ppo import PpoConfig, RewardJudgeConfig
from model import ppo
from model.weights import load_tensors
from storage.jsonl import SplitWriter
from tasks.world_answers import best_answer, conversation
from tasks.world_language import make_facts
from tests.model.small_world import (
    function_file,
    kill_at,
    make_job,
    metrics,
    run_here,
    same_metrics,
    start_worker,
    write_world,
)
from tests.tasks.endpoint_stand_in import completion, endpoint

SETTINGS = PpoConfig(
    iterations=1,
    rollout_rows=8,
    minibatch_rows=4,
    max_new_tokens=6,
    learning_rate=1e-3,
    value_learning_rate=5e-3,
    unended_penalty=0.0,
    held_prompts=4,
)
SCORE = "float(len(answer['text']) % 7)"
RESUMED = SETTINGS.model_copy(
    update={
        "iterations": 10,
        "truth_every_iterations": 3,
        "truth_prompts": 4,
        "truth_patience": 0,
        "kl_target": 0.01,
        "kl_horizon": 50.0,
        "checkpoint_every_iterations": 2,
    }
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that has learnt nothing, and conversations."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def job_of(
    folder: Path, made: Path, settings: PpoConfig, sources: dict[str, Path], **inputs: Path
) -> JobFile:
    files = {"policy": made / "policy", "conversations": made / "conversations", **inputs}
    return make_job(folder, "ppo", settings, files, sources=sources)


def weights(job: JobFile) -> bytes:
    return (job.files / "model.safetensors").read_bytes()


def test_a_function_a_judge_and_people_who_score_alike_teach_alike(
    world: Path, tmp_path: Path
) -> None:
    scorer = function_file(tmp_path / "scorer.py", SCORE)
    by_function = job_of(tmp_path / "function", world, SETTINGS, {"functions": scorer})
    run_here(ppo.work, by_function)

    with endpoint(lambda prompt, _: completion(str(len(prompt) % 7))) as (address, asked):
        judge = RewardJudgeConfig(model="m", base_url=address, prompt="{answer}")
        settings = SETTINGS.model_copy(update={"judge": judge})
        by_judge = job_of(tmp_path / "judge", world, settings, {})
        run_here(ppo.work, by_judge)
        assert set(asked.values()) == {1}

    # People are asked for what the first answers earn, and score them before the second run.
    scores = tmp_path / "scores.jsonl"
    scores.write_text('{"prompt": "Who?", "answer": "Me.", "score": 1}\n', "utf-8")
    asking = job_of(tmp_path / "asking", world, SETTINGS, {"people": scores})
    run_here(ppo.work, asking)
    assert metrics(asking)[0]["scored_share/people"] == 0
    asked_for = (asking.logs / "unscored.jsonl").read_text("utf-8").splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in asked_for]
    scored = [{**row, "score": len(row["answer"]) % 7} for row in rows]
    scores.write_text("".join(f"{json.dumps(row)}\n" for row in scored), "utf-8")
    by_people = job_of(tmp_path / "people", world, SETTINGS, {"people": scores})
    run_here(ppo.work, by_people)

    means: list[float] = []
    for name, job in (("functions", by_function), ("judge", by_judge), ("people", by_people)):
        [line] = metrics(job)
        assert line[f"scored_share/{name}"] == 1.0
        assert "reward/model" not in line  # there is none
        assert line["reward"] == pytest.approx(0.0, abs=1e-5)  # by their own scale
        means.append(line[f"reward/{name}"])
        assert weights(job) == weights(by_function)
    assert means[0] == means[1] == means[2] > 0
    assert weights(asking) != weights(by_function)


def test_a_world_says_what_is_true_and_vain_looks_end_the_run(world: Path, tmp_path: Path) -> None:
    facts = make_facts(0, 6, 0.2)
    truth = tmp_path / "world" / "truth" / "facts.json"
    truth.parent.mkdir(parents=True)
    truth.write_text(json.dumps(facts.truth), "utf-8")
    with SplitWriter(tmp_path / "conversations") as chats:
        for number, question in enumerate(facts.questions()[::6]):
            row = conversation(question, best_answer(facts, question), number)
            chats.write("train" if question.split == "train" else "held", row)
    settings = SETTINGS.model_copy(
        update={
            "iterations": 5,
            "truth_every_iterations": 1,
            "truth_prompts": 4,
            "truth_patience": 2,
        }
    )
    scorer = function_file(tmp_path / "scorer.py", SCORE)
    inputs = {"world": tmp_path / "world", "conversations": tmp_path / "conversations"}
    job = job_of(tmp_path / "job", world, settings, {"functions": scorer}, **inputs)
    figures = run_here(ppo.work, job)
    # A policy that has learnt nothing says six tokens of nothing: superfluous, and not ended.
    looks = {line["step"]: line["held_truth"] for line in metrics(job)}
    assert looks == {0: -1.5, 1: -1.5, 2: -1.5}
    assert figures["held_after"]["truth"]["value"] == -1.5
    assert figures["iterations"] == 2
    # None was better than the look before anything was learnt.
    assert figures["kept_iteration"] == 0
    before, after = (
        load_tensors(path / "model.safetensors") for path in (world / "policy", job.files)
    )
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def resumed_job(folder: Path, world: Path, settings: PpoConfig) -> JobFile:
    """A job with all that a checkpoint holds: scales, a moving coefficient, the best truth so far."""
    code = {
        "functions": function_file(folder / "reward.py", SCORE),
        "truth_functions": function_file(folder / "truth.py", "float(len(answer['text']) % 5)"),
    }
    return job_of(folder, world, settings, code)


def ended_alike(job: JobFile, whole: JobFile) -> None:
    here, there = run_here(ppo.work, job), run_here(ppo.work, whole)
    assert weights(job) == weights(whole)
    assert same_metrics(job) == same_metrics(whole)
    assert {**here, "seconds": 0} == {**there, "seconds": 0}
    lines = metrics(job)
    assert len({line["kl_coef"] for line in lines if "kl_coef" in line}) > 5
    assert len([line for line in lines if "held_truth" in line]) > 3


def test_killed_it_ends_with_the_same_bytes(world: Path, tmp_path: Path) -> None:
    job = resumed_job(tmp_path / "killed", world, RESUMED)
    kill_at(job, 7)
    assert any((job.state / "checkpoints").iterdir())
    ended_alike(job, resumed_job(tmp_path / "whole", world, RESUMED))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_killed_anywhere_it_ends_with_the_same_bytes(
    world: Path, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    settings = RESUMED.model_copy(
        update={"iterations": 60, "checkpoint_every_iterations": 1 + 2 * seed}
    )
    job = resumed_job(tmp_path / "killed", world, settings)
    path, kills = job.logs / "metrics.jsonl", 0
    for _ in range(8):
        worker = start_worker(job)
        begun = path.read_bytes() if path.exists() else b""
        while worker.poll() is None and (not path.exists() or path.read_bytes() == begun):
            time.sleep(0.01)
        time.sleep(rng.random() * 2)
        kills += worker.poll() is None
        worker.kill()
        if worker.wait() == 0:
            break
    assert kills >= 2
    ended_alike(job, resumed_job(tmp_path / "whole", world, settings))
