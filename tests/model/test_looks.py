"""Early stopping and prompts of a pretraining: what ends it, what is kept, what the model writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.contract import SAMPLES, JobFile
from conf.launch import LaunchConfig
from conf.pretrain import PretrainConfig
from conf.shape import ShapeConfig
from model.best import Best
from model.generate import generate
from model.journal import Journal
from model.pretrain import work
from model.ranks import Ranks
from model.transformer import Transformer
from model.weights import load_model
from storage.checkpoint import kept_looks
from storage.tokens import TokenFiles
from tests.model.engine_runs import Killed, MarkedJournal
from tests.model.small_jobs import write_job
from tests.model.small_tokens import documents, write_small_tokens

LAUNCH = LaunchConfig(threads=1, peak_tflops=1)
# Held-out documents are written backwards: their loss falls as letters are learnt, and rises as words are.
SETTINGS = PretrainConfig(
    shape=ShapeConfig(dim=32, layers=1, heads=2, kv_heads=1, context=32),
    tokens=60 * 256,
    batch_tokens=256,
    learning_rate=1e-2,
    schedule="constant",
    warmup=0,
    evaluate_every_steps=4,
    stop_patience=3,
    stop_gain=0.01,
    launch=LAUNCH,
)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = documents(20)
    for splits in texts.values():
        splits["held"] = [text[::-1] for text in splits["held"]]
    return write_small_tokens(tmp_path_factory.mktemp("tokens"), texts)


def run(tokens: Path, attempt: Path, settings: PretrainConfig, *, last: int = -1) -> dict[str, Any]:
    """The figures of a whole job; with `last` one that dies while it writes down that step."""
    path = write_job(attempt, "pretrain", settings, {"tokens": tokens}, LAUNCH)
    job = JobFile.model_validate_json(path.read_text("utf-8"))
    if last > 0:
        with pytest.raises(Killed):
            work(job, Ranks(), MarkedJournal(job.logs, is_writer=True, marked=last))
    return work(job, Ranks(), Journal(job.logs))


def looks(attempt: Path) -> dict[int, float]:
    lines = map(json.loads, (attempt / "logs" / "metrics.jsonl").read_text("utf-8").splitlines())
    return {line["step"]: line["held_loss"] for line in lines if "held_loss" in line}


def test_training_ends_when_held_out_loss_gains_no_more_and_the_best_is_kept(
    tmp_path: Path, tokens: Path
) -> None:
    figures = run(tokens, tmp_path / "one", SETTINGS)
    seen = looks(tmp_path / "one")
    # What patience does, by hand: three looks in a row that are no more than 0.01 below the best.
    best, in_vain = seen[0], 0
    for step, loss in list(seen.items())[1:]:
        best, in_vain = (loss, 0) if loss < best - 0.01 else (best, in_vain + 1)
        assert (in_vain == 3) == (step == max(seen))
    assert figures["steps"] == max(seen) < 60
    kept = min(seen, key=seen.__getitem__)
    assert figures["kept_step"] == kept < max(seen)
    assert figures["held_loss"] == pytest.approx(seen[kept], rel=1e-12)
    # The same as a training of so many steps.
    short = SETTINGS.model_copy(update={"tokens": kept * 256, "stop_patience": 0})
    run(tokens, tmp_path / "short", short)
    for name in ("model.safetensors", "read.json"):
        one, two = (tmp_path / attempt / "files" / name for attempt in ("one", "short"))
        assert one.read_bytes() == two.read_bytes(), name


def test_the_best_look_is_kept_of_a_training_that_goes_on_to_its_end(
    tmp_path: Path, tokens: Path
) -> None:
    settings = SETTINGS.model_copy(update={"tokens": 40 * 256, "stop_patience": 0})
    best = settings.model_copy(update={"keep_best": True, "checkpoint_every_steps": 7})
    figures = run(tokens, tmp_path / "best", best, last=25)
    seen = looks(tmp_path / "best")
    assert figures["steps"] == max(seen) == 40
    kept = min(seen, key=seen.__getitem__)
    assert figures["kept_step"] == kept < 40
    run(tokens, tmp_path / "short", settings.model_copy(update={"tokens": kept * 256}))
    for name in ("model.safetensors", "read.json"):
        one, two = (tmp_path / attempt / "files" / name for attempt in ("best", "short"))
        assert one.read_bytes() == two.read_bytes(), name


@pytest.mark.parametrize("last", [6, 17])
def test_a_kill_changes_nothing_of_it(tmp_path: Path, tokens: Path, last: int) -> None:
    settings = SETTINGS.model_copy(update={"checkpoint_every_steps": 5})
    unbroken = run(tokens, tmp_path / "unbroken", settings)
    broken = run(tokens, tmp_path / "broken", settings, last=last)
    assert looks(tmp_path / "broken") == looks(tmp_path / "unbroken")
    assert broken["kept_step"] == unbroken["kept_step"]
    one, two = (tmp_path / a / "files" / "model.safetensors" for a in ("unbroken", "broken"))
    assert one.read_bytes() == two.read_bytes()


def test_prompts_are_continued_at_every_look_and_told_once(tmp_path: Path, tokens: Path) -> None:
    prompts = ("The fox", "冬天", "")
    settings = SETTINGS.model_copy(
        update={"tokens": 8 * 256, "stop_patience": 0, "prompts": prompts, "prompt_tokens": 5,
                "checkpoint_every_steps": 3}
    )  # fmt: skip
    run(tokens, tmp_path, settings, last=7)
    told = [
        json.loads(line) for line in (tmp_path / "logs" / SAMPLES).read_text("utf-8").splitlines()
    ]
    assert [(line["step"], line["prompt"]) for line in told] == [
        (step, prompt) for step in (0, 4, 8) for prompt in prompts
    ]
    model, tokenizer = load_model(tmp_path / "files"), TokenFiles(tokens).tokenizer
    ids = [tokenizer.eos, *tokenizer.encode("冬天")]
    answer = generate(
        model, [ids], max_new_tokens=5, temperature=0, seed=0, eos=tokenizer.eos, pad=tokenizer.pad
    )
    assert told[7]["text"] == tokenizer.decode(answer.answer(0))


def test_weights_of_looks_are_kept_in_the_policy(tmp_path: Path, tokens: Path) -> None:
    settings = SETTINGS.model_copy(update={"tokens": 8 * 256, "stop_patience": 0, "kept_looks": 2})
    run(tokens, tmp_path / "kept", settings)
    kept = kept_looks(tmp_path / "kept" / "files")
    assert list(kept) == [0, 8]  # every second of 0, 4, 8
    run(tokens, tmp_path / "short", settings.model_copy(update={"kept_looks": 0}))
    last = tmp_path / "short" / "files" / "model.safetensors"
    assert kept[8].read_bytes() == last.read_bytes()
    assert kept[0].read_bytes() != last.read_bytes()


def test_a_score_that_is_no_number_is_no_best(tmp_path: Path) -> None:
    best = Best(tmp_path / "best.safetensors", Ranks())
    for step, score in enumerate((float("nan"), -3.0, float("nan"), -2.0, -2.5, float("nan"))):
        best.offer(Transformer(SETTINGS.shape, 40, seed=step), step, score)
    assert best.restore(kept := Transformer(SETTINGS.shape, 40)) == 3
    wanted = Transformer(SETTINGS.shape, 40, seed=3)
    assert torch.equal(kept.embedding.weight, wanted.embedding.weight)


def test_what_the_model_writes_may_hold_any_line_break(tmp_path: Path) -> None:
    journal, text = Journal(tmp_path), "one\u2028two\x85three\nfour"
    for step in (1, 2, 2):
        journal.samples(step, {"say": text})
    lines = (tmp_path / SAMPLES).read_text("utf-8").split("\n")[:-1]
    told = [json.loads(line) for line in lines]
    assert [(sample["step"], sample["text"]) for sample in told] == [(1, text), (2, text)]
