"""The blocks of one group of layers: free ones in the order of their last use, shared ones counted, full ones named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

NULL_BLOCK = 0
"""Where padding writes its K and V; never allocated, never read."""


class Block:
    """One block: how many sequences hold it, the hash of what it holds if that is known, its neighbours while free."""

    __slots__ = ("hash", "id", "next", "previous", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.id = block_id
        self.ref_count = 0
        self.hash: bytes | None = None
        self.previous: Block = self
        self.next: Block = self


class FreeList:
    """Free blocks, the next to be used first, linked through the blocks themselves: every operation is O(1)."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._end = Block(-1)
        self._length = 0
        for block in blocks:
            self.append(block)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Block]:
        block = self._end.next
        while block is not self._end:
            yield block
            block = block.next

    def append(self, block: Block) -> None:
        """Put a block where it is used last."""
        self._insert(block, self._end)

    def prepend(self, block: Block) -> None:
        """Put a block where it is used next."""
        self._insert(block, self._end.next)

    def _insert(self, block: Block, before: Block) -> None:
        block.previous, block.next = before.previous, before
        before.previous.next = before.previous = block
        self._length += 1

    def remove(self, block: Block) -> None:
        block.previous.next, block.next.previous = block.next, block.previous
        block.previous = block.next = block
        self._length -= 1

    def pop(self) -> Block:
        """Take the block that is to be used next."""
        block = self._end.next
        self.remove(block)
        return block


class BlockPool:
    """Every block is free or held. A free block keeps its contents, and can be found by their hash, until it is
    allocated anew: the one that was used longest ago first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._blocks = [Block(i) for i in range(num_blocks)]
        self._free = FreeList(self._blocks[NULL_BLOCK + 1 :])
        self._by_hash: dict[bytes, Block] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Blocks that requests can have: all but the null block."""
        return self.num_blocks - 1

    @property
    def num_named(self) -> int:
        """Blocks that can be found by their contents."""
        return len(self._by_hash)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks, whatever they held; the caller has checked ``num_free``."""
        assert count <= len(self._free), f"{count} blocks asked for, {len(self._free)} free"
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            block.ref_count = 1
            self._forget(block)
        return [block.id for block in taken]

    def free(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks. Those that nobody holds any more are used again in this order: contents
        without a name first (they are lost anyway), then the end of the sequence before its start."""
        for block_id in reversed(blocks):
            block = self._blocks[block_id]
            assert block.ref_count > 0, f"block {block_id} is free already"
            block.ref_count -= 1
            if block.ref_count == 0:
                (self._free.prepend if block.hash is None else self._free.append)(block)

    def find(self, block_hash: bytes) -> int | None:
        """The block that holds what ``block_hash`` names."""
        block = self._by_hash.get(block_hash)
        return None if block is None else block.id

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that were found, free ones and those that others hold."""
        for block_id in blocks:
            block = self._blocks[block_id]
            if block.ref_count == 0:
                self._free.remove(block)
            block.ref_count += 1

    def name(self, block_id: int, block_hash: bytes) -> None:
        """Make a held block findable by its contents, unless another with the same contents is."""
        block = self._blocks[block_id]
        if block.hash is None and block_hash not in self._by_hash:
            block.hash = block_hash
            self._by_hash[block_hash] = block

    def forget_all(self) -> None:
        """No block can be found any more; who holds them goes on holding them."""
        for block in list(self._by_hash.values()):
            self._forget(block)

    def _forget(self, block: Block) -> None:
        if block.hash is not None:
            del self._by_hash[block.hash]
            block.hash = None

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of these nobody holds."""
        return sum(self._blocks[b].ref_count == 0 for b in blocks)

    def num_held_once(self, blocks: Iterable[int]) -> int:
        """How many of these would be free if their holder let go."""
        return sum(self._blocks[b].ref_count == 1 for b in blocks)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Recount everything. ``held``: every block of every sequence, shared ones once per sequence."""
        counts = [0] * self.num_blocks
        for block_id in held:
            counts[block_id] += 1
        assert counts[NULL_BLOCK] == 0, "somebody holds the null block"
        assert [b.ref_count for b in self._blocks] == counts, "a reference count is wrong"
        free = [block.id for block in self._free]
        assert len(free) == len(self._free) == len(set(free)), "the free list is broken"
        unheld = {i for i in range(NULL_BLOCK + 1, self.num_blocks) if counts[i] == 0}
        assert set(free) == unheld, "a block is lost, or free and held"
        named = {b.hash: b for b in self._blocks if b.hash is not None}
        assert named == self._by_hash, "a name leads to the wrong block"
