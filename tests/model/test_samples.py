"""Rows of pretraining: named by where they come from, and left out when asked."""

from pathlib import Path

import numpy as np
import pytest

from conf.pretrain import PretrainConfig
from conf.shape import ShapeConfig
from model.pretrain import Samples
from model.ranks import Ranks
from storage.tokens import TokenFiles
from tests.model.small_tokens import write_small_tokens

SHAPE = ShapeConfig(dim=16, layers=1, heads=2, kv_heads=1, context=32)


def samples_of(tokens: Path, **settings: object) -> Samples:
    files = TokenFiles(tokens)
    chosen = PretrainConfig.model_validate(
        {"shape": SHAPE.model_dump(), "batch_tokens": 256, "tokens": 40 * 256, **settings}
    )
    plan = chosen.plan({name: files.count(name, "train").tokens for name in files.domains})
    return Samples(files, chosen, plan, Ranks(), 0)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_tokens(tmp_path_factory.mktemp("tokens"))


def test_a_sample_is_told_with_its_documents(tokens: Path) -> None:
    samples = samples_of(tokens)
    ends = TokenFiles(tokens).ends("zh", "train").astype(int).tolist()
    # Window 1 predicts tokens 32 to 63; document d is what lies before ends[d].
    assert ends[0] > 64 < ends[1], "the first document holds all of it"
    assert samples.described("zh/1") == "zh/1 (document 0)"
    # The window in which the first document ends also has the beginning of the next.
    assert ends[0] % 32
    assert samples.described(f"zh/{ends[0] // 32}") == f"zh/{ends[0] // 32} (documents 0 to 1)"
    last = (ends[-1] - 1) // 32
    assert samples.described(f"zh/{last}").endswith(f"{len(ends) - 1})")


def test_an_excluded_sample_trains_nothing_and_moves_no_other(tokens: Path) -> None:
    usual, without = samples_of(tokens), samples_of(tokens, exclude=["en/3", "zh/5"])
    found = 0
    for step in range(40):
        [whole], [rest] = usual.at(step), without.at(step)
        assert list(whole.samples) == list(rest.samples)
        is_out = np.isin(list(whole.samples), ["en/3", "zh/5"])
        found += is_out.sum()
        assert (rest["labels"].numpy()[is_out] == -1).all()
        assert np.array_equal(whole["labels"].numpy()[~is_out], rest["labels"].numpy()[~is_out])
        assert rest.weights["tokens"] == (rest["labels"] >= 0).sum()
    assert found


def test_a_domain_that_is_not_there_is_named(tokens: Path) -> None:
    with pytest.raises(ValueError, match="there is no domain 'web'; the data has en, zh"):
        samples_of(tokens, exclude=["web/3"])
