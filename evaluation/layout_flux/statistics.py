"""Means over objects with their 95 % intervals. Objects of one layout are not independent: layouts are resampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

NUM_RESAMPLES = 1000
LEVEL = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A mean, its interval and how many values it is of; `mean` None: nothing was measured."""

    mean: float | None
    low: float | None
    high: float | None
    count: int

    def to_json(self) -> dict:
        return {"mean": self.mean, "low": self.low, "high": self.high, "count": self.count}


NOTHING = Estimate(None, None, None, 0)


def estimate(values: np.ndarray, layouts: np.ndarray, weights: np.ndarray | None = None) -> Estimate:
    """The ratio of sums of values and weights, by default the mean; a percentile bootstrap over layouts.

    Args:
        values: (R,); NaN: not measured.
        layouts: (R,) number of the layout that each belongs to.
        weights: (R,) what the sum of the values is divided by the sum of; 1 by default.
    """
    weights = np.ones(len(values)) if weights is None else weights
    kept = np.isfinite(values) & np.isfinite(weights)
    values, layouts, weights = values[kept].astype(float), layouts[kept], weights[kept].astype(float)
    if weights.sum() <= 0:
        return NOTHING
    _, places = np.unique(layouts, return_inverse=True)
    number = places.max() + 1
    sums, totals = (np.bincount(places, each, number) for each in (values, weights))
    mean = float(sums.sum() / totals.sum())
    drawn = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), NUM_RESAMPLES)
    divisors = drawn @ totals
    resampled = (drawn @ sums)[divisors > 0] / divisors[divisors > 0]
    low, high = np.percentile(resampled, LEVEL)
    return Estimate(mean, float(low), float(high), len(values))


@dataclass
class Table:
    """Figures in columns, a row for each object (or pair, or layout).

    Args:
        layouts: (R,) number of the layout that a row belongs to.
        columns: name -> (R,), NaN: not measured.
    """

    layouts: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.layouts)

    def add(self, name: str, values) -> None:
        """Put in a column; ValueError if it is not of the table's length."""
        column = np.asarray(values, float)
        if column.shape != self.layouts.shape:
            raise ValueError(f"`{name}` must have {len(self)} values, got {column.shape}")
        self.columns[name] = column

    def where(self, chosen: np.ndarray) -> Table:
        """The chosen rows."""
        return Table(self.layouts[chosen], {name: values[chosen] for name, values in self.columns.items()})

    def estimate(self, name: str) -> Estimate:
        """The mean of a column; of one that is not there, nothing."""
        return estimate(self.columns[name], self.layouts) if name in self.columns else NOTHING


def difference(after: Table, before: Table, name: str) -> Estimate:
    """The mean of the paired differences of a column of two tables of the same rows; pairs with a NaN are left out.

    Raises:
        ValueError: the tables are of other layouts.
    """
    if not np.array_equal(after.layouts, before.layouts):
        raise ValueError("only tables of the same layouts can be compared")
    if name not in after.columns or name not in before.columns:
        return NOTHING
    return estimate(after.columns[name] - before.columns[name], after.layouts)


def as_json(estimates: Mapping[str, Estimate]) -> dict:
    """Estimates by name, with their intervals."""
    return {name: each.to_json() for name, each in estimates.items()}
