"""Percentiles, fairness, and how sure a ratio of two runs is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000
"""Of a bootstrap: the ends of a 95 % interval are then known to about a tenth of its width."""
FEWEST_GROUPS = 5
"""Groups below which resampling says nothing."""

Groups = Sequence[Sequence[float]]
"""Raw values. Those of a group belong together (the gaps of one request) and are drawn together."""

STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda x: float(np.mean(x)),
    "median": lambda x: float(np.median(x)),
    "p90": lambda x: float(np.percentile(x, 90)),
    "p99": lambda x: float(np.percentile(x, 99)),
    "min": lambda x: float(np.min(x)),
    "max": lambda x: float(np.max(x)),
}


def statistic(name: str, groups: Groups) -> float:
    """One of ``STATISTICS`` of all values."""
    return STATISTICS[name](_flat(groups))


def jain_index(shares: Sequence[float]) -> float:
    """1 where all have the same, 1/n where one of n has everything."""
    x = np.asarray(shares, np.float64)
    squares = float(np.sum(x * x))
    return float(np.sum(x)) ** 2 / (len(x) * squares) if squares else 1.0


def ratio_interval(name: str, a: Groups, b: Groups, seed: int, level: float = 0.95) -> tuple[float, float] | None:
    """Between which ratios b/a of a statistic most likely lies: a percentile bootstrap over groups. None where either
    side has fewer than ``FEWEST_GROUPS``, or the ratio is not defined.

    It knows how much requests (or repeats) differ within a run, not how much the machine changes between two runs.
    """
    if min(len(a), len(b)) < FEWEST_GROUPS:
        return None
    rng = np.random.default_rng(seed)
    tops, bottoms = _resampled(name, b, rng), _resampled(name, a, rng)
    if not np.all(bottoms > 0):
        return None
    low, high = np.quantile(tops / bottoms, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled(name: str, groups: Groups, rng: np.random.Generator) -> np.ndarray:
    arrays = [np.asarray(g, np.float64) for g in groups]
    draws = rng.integers(0, len(arrays), (RESAMPLES, len(arrays)))
    return np.array([STATISTICS[name](np.concatenate([arrays[i] for i in draw])) for draw in draws])


def _flat(groups: Groups) -> np.ndarray:
    return np.concatenate([np.asarray(g, np.float64) for g in groups])
