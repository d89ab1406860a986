"""Figures carry right intervals and survive being written."""

import pytest

from storage.scores import Scores, centred, difference, macro_mean, mean, resampled, share


def test_wilson_interval_by_hand() -> None:
    # p = 0.5, n = 100, z = 1.96: half width = 1.96 / 1.0384 * sqrt(0.0025 + 0.000096) = 0.0962
    figure = share(50, 100)
    assert figure.low == pytest.approx(0.5 - 0.0962, abs=1e-4)
    assert figure.high == pytest.approx(0.5 + 0.0962, abs=1e-4)


def test_a_share_of_nothing_knows_nothing() -> None:
    assert (share(0, 0).low, share(0, 0).high) == (0.0, 1.0)


def test_perfect_share_keeps_doubt() -> None:
    # low = n / (n + z^2) = 10 / 13.84
    assert share(10, 10).low == pytest.approx(10 / 13.8415, abs=1e-4)


def test_samples_of_one_cluster_do_not_narrow_the_interval() -> None:
    values = [0.0, 1.0] * 2
    alone = mean(values)
    repeated = mean(
        [v for v in values for _ in range(50)], clusters=[i for i in range(4) for _ in range(50)]
    )
    assert repeated.value == alone.value == 0.5
    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low)


def test_weighted_mean_is_ratio_of_sums() -> None:
    # (1 * 3 + 2 * 1) / (3 + 1)
    assert mean([1.0, 2.0], weights=[3.0, 1.0]).value == 1.25


def test_written_scores_read_back(tmp_path) -> None:
    (tmp_path / "files").mkdir()
    Scores.write(
        tmp_path / "files", {"exam/accuracy": share(3, 4, chance=0.25)}, [{"answer": "猫"}]
    )
    scores = Scores(tmp_path)
    assert scores.figures() == {"exam/accuracy": share(3, 4, chance=0.25)}
    assert scores.answers() == [{"answer": "猫"}]


def test_a_figure_without_a_trial_is_written_as_plain_json(tmp_path) -> None:
    (tmp_path / "files").mkdir()
    Scores.write(tmp_path / "files", {"x": mean([])})
    assert Scores(tmp_path).figures()["x"].n == 0


def test_macro_mean_weighs_every_group_alike() -> None:
    # Means 0.5 and 1.0, however many trials each has.
    figure = macro_mean([([0.0, 1.0] * 50, None), ([1.0], None)])
    assert figure.value == 0.75
    assert figure.n == 101
    # The second group never varies: half the first one's interval, 0.5 +- 1.96 * 0.5 / 10.
    assert figure.low == pytest.approx(0.75 - 0.049, abs=0.006)
    with pytest.raises(ValueError, match="needs groups"):
        macro_mean([([], None)])


def test_difference_of_two_samples() -> None:
    figure = difference(([3.0, 1.0], [1.0, 3.0]), ([1.0], None))
    assert figure.value == 0.5  # (3 + 3) / 4 - 1
    # The drawn mean of the first lies between 1 and 3.
    assert (figure.low, figure.high) == (0.0, 2.0)


def test_centred_score_is_nought_at_chance() -> None:
    figure = centred(share(25, 100, chance=0.25))
    assert figure.value == 0
    assert figure.low < 0 < figure.high
    assert centred(share(4, 4, chance=0.25)).value == 1
    with pytest.raises(ValueError, match="cannot be centred"):
        centred(share(1, 2))


def test_any_statistic_has_an_interval() -> None:
    values = [1.0, 2.0, 9.0]
    figure = resampled(3, lambda draw: max(values[i] for i in draw))
    # The largest is drawn with probability 1 - (2/3)^3 = 0.70; 1 alone with 1/27.
    assert (figure.value, figure.low, figure.high) == (9.0, 1.0, 9.0)
