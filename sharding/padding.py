"""What has to be added to a model so that it divides over ranks, and how its layers are cut into stages."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache


def fit_heads(kv_heads: int, group: int, tp: int) -> tuple[int, int, int]:
    """(copies of each KV head, KV heads, query heads per KV head) with which ``kv_heads`` of ``group`` query heads
    each divide over ``tp`` ranks: the fewest attention weights, then the smallest KV cache, then the fewest copies."""

    def fitted(copies: int) -> tuple[int, int, int]:
        return copies, up_to_multiple(kv_heads * copies, tp), -(-group // copies)

    def cost(fit: tuple[int, int, int]) -> tuple[int, int, int]:
        copies, heads, queries = fit
        return heads * (2 * queries + 2), heads, copies  # a query head has rows in Q and O, a KV head in K and V

    return min(map(fitted, range(1, group + 1)), key=cost)


def up_to_multiple(size: int, of: int) -> int:
    """The least multiple of ``of`` that is no less than ``size``."""
    return -(-size // of) * of


@cache
def stage_starts(kinds: tuple[Hashable, ...], num_stages: int) -> tuple[int, ...] | None:
    """First layers of the stages, and behind them the number of layers. ``kinds``: of all layers.

    Stages run one program, so their i-th layers must be of one kind, and none is longer than the one before: what is
    missing is missing at the end. As even as that can be; None if it cannot be.
    """
    each, more = divmod(len(kinds), num_stages)
    even = tuple(stage * each + min(stage, more) for stage in range(num_stages + 1))
    # Where a stage may begin: at layers from which on all are as from the first on.
    allowed = {s for s in range(len(kinds)) if kinds[s:] == kinds[: len(kinds) - s]}
    if each == 0 or allowed.issuperset(even[:-1]):
        return even if each else None
    ends = [*sorted(allowed - {0}), len(kinds)]
    # By where a stage ends and its length: the starts with the shortest first stage, which is the longest.
    best: dict[tuple[int, int], tuple[int, ...]] = {(end, end): (0, end) for end in ends}
    for _ in range(num_stages - 1):
        longer = [
            (*starts, end) for (start, length), starts in best.items() for end in ends if start < end <= start + length
        ]
        best = {(s[-1], s[-1] - s[-2]): s for s in sorted(longer, key=lambda s: s[1], reverse=True)}
    whole = [starts for (end, _), starts in best.items() if end == len(kinds)]
    return min(whole, key=lambda starts: (starts[1], -starts[-2]), default=None)
