"""Curricula against what can be worked out by hand: competence, orders, lengths, labels."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.contract import JobFile
from conf.curriculum import CurriculumConfig
from conf.launch import LaunchConfig
from conf.pretrain import PretrainConfig
from conf.shape import ShapeConfig
from model.batches import Windows, uniform_draws
from model.curriculum import (
    Curriculum,
    competence,
    easiest_first,
    frequency_ranks,
    window_difficulties,
)
from model.journal import Journal
from model.loop import Stopped
from model.pretrain import Samples, work
from model.ranks import Ranks
from storage.checkpoint import ReadWindows
from storage.tokens import TokenFiles, difficulty_path
from tests.model.small_jobs import write_job
from tests.model.small_tokens import write_small_tokens

SHAPE = ShapeConfig(dim=16, layers=1, heads=2, kv_heads=1, context=32, dropout=0.1)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents whose difficulty is their length in tokens."""
    folder = write_small_tokens(tmp_path_factory.mktemp("tokens"))
    files = TokenFiles(folder)
    for domain in files.domains:
        lengths = np.diff(files.ends(domain, "train").astype(np.int64), prepend=0)
        np.save(difficulty_path(folder, domain, "length"), lengths.astype(np.float32))
    return folder


def settings_of(**curriculum: object) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "shape": SHAPE,
            "batch_tokens": 256,
            "tokens": 40 * 256,
            "curriculum": curriculum,
            "launch": {"peak_tflops": 1},
        }
    )


def samples_of(tokens: Path, ranks: Ranks | None = None, **curriculum: Any) -> Samples:
    files, settings = TokenFiles(tokens), settings_of(**curriculum)
    plan = settings.plan({name: files.count(name, "train").tokens for name in files.domains})
    return Samples(files, settings, plan, ranks or Ranks(), 0)


def test_competence_follows_the_two_courses() -> None:
    # c0 = 0.2; linear: 0.2 + 0.8 t / T; square root: sqrt(0.04 + 0.96 t / T).
    progress = np.array([0.0, 0.25, 0.5, 1.0, 3.0])
    assert competence(progress, "linear", 0.2) == pytest.approx([0.2, 0.4, 0.6, 1.0, 1.0])
    root = [0.2, math.sqrt(0.28), math.sqrt(0.52), 1.0, 1.0]
    assert competence(progress, "sqrt", 0.2) == pytest.approx(root)


def test_a_window_has_the_mean_of_its_tokens(tokens: Path) -> None:
    files = TokenFiles(tokens)
    windows = Windows(files.tokens("zh", "train"), 32, files.meta.eos)
    found = window_difficulties(files, "zh", "length", windows)
    lengths = np.diff(files.ends("zh", "train").astype(np.int64), prepend=0)
    by_token = np.repeat(lengths, lengths).astype(np.float64)
    truth = [by_token[start : start + 32].mean() for start in range(0, len(by_token), 32)]
    assert found == pytest.approx(truth, rel=1e-12)
    assert easiest_first(np.array([3.0, 1.0, 2.0, 1.0])).tolist() == [1, 3, 2, 0]


def test_samples_are_drawn_evenly_from_the_easiest_share_and_later_as_usual(tokens: Path) -> None:
    usual = samples_of(tokens)
    chosen = samples_of(
        tokens, competence="linear", difficulty="length", first_share=0.1, until=0.5
    )
    files = TokenFiles(tokens)
    windows = Windows(files.tokens("en", "train"), 32, files.meta.eos)
    order = easiest_first(window_difficulties(files, "en", "length", windows)).tolist()
    for step in range(40):
        [before], [batch] = usual.at(step), chosen.at(step)
        # The mixture stays: only windows are exchanged within their domain.
        assert [s[:3] for s in before.samples] == [s[:3] for s in batch.samples]
        if step >= 20:
            assert list(batch.samples) == list(before.samples)
            continue
        places = [order.index(int(s[3:])) for s in batch.samples if s.startswith("en")]
        # c = 0.1 + 0.9 t / 20
        assert all(place < math.ceil((0.1 + 0.045 * step) * len(order)) for place in places)


