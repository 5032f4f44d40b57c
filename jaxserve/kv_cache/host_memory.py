"""Host memory for the blocks of preempted requests: how much there is, and when it is worth using."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.config import SWAP_CHUNK, SwapConfig


class HostMemory:
    """Counts blocks; what they hold is the device half's business."""

    def __init__(self, config: SwapConfig) -> None:
        self.config = config
        self._sizes: dict[int, int] = {}

    @property
    def num_used(self) -> int:
        return sum(self._sizes.values())

    def prefers_swap(self, num_blocks: Sequence[int], num_tokens: int) -> bool:
        """Whether a request with these blocks (per group of layers) should be swapped rather than computed again.

        Swapping moves its blocks out and back in: 2 * blocks * block_bytes / bytes_per_second seconds (as many blocks
        as the group with most has); recomputing takes num_tokens / prefill_tokens_per_second. Never where host memory
        would run over.
        """
        config, size = self.config, _chunked(num_blocks)
        if config.mode == "recompute" or self.num_used + size > config.num_blocks:
            return False
        moving = 2 * max(num_blocks) * config.block_bytes / config.bytes_per_second
        return config.mode == "swap" or moving < num_tokens / config.prefill_tokens_per_second

    def store(self, handle: int, num_blocks: Sequence[int]) -> None:
        assert handle not in self._sizes
        self._sizes[handle] = _chunked(num_blocks)

    def release(self, handle: int) -> None:
        del self._sizes[handle]

    def check_integrity(self, handles: Sequence[int]) -> None:
        """``handles``: of all swapped requests."""
        assert sorted(self._sizes) == sorted(handles), "host memory of somebody who left, or none for who is there"
        assert self.num_used <= max(self.config.num_blocks, 0)


def _chunked(num_blocks: Sequence[int]) -> int:
    """A chunk has room for as many blocks of every group."""
    return -(-max(num_blocks) // SWAP_CHUNK) * SWAP_CHUNK
