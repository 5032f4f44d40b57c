"""What has to be added to a model so that it divides over ranks."""

from __future__ import annotations


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