def test_draws_are_even() -> None:
    draws = uniform_draws(3, np.arange(100_000))
    counts = np.histogram(draws, bins=10, range=(0, 1))[0]
    # Ten bins of 10,000 each: chi-square of 9 degrees of freedom, below its 99.9 % point.
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 27.9
    assert not np.array_equal(draws, uniform_draws(4, np.arange(100_000)))


def test_two_ranks_and_a_later_start_see_the_same_samples(tokens: Path) -> None:
    choice = CurriculumConfig(
        competence="sqrt", difficulty="length", first_row_tokens=8
    ).model_dump()
    alone = samples_of(tokens, **choice)
    pair = [samples_of(tokens, Ranks(rank, 2), **choice) for rank in (0, 1)]
    for step in (0, 7, 30):
        [whole] = alone.at(step)
        both = [list(samples.at(step)[0].samples) for samples in pair]
        assert list(whole.samples) == [both[row % 2][row // 2] for row in range(8)]


def test_rows_double_until_they_are_whole_and_lose_no_token(tokens: Path) -> None:
    usual = samples_of(tokens)
    short = samples_of(tokens, first_row_tokens=8, length_until=0.5)
    # Two doublings over 20 steps: 8 tokens, 16 from step 10, 32 from step 20.
    for step, width in ((0, 8), (9, 8), (10, 16), (19, 16), (20, 32), (39, 32)):
        [whole], [rows] = usual.at(step), short.at(step)
        assert rows["ids"].shape == (256 // width, width)
        assert torch.equal(rows["ids"].flatten(), whole["ids"].flatten())
        assert torch.equal(rows["labels"].flatten(), whole["labels"].flatten())
        assert len(set(rows["rows"].tolist())) == 256 // width
    assert short.curriculum.breaks(32) == {10, 20}


def test_rare_tokens_are_no_labels_at_first(tokens: Path) -> None:
    files = TokenFiles(tokens)
    streams = {name: Windows(files.tokens(name, "train"), 32, 1) for name in files.domains}
    stream = np.concatenate([own.tokens for own in streams.values()])
    counts = np.bincount(stream, minlength=files.meta.vocabulary)
    ranks = frequency_ranks(files, streams)
    assert ranks[int(np.argmax(counts))] == 0
    assert (np.diff(counts[np.argsort(ranks)]) <= 0).all()
    usual = samples_of(tokens)
    masked = samples_of(tokens, first_vocabulary=0.1, vocabulary_until=0.5)
    for step in (0, 10, 20):
        [whole], [batch] = usual.at(step), masked.at(step)
        labels = whole["labels"].numpy()
        # 0.1, then 0.1 + 0.9 x 10 / 20 of all ids, then all.
        known = math.ceil({0: 0.1, 10: 0.55, 20: 1.0}[step] * files.meta.vocabulary)
        is_known = (labels >= 0) & (ranks[labels] < known)
        assert np.array_equal(batch["labels"].numpy(), np.where(is_known, labels, -1))
        assert batch.weights["tokens"] == is_known.sum()
        assert torch.equal(batch["ids"], whole["ids"])


def test_domains_come_in_the_order_asked_for(tokens: Path) -> None:
    samples = samples_of(tokens, domain_order=["zh", "en"])
    files = TokenFiles(tokens)
    counts = {name: files.count(name, "train").tokens for name in files.domains}
    border = round(40 * counts["zh"] / sum(counts.values()))
    for step in range(40):
        [batch] = samples.at(step)
        assert {s[:2] for s in batch.samples} == {"zh" if step < border else "en"}


def train(tokens: Path, folder: Path, settings: PretrainConfig, *, stop_at: int = -1) -> Path:
    """Weights after a training that is stopped once, if asked to, and goes on."""
    job = write_job(folder, "pretrain", settings, {"tokens": tokens}, LaunchConfig(threads=1))
    told = JobFile.model_validate_json(job.read_text("utf-8"))
    ranks = Ranks()

    class Stopping(Journal):
        def write(self, step: int, figures: object) -> None:
            super().write(step, figures)  # type: ignore[arg-type]
            ranks.is_stopping = step == stop_at

    with contextlib.suppress(Stopped):
        work(told, ranks, Stopping(told.logs))
    work(told, Ranks(), Journal(told.logs))
    return folder / "files"


def test_the_models_own_loss_becomes_the_order_and_a_resume_gives_the_same_bits(
    tmp_path: Path, tokens: Path
) -> None:
    curriculum = {"competence": "linear", "difficulty": "length", "until": 0.9, "first_share": 0.05}
    switching = settings_of(**curriculum, perplexity_at=0.5).model_copy(
        update={"tokens": 12 * 256, "evaluate_every_steps": 0, "learning_rate": 1e-2}
    )
    unbroken = train(tokens, tmp_path / "unbroken", switching)
    # At the switch, behind it, and behind the last step.
    for stop_at in (6, 8, 12):
        broken = train(tokens, tmp_path / f"broken{stop_at}", switching, stop_at=stop_at)
        for name in ("model.safetensors", "read.json"):
            assert (broken / name).read_bytes() == (unbroken / name).read_bytes(), (name, stop_at)
    never = settings_of(**curriculum).model_copy(update={"tokens": 12 * 256})
    other = train(tokens, tmp_path / "other", never)
    assert ReadWindows.read(other) != ReadWindows.read(unbroken)
    lines = (tmp_path / "broken8" / "logs" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))


def test_a_column_that_is_no_number_is_refused(tmp_path: Path, tokens: Path) -> None:
    files = TokenFiles(tokens)
    path = difficulty_path(tokens, "en", "broken")
    values = np.ones(files.count("en", "train").documents, np.float32)
    values[5] = np.nan
    np.save(path, values)
    with pytest.raises(
        ValueError, match="'broken' of domain 'en' is no finite number for document 5"
    ):
        samples_of(tokens, competence="sqrt", difficulty="broken")
    with pytest.raises(ValueError, match="no difficulty column 'depth'"):
        samples_of(tokens, competence="sqrt", difficulty="depth")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"competence": "sqrt"}, "needs to know what is difficult; name a column of tokenize"),
        ({"difficulty": "length"}, "competence, which is off; set curriculum.competence=sqrt"),
        ({"perplexity_at": 0.1}, "curriculum.perplexity_at orders windows by competence"),
        ({"competence": "sqrt", "perplexity_at": 0.5}, "is not before curriculum.until=0.3"),
        (
            {"first_row_tokens": 12},
            "does not double to the row of 32 tokens; use one of 16, 8, 4, 2",
        ),
        ({"domain_order": ["zh", "zh"]}, "names a domain twice"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings_of(**fields)


def test_a_domain_order_of_unknown_domains_or_beside_phases_is_refused(tokens: Path) -> None:
    with pytest.raises(ValueError, match="names domain 'web', of which there are no"):
        samples_of(tokens, domain_order=["zh", "web"])
    with pytest.raises(ValueError, match="domain_order and phases both say"):
        PretrainConfig.model_validate(
            {"shape": SHAPE, "batch_tokens": 256, "phases": [{"tokens": 1.0}],
             "curriculum": {"domain_order": ["zh"]}}
        )  # fmt: skip


def test_by_default_there_is_none() -> None:
    empty = Curriculum(
        CurriculumConfig(), TokenFiles.__new__(TokenFiles), {}, steps=9, rows=2, seed=0
    )
    numbers = np.arange(4)
    assert empty.choose(numbers, numbers, numbers) is numbers
    assert empty.without_rare(0, numbers) is numbers
    assert empty.row_tokens(0, 32) == 32
    assert empty.breaks(32) == frozenset()
