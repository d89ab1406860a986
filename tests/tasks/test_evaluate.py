"""The evaluate stage from files to figures, with its worker as a process of its own."""

import json
from pathlib import Path

import pytest

from conf.evaluate import EvaluateConfig
from conf.launch import LaunchConfig
from conf.settings import SourceSpec
from conf.shape import ShapeConfig
from model.transformer import Transformer
from model.weights import save_model, save_tensors
from storage.checkpoint import Policy, look_path
from storage.conversations import Conversations
from storage.scores import Scores
from storage.source import HashCache, resolve
from storage.store import Store
from storage.tokens import Tokens
from tasks.evaluate import evaluate
from tasks.stage import Job
from tests.model.small_tokens import documents, write_small_tokens

OWN = [
    {"prompt": "狐狸喜欢\u2028吃什么？", "options": ["米饭", "一双鞋", "天"], "answer": 0},
    {"prompt": "The fox likes what?", "references": ["rice", "it likes rice"]},
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Policy, Tokens]:
    root = tmp_path_factory.mktemp("inputs")
    tokens = Tokens(root / "tokens")
    write_small_tokens(tokens.files, documents(12))
    shape = ShapeConfig(dim=16, layers=1, heads=2, kv_heads=1, context=64)
    model = Transformer(shape, tokens.reader.meta.vocabulary, seed=3)
    policy = Policy(root / "policy")
    save_model(policy.files, model, role="policy", tokenizer=tokens.files / "tokenizer")
    look = look_path(policy.files, 7)
    look.parent.mkdir()
    save_tensors(look, model.state_dict())
    return policy, tokens


def job_at(root: Path, settings: EvaluateConfig) -> Job:
    sources = {
        name: resolve(specs, artifacts={}, base=root, ledger=None, hashes=HashCache())
        for name, specs in settings.source_fields()
    }
    path = root / "attempt"
    for folder in ("files", "logs", "state"):
        (path / folder).mkdir(parents=True)
    return Job(
        node="evaluate", stage="evaluate", path=path, store=Store(root / "store"), sources=sources
    )


def held_conversations(path: Path) -> Conversations:
    questions = ["0?", "1?", "2?", "0?", "4?"]
    rows = [
        {"id": f"c{n}", "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "!"}]}
        for n, q in enumerate(questions)
    ]  # fmt: skip
    chats = Conversations(path)
    chats.files.mkdir(parents=True)
    (chats.files / "held.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), "utf-8"
    )
    return chats


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_own_tasks_curve_and_watch(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inputs: tuple[Policy, Tokens],
    processes: int,
) -> None:
    monkeypatch.setenv("BESSEMER_HOME", str(tmp_path))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in OWN)
    (tmp_path / "mine.jsonl").write_text(lines, "utf-8")
    settings = EvaluateConfig(
        own_tasks=(SourceSpec(path="mine.jsonl"),),
        train_documents=3,
        has_curve=True,
        max_new_tokens=4,
        prompts=("冬天\u2028\x85雪",),
        held_questions=2,
        launch=LaunchConfig(
            threads=1, processes=processes, engine="plain" if processes == 1 else "ddp"
        ),
    )
    job = job_at(tmp_path, settings)
    policy, tokens = inputs
    chats = held_conversations(tmp_path / "chats")
    scores = evaluate(
        job, policy=policy, tokens=tokens, settings=settings, conversations=chats, reference=policy
    )
    assert isinstance(scores, Scores)
    figures = scores.figures()
    assert figures["own_mine/accuracy"].n == 1
    assert figures["own_mine/accuracy"].chance == pytest.approx(1 / 3)
    assert figures["own_mine/rouge_l"].n == 1
    assert figures["writing/ended"].n == 2  # the prompt and the free task
    assert figures["train/bits_per_byte/en"].n == 3
    assert figures["bits_per_byte/en"].n == 3
    # An untrained model knows training documents no better.
    assert abs(figures["overfit/all"].value) < 0.1 * figures["bits_per_byte/all"].value
    assert "overfitted" not in job.metrics
    # Of five conversations with four different questions two are asked, the first and the third.
    asked = ["held/c3", "held/c2"]
    assert [row["id"] for row in scores.answers()] == ["prompt/0", "task/mine/2", *asked]
    assert (
        scores.answers()[0]["prompt"] == settings.prompts[0]
    )  # signs that end a line as it stands
    assert figures["held/answer_tokens"].n == 2
    assert figures["held/kl"].value == pytest.approx(0.0, abs=1e-5)  # it is its own reference
    assert len(scores.trials()) == 1 * 2 + figures["bits_per_byte/all"].n
    # The look has the policy's own weights.
    (look,) = scores.curve()
    assert look["step"] == 7
    for name in ("bits_per_byte/all", "own_mine/accuracy"):
        assert look[name] == figures[name].model_dump()


def test_a_curve_needs_kept_weights(tmp_path: Path) -> None:
    other = Policy(tmp_path / "policy")
    settings = EvaluateConfig(has_curve=True)
    (tmp_path / "attempt" / "state").mkdir(parents=True)
    job = Job(
        node="e", stage="evaluate", path=tmp_path / "attempt", store=Store(tmp_path / "store")
    )
    with pytest.raises(ValueError, match=r"set pretrain\.kept_looks"):
        evaluate(job, policy=other, settings=settings)
