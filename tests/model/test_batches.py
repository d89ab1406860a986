"""The mixture in closed form: shares, epochs, positions; and windows that lose no token."""

import numpy as np
import pytest

from model.batches import BLOCK_SAMPLES, MixPhase, Mixture, Permutation, Windows, micro_batch_rows


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 1000])
def test_a_permutation_gives_each_element_once(size: int) -> None:
    order = Permutation(size, [1, 2])(np.arange(size))
    assert sorted(order.tolist()) == list(range(size))


def test_epochs_have_different_orders() -> None:
    first, second = (Permutation(500, [0, epoch])(np.arange(500)) for epoch in (0, 1))
    # Two random orders of 500 agree in one place on average.
    assert (first == second).sum() < 10


def test_every_block_holds_the_shares_to_the_sample() -> None:
    mixture = Mixture([700, 90], [MixPhase(3 * BLOCK_SAMPLES, [0.7, 0.3])], seed=4)
    for block in range(3):
        sources, _ = mixture.at(block * BLOCK_SAMPLES, BLOCK_SAMPLES)
        # 0.7 x 4096 = 2867.2 and 0.3 x 4096 = 1228.8: the larger remainder rounds up.
        assert np.bincount(sources).tolist() == [2867, 1229]


def test_a_source_gives_every_window_once_per_epoch_across_phases() -> None:
    phases = [MixPhase(5000, [0.5, 0.5]), MixPhase(3001, [0.0, 1.0]), MixPhase(2000, [0.9, 0.1])]
    mixture = Mixture([800, 37], phases, seed=0)
    sources, windows = mixture.at(0, mixture.samples)
    assert mixture.samples == 10_001
    for source, size in ((0, 800), (1, 37)):
        drawn = windows[sources == source]
        whole = len(drawn) // size
        counts = np.bincount(drawn[: whole * size], minlength=size)
        assert counts.tolist() == [whole] * size
        assert len(np.unique(drawn[whole * size :])) == len(drawn) - whole * size
        assert mixture.used[source] == len(drawn)


def test_any_slice_is_the_same_as_reading_from_the_start() -> None:
    phases = [MixPhase(4200, [1, 3]), MixPhase(900, [3, 1])]
    sources, windows = Mixture([50, 600], phases, seed=9).at(0, 5100)
    fresh = Mixture([50, 600], phases, seed=9)
    for first, count in ((4990, 110), (4090, 300), (0, 1)):
        part = fresh.at(first, count)
        assert part[0].tolist() == sources[first : first + count].tolist()
        assert part[1].tolist() == windows[first : first + count].tolist()


def test_a_share_of_an_empty_source_is_refused() -> None:
    with pytest.raises(ValueError, match="phase 0 takes a share of a domain that has no tokens"):
        Mixture([10, 0], [MixPhase(5, [1, 1])], seed=0)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 40])
def test_each_token_is_a_label_exactly_once(count: int) -> None:
    tokens = np.arange(10, 10 + count, dtype=np.uint16)
    windows = Windows(tokens, context=8, eos=1)
    ids, labels = windows.at(np.arange(len(windows)))
    assert labels[labels >= 0].tolist() == tokens.tolist()
    # Each label is predicted from the token before it, the first from an eos.
    before = ids[labels >= 0]
    assert before.tolist() == [1, *tokens[:-1].tolist()]


@pytest.mark.parametrize("count", [7, 8, 9, 16, 17, 24, 25, 40])
def test_windows_in_the_middle_are_those_of_the_whole_stream(count: int) -> None:
    tokens = np.arange(10, 10 + count, dtype=np.uint16)
    windows = Windows(tokens, context=8, eos=1)
    stream = [1, *tokens.tolist(), *[0] * 8]
    for window in range(len(windows)):
        ids, labels = windows.at(np.array([window]))
        assert (
            ids[0, : count - 8 * window].tolist()
            == stream[8 * window :][: min(8, count - 8 * window)]
        )
        wanted = stream[8 * window + 1 : min(8 * window + 9, count + 1)]
        assert labels[0].tolist() == wanted + [-1] * (8 - len(wanted))


def test_ranks_and_micro_batches_share_out_all_rows() -> None:
    rows = np.arange(10)
    for world in (1, 2, 3):
        for micro_batch in (0, 2, 3):
            parts = [micro_batch_rows(rows, rank, world, micro_batch) for rank in range(world)]
            found = np.concatenate([part for own in parts for part in own])
            assert sorted(found.tolist()) == list(range(10))
            assert all(0 < len(part) <= (micro_batch or 10) for own in parts for part in own)
            # A rank that is ready before the others would leave them waiting.
            assert len({len(own) for own in parts}) == 1
    with pytest.raises(ValueError, match="1 sequences cannot be split over 2 processes"):
        micro_batch_rows(np.arange(1), 1, 2, 0)
    with pytest.raises(ValueError, match=r"5 sequences .* over 2 processes in micro-batches of 1"):
        micro_batch_rows(np.arange(5), 1, 2, 1)
