"""The evaluation worker: its parts are done once, by whichever rank, and documents cost what they cost."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conf.contract import JobFile
from conf.evaluate import EvaluateConfig
from conf.shape import ShapeConfig
from model import documents, evaluate, parts
from model.journal import Journal
from model.loop import Stopped
from model.ranks import Ranks
from model.transformer import Transformer
from model.weights import load_model, save_model, save_tensors
from storage.checkpoint import look_path
from storage.tokens import TokenFiles
from tasks.exams import Request
from tests.model.small_jobs import write_job
from tests.model.small_tokens import documents as small_documents
from tests.model.small_tokens import write_small_tokens
from tests.model.tiny import tiny_tokenizer

SHAPE = ShapeConfig(dim=16, layers=1, heads=2, kv_heads=1, context=24)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    tokens = write_small_tokens(root / "tokens", small_documents(12))
    files = TokenFiles(tokens)
    model = Transformer(SHAPE, files.meta.vocabulary, seed=3)
    save_model(root / "policy", model, role="policy", tokenizer=tokens / "tokenizer")
    return {"policy": root / "policy", "tokens": tokens}


def job_at(attempt: Path, inputs: dict[str, Path], **fields: object) -> JobFile:
    settings = EvaluateConfig.model_validate({"batch": 4, "max_new_tokens": 4, **fields})
    path = write_job(attempt, "evaluate", settings, inputs, settings.launch)
    requests = [
        Request(
            str(i), "g", (), "猫是" + "什" * (i % 3), ("红", "blue"), 0, header=f"subject {i % 2}"
        )
        for i in range(6)
    ]
    rows = "".join(json.dumps(asdict(request)) + "\n" for request in requests)
    (attempt / "state" / "requests.jsonl").write_text(rows, "utf-8")
    asked = [{"id": f"q{i}", "prompt": "猫？", "samples": 2, "is_greedy": i == 0} for i in range(3)]
    rows = "".join(json.dumps(question) + "\n" for question in asked)
    (attempt / "state" / "questions.jsonl").write_text(rows, "utf-8")
    return JobFile.model_validate_json(path.read_text("utf-8"))


def rows_of(attempt: Path) -> dict[str, list[dict[str, object]]]:
    return {
        path.name: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in sorted((attempt / "state").glob("*-*.jsonl"))
    }


def work(job: JobFile, ranks: Ranks | None = None) -> dict[str, object]:
    return evaluate.work(job, ranks or Ranks(), Journal(job.logs))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "PART_REQUESTS", 2)
    monkeypatch.setattr(evaluate, "PART_ANSWERS", 2)
    monkeypatch.setattr(documents, "PART_DOCUMENTS", 2)


@pytest.mark.usefixtures("small_parts")
def test_ranks_share_the_parts_and_give_the_same_rows(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    sizes = work(job_at(tmp_path / "one", inputs))
    assert sizes == {"scored": 6, "documents": 6, "pairs": 0, "answers": 6}
    one = rows_of(tmp_path / "one")
    # Two subjects of three questions; six documents; greedy two, sampled four: two rows a part.
    assert [name.split("-")[0] for name in one] == ["answers"] * 3 + ["documents"] * 3 + [
        "scored"
    ] * 2
    two = job_at(tmp_path / "two", inputs)
    for rank in (1, 0):
        work(two, Ranks(rank=rank, world=2))
    assert rows_of(tmp_path / "two") == one


@pytest.mark.usefixtures("small_parts")
def test_what_is_done_is_not_done_again(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_at(tmp_path, inputs)
    ranks = Ranks()
    original, done = parts._once, 0  # pyright: ignore[reportPrivateUsage]

    def once(*arguments: object) -> None:
        nonlocal done
        original(*arguments)  # type: ignore[arg-type]
        done += 1
        ranks.is_stopping = done == 4

    monkeypatch.setattr(parts, "_once", once)
    with pytest.raises(Stopped, match="the parts before it are kept"):
        work(job, ranks)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "state").glob("*-*.jsonl")}
    assert len(kept) == 4
    work(job)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    work(job_at(tmp_path / "whole", inputs))
    assert rows_of(tmp_path) == rows_of(tmp_path / "whole")


def nats_of(model: Transformer, ids: list[int]) -> float:
    """Whole documents in one pass; for documents that fit the context."""
    row = torch.tensor([ids])
    with torch.inference_mode():
        logprobs = F.log_softmax(model.logits(model.hidden(row[:, :-1])), -1)
    return -float(logprobs[0].gather(1, row[0, 1:, None]).double().sum())


def nats_by_windows(model: Transformer, ids: list[list[int]], separator: int) -> list[float]:
    reader = documents.own_reader(model, separator)
    return documents.document_nats(reader, ids, stride=1.0, batch=4, report=lambda *_: None)


def test_another_tokenizer_reads_the_same_documents(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    files = TokenFiles(inputs["tokens"])
    other = tiny_tokenizer(tmp_path / "tokenizer", vocabulary=300)
    model = Transformer(SHAPE.model_copy(update={"context": 512}), other.vocabulary, seed=1)
    save_model(tmp_path / "policy", model, role="policy", tokenizer=tmp_path / "tokenizer")
    work(job_at(tmp_path, {**inputs, "policy": tmp_path / "policy"}, train_documents=2))
    rows = rows_of(tmp_path)["documents-00000.jsonl"]
    held = [row for row in rows if row["split"] == "held"]
    texts = [
        files.tokenizer.decode(ids.tolist())
        for domain in files.domains
        for ids, _ in files.held_documents(domain)
    ]
    assert [row["bytes"] for row in held] == [len(text.encode()) for text in texts]
    assert [row["characters"] for row in held] == [len(text) for text in texts]
    for row, text in zip(held, texts, strict=True):
        assert row["nats"] == pytest.approx(
            nats_of(model, [other.eos, *other.encode(text)]), rel=1e-5
        )
    train = [row for row in rows if row["split"] == "train"]
    assert [row["domain"] for row in train] == ["en", "en", "zh", "zh"]


@pytest.mark.parametrize("length", [0, 1, 24, 25, 48, 72, 73])
def test_rolling_loss_of_any_length_is_that_of_windows_by_hand(
    inputs: dict[str, Path], length: int
) -> None:
    model = load_model(inputs["policy"])
    ids = [5 + i % 250 for i in range(length)]
    with torch.inference_mode():
        found = nats_by_windows(model, [ids], 1)
    # Windows of 24 labels behind one another; the last one reads the 24 tokens before its last label.
    row, wanted = [1, *ids], 0.0
    for start in range(0, length, 24):
        end = min(start + 24, length)
        first = max(0, end - 24)
        inside = torch.tensor([row[first : end + 1]])
        with torch.inference_mode():
            logprobs = F.log_softmax(model.logits(model.hidden(inside[:, :-1])).double(), -1)
        each = logprobs[0].gather(1, inside[0, 1:, None])[:, 0]
        wanted -= float(each[start - first :].sum())
    assert found == [pytest.approx(wanted, rel=1e-6)]


def test_broken_text_is_scored_like_any_other(tmp_path: Path) -> None:
    # A text cut within a character: its tokens hold bytes that are none.
    tokenizer = tiny_tokenizer(tmp_path)
    half = tokenizer.encode("猫是紫")[:-1]
    assert "\ufffd" in tokenizer.decode(half)
    model = Transformer(SHAPE, tokenizer.vocabulary, seed=0)
    with torch.inference_mode():
        found = nats_by_windows(model, [half], tokenizer.eos)
    assert found == [pytest.approx(nats_of(model, [tokenizer.eos, *half]), rel=1e-6)]


def test_kept_looks_are_measured_on_the_same(tmp_path: Path, inputs: dict[str, Path]) -> None:
    tokens = inputs["tokens"]
    model = load_model(inputs["policy"])
    save_model(tmp_path / "policy", model, role="policy", tokenizer=tokens / "tokenizer")
    other = Transformer(SHAPE, model.vocabulary, seed=9)
    for step, weights in ((0, other), (100, model)):
        path = look_path(tmp_path / "policy", step)
        path.parent.mkdir(exist_ok=True)
        save_tensors(path, weights.state_dict())
    job = job_at(tmp_path, {**inputs, "policy": tmp_path / "policy"}, has_curve=True)
    assert work(job)["scored"] == 6
    found = rows_of(tmp_path)
    for kind in ("scored", "documents"):
        now, first = found[f"{kind}-00000.jsonl"], found[f"look_000000000-{kind}-00000.jsonl"]
        assert found[f"look_000000100-{kind}-00000.jsonl"] == now
        assert first != now
    assert math.isfinite(sum(float(str(row["nats"])) for row in found["documents-00000.jsonl"]))
