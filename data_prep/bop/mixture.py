"""In which order the samples of several sources come: in fixed shares, and file by file so that reading stays local.

Both are arithmetic: a position decides its sample, on however many processes, and after a resume as before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from backlot.samples import BlockShuffle, WeightedMixture, derive_seed

GSO, SHAPENET, BOTH = 0, 1, 2
DATASET_NAMES = {GSO: "gso", SHAPENET: "shapenet", BOTH: "both"}


def dataset_weights(train_dataset_id: int, weights: tuple[float, float] = (1.0, 1.0)) -> tuple[float, float]:
    """Shares of GSO and ShapeNet in a run.

    Args:
        train_dataset_id: 0 GSO, 1 ShapeNet, 2 both by their weights.
        weights: of GSO and ShapeNet, in any unit.

    Raises:
        ValueError: there is no such id.
    """
    if train_dataset_id not in DATASET_NAMES:
        known = ", ".join(f"{number} ({name})" for number, name in DATASET_NAMES.items())
        raise ValueError(f"`train_dataset_id` must be one of {known}, got {train_dataset_id}")
    gso, shapenet = weights
    return (gso if train_dataset_id != SHAPENET else 0.0, shapenet if train_dataset_id != GSO else 0.0)


class ShardMixture(WeightedMixture):
    """A `WeightedMixture` that reads each source file by file: what it takes of one is its `BlockShuffle` in order.

    An index counts through the sources one after the other, as in `PoseDataset`.

    Args:
        shard_sizes: of each source the samples of its files (`Source.shard_sizes`).
        weights: at least 0, in any unit; a source of weight 0 is left out.
        shards_in_window: files among which samples are shuffled, at least 1.
        block: positions after which the shares are met.

    Raises:
        ValueError: sizes and weights do not fit, or a weight is too small to get a place in a block.
    """

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[int]],
        weights: Sequence[float],
        seed: int,
        shards_in_window: int = 16,
        block: int = 1000,
    ):
        super().__init__([sum(sizes) for sizes in shard_sizes], weights, seed, block)
        own_seed = derive_seed(seed)
        self._orders = {
            source: BlockShuffle(shard_sizes[source], derive_seed(own_seed, source), shards_in_window)
            for source in self._orders
        }
