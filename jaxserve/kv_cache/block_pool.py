"""The blocks of one replica's KV cache."""

from __future__ import annotations

from collections import deque

NULL_BLOCK = 0
"""Where padding writes its K and V; never allocated, never read."""


class BlockPool:
    """Free blocks, oldest first, so that a freed block keeps its contents as long as possible."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = deque(range(NULL_BLOCK + 1, num_blocks))
        self._in_use: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Blocks that requests can have: all but the null block."""
        return self.num_blocks - 1

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks; the caller has checked ``num_free``."""
        assert count <= len(self._free), f"{count} blocks asked for, {len(self._free)} free"
        blocks = [self._free.popleft() for _ in range(count)]
        self._in_use.update(blocks)
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Give blocks back; the last one first, since the start of a sequence is worth keeping longest."""
        for block in reversed(blocks):
            self._in_use.remove(block)
            self._free.append(block)

    def check_integrity(self) -> None:
        """Recount everything: each block is free or in use, once, and the null block is neither."""
        free = list(self._free)
        assert len(set(free)) == len(free), "a block is free twice"
        assert not self._in_use & set(free), "a block is free and in use"
        assert self._in_use | set(free) == set(range(1, self.num_blocks)), "a block is lost"
