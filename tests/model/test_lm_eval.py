"""Our scorer against lm-eval's HFLM, in the environment that `make bench` makes for it (63 packages)."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.exams import PACKAGES, ceval, scored_by_both, write_course
from benchmarks.work import corpus_of, environment, run_peer, run_stage
from conf.launch import LaunchConfig
from conf.pretrain import PretrainConfig
from conf.shape import ShapeConfig
from conf.tokenize import TokenizeConfig
from conf.tokenizer import TokenizerConfig
from model.transformer import Transformer
from model.weights import save_model
from storage.tokenizer import Tokenizer
from storage.tokens import Tokens
from tasks.exams import Request, exam_requests, read_questions
from tasks.pretrain import pretrain
from tasks.tokenize import tokenize
from tasks.tokenizer import tokenizer

SHAPE = ShapeConfig(dim=128, layers=4, heads=4, kv_heads=2, context=512)
VOCABULARY = 4096
MEGABYTES, TRAINED_TOKENS = 4.0, 300_000

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def python() -> Path:
    try:
        return environment("exams", PACKAGES)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the environment of lm-eval could not be made: {error}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the store is."""
    return tmp_path_factory.mktemp("exams")


@pytest.fixture(scope="module")
def tokens(folder: Path, shared_data: Path) -> Tokens:
    """Some megabytes of the real texts."""
    corpus, _ = corpus_of(folder, shared_data, MEGABYTES)
    words = run_stage(tokenizer, TokenizerConfig(vocabulary=VOCABULARY), {"corpus": corpus}, folder)
    assert isinstance(words, Tokenizer)
    made = run_stage(tokenize, TokenizeConfig(), {"corpus": corpus, "tokenizer": words}, folder)
    assert isinstance(made, Tokens)
    return made


@pytest.fixture(scope="module", params=["random", "trained"])
def policy(request: pytest.FixtureRequest, folder: Path, tokens: Tokens) -> Path:
    if request.param == "random":
        model = Transformer(SHAPE, tokens.reader.meta.vocabulary, seed=0)
        save_model(folder / "random", model, role="policy", tokenizer=tokens.files / "tokenizer")
        return folder / "random"
    settings = PretrainConfig(
        shape=SHAPE,
        tokens=TRAINED_TOKENS,
        batch_tokens=SHAPE.context * 4,
        learning_rate=4e-3,
        launch=LaunchConfig(threads=1),
    )
    made = run_stage(pretrain, settings, {"tokens": tokens}, folder)
    assert made.record.metrics["loss"] < 7.5  # log of the vocabulary, where it starts, is 8.3
    return made.files


def best(rows: list[list[float]]) -> list[int]:
    return [max(range(len(row)), key=row.__getitem__) for row in rows]


def test_exams_score_as_hflm_scores_them(
    tmp_path: Path, python: Path, policy: Path, shared_data: Path
) -> None:
    cmmlu = sorted((shared_data / "eval" / "cmmlu" / "test").glob("*.csv"))
    dev = [q for path in cmmlu for q in read_questions(path.parents[1] / "dev" / path.name)]
    asked = [q for path in cmmlu for q in read_questions(path)[:30]][:2000]
    own = [
        q for p in sorted((shared_data / "eval/ceval/dev").glob("*.csv")) for q in read_questions(p)
    ]
    letters = [
        *ceval(shared_data, ["letter"], questions=0),
        *exam_requests(own, [], preset="ceval", shots=0, scoring=["letter"]),
        *exam_requests(asked, dev, preset="cmmlu", shots=1, scoring=["letter"]),
    ]
    assert len(letters) == 1346 + 260 + 2000
    compare(tmp_path / "letter", policy, letters, abs=1e-5)
    # Whole options are sums of some -200 nats: there float32 itself has 1e-5.
    compare(tmp_path / "option", policy, ceval(shared_data, ["option"], questions=2), rel=1e-6)


def compare(folder: Path, policy: Path, requests: Sequence[Request], **within: float) -> None:
    """Both score the requests alike; what was seen is told (`pytest -rP` shows it)."""
    found = scored_by_both(folder, policy, requests)
    ours, theirs = found["ours"]["logprobs"], found["hflm"]["logprobs"]
    gap = max(
        abs(a - b)
        for one, two in zip(ours, theirs, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    rates = {name: len(requests) / told["seconds"] for name, told in found.items()}
    sys.stdout.write(
        f"{folder.name}s: n {len(requests)}, largest gap {gap:.2e} nats, ours "
        f"{rates['ours']:.1f} and HFLM {rates['hflm']:.1f} questions per second of the processor\n"
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, **within)
    assert best(ours) == best(theirs)


def test_rolling_loss_and_the_adapter_agree_with_lm_eval(
    tmp_path: Path, python: Path, policy: Path
) -> None:
    line = "狐狸在树荫下睡觉。The fox sleeps in the shade. "
    # No two windows alike: HFLM takes windows of the same tokens for one, whatever it scores of each.
    long = "".join(f"{number} {line}" for number in range(200))
    texts = ["", "猫", long, "broken \ufffd \x00 \U0001f98a text", line]
    course = write_course(tmp_path, policy, texts=texts)
    found: dict[str, Any] = run_peer(python, "exams", tmp_path, ["rolling", str(course)])
    for ours, theirs in zip(found["ours"], found["theirs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    for ours, theirs in zip(found["pairs"], found["their_pairs"], strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
        assert ours[1] == theirs[1]
    assert "\n" not in found["written"][0]
