"""Our scorer against lm-eval's HFLM, in the environment that `make bench` makes for it (63 packages)."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.exams import PACKAGES, ceval, scored_by_both, write_course
from benchmarks.work import environment, run_peer
from conf.contract import JobFile
from conf.launch import LaunchConfig
from conf.pretrain import PretrainConfig
from conf.shape import ShapeConfig
from model.journal import Journal
from model.pretrain import work
from model.ranks import Ranks
from model.transformer import Transformer
from model.weights import save_model
from storage.tokens import TokenFiles
from tasks.exams import exam_requests, read_questions
from tests.model.small_jobs import write_job
from tests.model.small_tokens import write_small_tokens

SHAPE = ShapeConfig(dim=32, layers=2, heads=2, kv_heads=1, context=512)
LAUNCH = LaunchConfig(threads=1)

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def python() -> Path:
    try:
        return environment("exams", PACKAGES)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the environment of lm-eval could not be made: {error}")


@pytest.fixture(scope="module", params=["random", "trained"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    tokens = write_small_tokens(root / "tokens")
    if request.param == "random":
        model = Transformer(SHAPE, TokenFiles(tokens).meta.vocabulary, seed=0)
        save_model(root / "files", model, role="policy", tokenizer=tokens / "tokenizer")
        return root / "files"
    settings = PretrainConfig(
        shape=SHAPE, tokens=40 * 2048, batch_tokens=2048, learning_rate=1e-2, launch=LAUNCH
    )
    job = JobFile.model_validate_json(
        write_job(root, "pretrain", settings, {"tokens": tokens}, LAUNCH).read_text("utf-8")
    )
    assert work(job, Ranks(), Journal(job.logs))["loss"] < 4
    return job.files


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
    requests = [
        *ceval(shared_data, ["letter"], questions=0),
        *exam_requests(own, [], preset="ceval", shots=0, scoring=["letter"]),
        *exam_requests(asked, dev, preset="cmmlu", shots=5, scoring=["letter"]),
        *ceval(shared_data, ["option"], questions=2),
    ]
    assert len(requests) >= 1346 + 260 + 2000
    found = scored_by_both(tmp_path, policy, requests)
    ours, theirs = found["ours"]["logprobs"], found["hflm"]["logprobs"]
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(
            other, abs=1e-5, rel=1e-6
        )  # whole options are sums of -200 nats
    assert best(ours) == best(theirs)


def test_rolling_loss_and_the_adapter_agree_with_lm_eval(
    tmp_path: Path, python: Path, policy: Path
) -> None:
    line = "狐狸在树荫下睡觉。The fox sleeps in the shade. "
    texts = ["", "猫", line * 200, "broken \ufffd \x00 \U0001f98a text", line]
    course = write_course(tmp_path, policy, texts=texts)
    found: dict[str, Any] = run_peer(python, "exams", tmp_path, ["rolling", str(course)])
    for ours, theirs in zip(found["ours"], found["theirs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    for ours, theirs in zip(found["pairs"], found["their_pairs"], strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
        assert ours[1] == theirs[1]
    assert "\n" not in found["written"][0]
