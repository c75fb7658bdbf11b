"""Orders of several sources of shards: shares, locality, and arithmetic."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from data_prep.bop.mixture import ShardMixture, dataset_weights

GSO = [50] * 20  # samples of each file
SHAPENET = [30] * 10
BOTH = [GSO, SHAPENET]


def test_data_set_ids():
    assert dataset_weights(0) == (1, 0)
    assert dataset_weights(1) == (0, 1)
    assert dataset_weights(2) == (1, 1)
    assert dataset_weights(2, (3.0, 1.0)) == (3, 1)
    assert dataset_weights(0, (3.0, 1.0)) == (3, 0)
    with pytest.raises(ValueError, match=r"0 \(gso\), 1 \(shapenet\), 2 \(both\), got 3"):
        dataset_weights(3)


@pytest.mark.parametrize(("dataset", "share"), [(0, 0.0), (1, 1.0), (2, 0.25)])
def test_shares(dataset, share):
    """Both loaders are really used, in their shares, from the first block on."""
    order = ShardMixture(BOTH, dataset_weights(dataset, (3.0, 1.0)), seed=1, shards_in_window=4, block=100)
    keys = np.array(order.keys(0, 1000))
    assert np.mean(keys >= sum(GSO)) == share
    blocks = (keys >= sum(GSO)).reshape(10, 100).mean(1)
    assert (blocks == share).all()


def test_every_sample_comes_once_before_any_comes_again():
    order = ShardMixture(BOTH, (10.0, 3.0), seed=2, shards_in_window=3, block=13)
    assert order.num_samples == 1300
    counts = Counter(map(int, order.keys(0, 1300)))
    assert set(counts.values()) == {1}
    assert sorted(counts) == list(range(1300))
    keys = order.keys(1300, 1300)
    assert {key.epoch for key in keys} == {1}
    assert set(map(int, keys)) == set(range(1300))


def test_reading_stays_within_a_few_files():
    """Of one source alone: any 150 positions from a window's start touch its 3 files, and epochs take other ones."""
    order = ShardMixture([GSO], [1.0], seed=3, shards_in_window=3, block=100)
    files = np.array(order.keys(0, 1000)) // 50
    windows = [set(files[start : start + 150]) for start in range(0, 900, 150)]
    assert all(len(window) == 3 for window in windows)
    assert windows != [set(np.array(order.keys(1000 + start, 150)) // 50) for start in range(0, 900, 150)]


def test_neighbours_in_a_file_do_not_follow_each_other():
    """Samples of one picture lie side by side: in the order they are apart, as if drawn at random."""
    order = ShardMixture([GSO], [1.0], seed=4, shards_in_window=4, block=100)
    keys = np.array(order.keys(0, 1000))
    distances = np.abs(np.diff(keys))
    assert np.mean(distances <= 4) < 0.08  # 8 of 200 places are that near by chance
    assert np.median(distances) > 40


def test_a_position_decides_its_sample():
    """On another number of ranks, and after a resume, nothing is repeated or lost."""
    make = lambda: ShardMixture(BOTH, (2.0, 1.0), seed=5, shards_in_window=4, block=90)  # noqa: E731
    straight = make().keys(0, 2500)
    halves = [key for start in range(0, 2500, 7) for key in make().keys(start, min(7, 2500 - start))][:2500]
    assert list(map(int, straight)) == list(map(int, halves))
    assert [(key.epoch, key.seed) for key in straight] == [(key.epoch, key.seed) for key in halves]
    backwards = make()
    assert [int(backwards.keys(p, 1)[0]) for p in range(2499, -1, -7)] == [
        int(straight[p]) for p in range(2499, -1, -7)
    ]


def test_seeds_and_sources_differ():
    first, other = (ShardMixture(BOTH, (1.0, 1.0), seed, 4, 100).keys(0, 200) for seed in (6, 7))
    assert list(map(int, first)) != list(map(int, other))
    same = ShardMixture([GSO, GSO], (1.0, 1.0), 6, 4, 100).keys(0, 400)
    one, two = ([int(key) % 1000 for key in same if (key >= 1000) == side] for side in (False, True))
    assert one != two
    assert len({key.seed for key in same}) == 2
