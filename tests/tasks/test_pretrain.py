"""The stages pretrain and export over a real store, with real jobs."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.export import ExportConfig
from conf.launch import LaunchConfig
from conf.pretrain import PretrainConfig
from conf.settings import Settings
from conf.shape import ShapeConfig
from storage.artifact import Artifact
from storage.checkpoint import Policy
from storage.identity import fingerprint
from storage.record import Record
from storage.store import Store
from storage.tokens import Tokens
from tasks.pretrain import pretrain
from tasks.stage import Job, Outcome, execute, stages
from tests.model.small_tokens import documents, write_small_tokens

LAUNCH = LaunchConfig(threads=1)
SETTINGS = PretrainConfig(
    shape=ShapeConfig(dim=16, layers=1, heads=2, kv_heads=1, context=32),
    tokens=20 * 128,
    batch_tokens=128,
    learning_rate=5e-3,
    prompts=("冬天\u2028雪",),  # with a sign that ends a line, but no row
    launch=LAUNCH,
)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("BESSEMER_HOME", str(tmp_path))
    return Store(tmp_path / "store")


def commit_tokens(store: Store, texts: Any = None) -> Tokens:
    identity: dict[str, Any] = {"stage": "tokenize"}
    address = fingerprint(identity)
    claim = store.claim(address)
    assert claim is not None
    with claim:
        write_small_tokens(claim.path / "files", texts)
        record = Record(
            fingerprint=address, kind="tokens", stage="tokenize", digest="", identity=identity
        )
        return Tokens(store.commit(claim, record))


def build(
    store: Store, name: str, settings: Settings, *, is_forced: bool = False, **inputs: Artifact
) -> Outcome:
    return execute(
        stages()[name],
        node=name,
        settings=settings,
        inputs=inputs,
        sources={},
        store=store,
        workers=1,
        is_forced=is_forced,
    )


@pytest.mark.slow
def test_tokens_become_a_policy_once_and_the_policy_an_export(store: Store) -> None:
    tokens = commit_tokens(store)
    first = build(store, "pretrain", SETTINGS, tokens=tokens)
    assert first.status == "built"
    assert first.record.metrics["steps"] == 20
    assert first.record.metrics["loss"] < 5.9
    policy = first.artifact
    assert isinstance(policy, Policy)
    assert policy.card.role == "policy"
    assert policy.card.tokenizer_digest == tokens.reader.meta.tokenizer_digest
    assert not (policy.path / "state").exists()
    tables = json.loads((policy.path / "logs" / "tables.json").read_text("utf-8"))
    assert [(row["step"], row["prompt"]) for row in tables["samples"]] == [
        (0, SETTINGS.prompts[0]),
        (20, SETTINGS.prompts[0]),
    ]

    # Where it runs is no identity, so the same artifact serves another launch.
    elsewhere = SETTINGS.model_copy(update={"launch": LaunchConfig(threads=1, micro_batch=2)})
    assert build(store, "pretrain", elsewhere, tokens=tokens).status == "hit"

    again = build(store, "pretrain", SETTINGS, is_forced=True, tokens=tokens)
    assert (again.status, again.record.digest) == ("built", first.record.digest)

    exported = build(store, "export", ExportConfig(launch=LAUNCH), policy=policy)
    assert exported.record.metrics["logit_difference"] <= 1e-6
    config = json.loads((exported.artifact.files / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def job_at(path: Path) -> Job:
    return Job(
        node="pretrain", stage="pretrain", path=path / "attempt", store=Store(path / "store")
    )


def test_data_shorter_than_one_row_starts_no_job(tmp_path: Path) -> None:
    empty = {"zh": {"train": [], "held": []}}
    write_small_tokens(tmp_path / "tokens" / "files", empty)
    job = job_at(tmp_path)
    with pytest.raises(ValueError, match="no domain has the 32 training tokens"):
        pretrain(job, tokens=Tokens(tmp_path / "tokens"), settings=SETTINGS)
    assert not job.state.exists()


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    files = write_small_tokens(tmp_path / "tokens" / "files")
    with (files / "zh.train.bin").open("r+b") as stream:
        stream.truncate(10)
    with pytest.raises(ValueError, match=r"zh\.train\.bin has 10 bytes"):
        pretrain(job_at(tmp_path), tokens=Tokens(tmp_path / "tokens"), settings=SETTINGS)


def test_a_policy_of_another_tokenizer_or_shape_is_refused(tmp_path: Path) -> None:
    from storage.checkpoint import ModelCard

    write_small_tokens(tmp_path / "tokens" / "files", documents(4))
    tokens = Tokens(tmp_path / "tokens")
    for name, digest, shape, words in (
        ("foreign", "0" * 64, SETTINGS.shape, "speaks tokenizer 000000000000"),
        (
            "wide",
            tokens.reader.meta.tokenizer_digest,
            ShapeConfig(),
            "give the settings the policy's",
        ),
    ):
        card = ModelCard(
            shape=shape, vocabulary=300, role="policy", tokenizer_digest=digest, parameters=1
        )
        card.write(tmp_path / name / "files")
        with pytest.raises(ValueError, match=words):
            pretrain(
                job_at(tmp_path),
                tokens=tokens,
                settings=SETTINGS.model_copy(update={"tokens": 128}),
                policy=Policy(tmp_path / name),
            )
