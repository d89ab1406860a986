"""The counting baselines are proper distributions and agree with sums worked by hand."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conf.pretrain import PhaseConfig, PretrainConfig
from conf.shape import ShapeConfig
from model.pretrain import Samples
from model.ranks import Ranks
from storage.tokens import TokenFiles
from tasks.ngram import KneserNey, tokens_read, xz_bits_per_byte
from tests.model.small_tokens import write_small_tokens


def test_bigram_by_hand() -> None:
    # tokens 0 1 0 1 0 2: bigrams 01 x2, 10 x2, 02 x1; discount n1/(n1+2 n2) = 1/(1+4) = 0.2
    # unigrams count distinct predecessors: 0 has {1}, 1 has {0}, 2 has {0}: each 1 of 3;
    # n1 = 3, n2 = 0: discount 0.5; P1(w) = 0.5/3 + 0.5*3/3 * 1/4 = 0.166667 + 0.125 = 0.291667
    # after 0: total 3, kinds 2: P(1|0) = (1.8 + 0.2*2*0.291667) / 3 = 0.638889
    model = KneserNey(np.array([0, 1, 0, 1, 0, 2]), order=2, vocabulary=4)
    nats = model.nats(np.array([0, 1]))
    assert nats[0] == pytest.approx(-np.log((1.8 + 0.4 * 0.2916666667) / 3))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_of_all_next_tokens_sum_to_one(order: int) -> None:
    tokens = np.random.default_rng(1).integers(0, 7, 400)
    model = KneserNey(tokens, order=order, vocabulary=7)
    context = tokens[50:54]
    total = sum(np.exp(-model.nats(np.append(context, w))[-1]) for w in range(7))
    assert total == pytest.approx(1.0)


def test_higher_order_learns_what_a_bigram_cannot() -> None:
    tokens = np.array([0, 1, 2, 0, 3, 1, 4] * 60)
    bits = [KneserNey(tokens, order=n, vocabulary=5).nats(tokens).mean() for n in (1, 2, 3)]
    assert bits[0] > bits[1] > bits[2]


def test_a_document_of_one_token_is_scored_after_the_separator() -> None:
    model = KneserNey(np.array([1, 2, 1, 2, 1]), order=3, vocabulary=3)
    assert model.nats(np.array([1, 2])).shape == (1,)


def test_xz_of_repetition_is_small() -> None:
    assert xz_bits_per_byte([b"abcd" * 10_000]) < 0.1


def test_baseline_counts_exactly_the_tokens_that_were_labels(tmp_path: Path) -> None:
    files = TokenFiles(write_small_tokens(tmp_path))
    settings = PretrainConfig(
        shape=ShapeConfig(dim=32, layers=1, heads=2, context=32),
        tokens=6 * 256,
        batch_tokens=256,
        phases=(PhaseConfig(tokens=1.0, mix={"en": 0.9, "zh": 0.1}),),
        exclude=("en/3",),
    )
    plan = settings.plan({name: files.count(name, "train").tokens for name in files.domains})
    samples = Samples(files, settings, plan, Ranks(), 0)
    labels = {"en": Counter[int](), "zh": Counter[int]()}
    seen = set[str]()
    for step in range(plan.steps):
        for batch in samples.at(step):
            for name, row in zip(batch.samples, batch["labels"].tolist(), strict=True):
                if name not in seen:
                    labels[name.split("/")[0]].update(label for label in row if label >= 0)
                seen.add(name)
    read = samples.read_windows(plan.steps)
    assert Counter(tokens_read(files, read).tolist()) == labels["en"] + labels["zh"]
    assert 0 < labels["zh"].total() < files.count("zh", "train").tokens
    everything = sum(files.count(name, "train").tokens for name in files.domains)
    assert len(tokens_read(files, None)) == everything
