"""How good a model is at a task, how sure that is, and whether another one is worse at the same cases.

Both models answer the same cases, so that what is compared is the difference of each case: what makes a case hard is
in both and cancels out. ``Test`` says how a loss is told from chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.01
"""How often models that are equally good may be called different, over all comparisons of a run."""
NEGLIGIBLE = 3e-5
"""Of a figure's unit. Sums in another order move the mean log-probability of a float32 model by so much at most
(``agreement.MEAN_FLOOR`` nats), always in one direction if the cases are few: certain, and of no weight."""


@dataclass(frozen=True)
class Scores:
    """One metric of one task, case by case: the figure is the sum of ``values`` over the sum of ``weights``."""

    task: str
    metric: str
    higher_is_better: bool
    values: np.ndarray
    """float64 [cases]: 1 or 0 for right or wrong; bits of the text."""
    weights: np.ndarray
    """float64 [cases]: 1 each; bytes of the text."""
    cases: tuple[str, ...]
    """A hash of what each case asks."""

    @property
    def name(self) -> str:
        return f"{self.task} {self.metric}"

    @property
    def mean(self) -> float:
        return float(self.values.sum() / self.weights.sum())

    @property
    def stderr(self) -> float:
        """Of ``mean``, over cases that might have been asked instead. Of a single case it is not known: NaN."""
        return _ratio_error(self.values, self.weights)

    @property
    def is_share(self) -> bool:
        """Whether every case is right or wrong."""
        return bool(np.isin(self.values, (0, 1)).all() and (self.weights == 1).all())


@dataclass(frozen=True)
class Comparison:
    """The same cases, answered by two models."""

    base: Scores
    other: Scores

    def __post_init__(self) -> None:
        if self.base.cases != self.other.cases:
            raise ValueError(f"{self.base.name}: the two models were not asked the same cases")

    @property
    def difference(self) -> float:
        """What the other has more."""
        return self.other.mean - self.base.mean

    @property
    def stderr(self) -> float:
        """Of the difference: paired."""
        return _ratio_error(self.other.values - self.base.values, self.base.weights)

    @property
    def loss(self) -> float:
        """What the other is worse by; negative where it is better."""
        return -self.difference if self.base.higher_is_better else self.difference

    def chance(self, allowed: float) -> float:
        """How likely chance makes a loss as large as this one where the true one is ``allowed`` or less. One-sided.

        Right against wrong with nothing allowed: McNemar's exact test, which asks whether the cases that only one of
        the two gets right are shared out like throws of a coin. Everything else: a z-test of the paired difference.
        """
        if self.base.is_share and self.other.is_share and allowed == 0:
            better = int(((self.other.values - self.base.values) * (1 if self.base.higher_is_better else -1) > 0).sum())
            return binomial_tail(int((self.other.values != self.base.values).sum()), better)
        surplus, error = self.loss - allowed - NEGLIGIBLE, self.stderr
        if not error > 0:
            return float(surplus <= 0)
        return 0.5 * math.erfc(surplus / error / math.sqrt(2))


def binomial_tail(throws: int, heads: int) -> float:
    """How likely a fair coin falls ``heads`` times or fewer."""
    return math.fsum(math.comb(throws, k) * 0.5**throws for k in range(heads + 1))


def worse(comparisons: Sequence[Comparison], allowed: float) -> list[bool]:
    """Which of them lost more than ``allowed``, by more than chance: together they are wrong about that in ``LEVEL`` of
    all runs at most (Bonferroni)."""
    return [c.chance(allowed) < LEVEL / len(comparisons) for c in comparisons]


def _ratio_error(values: np.ndarray, weights: np.ndarray) -> float:
    """The standard error of sum(values) / sum(weights) by its linear part; that of a mean where weights are 1."""
    count, total = len(values), weights.sum()
    if count < 2:
        return math.nan
    off = values - values.sum() / total * weights
    return float(math.sqrt(count / (count - 1) * np.sum(off * off)) / total)
