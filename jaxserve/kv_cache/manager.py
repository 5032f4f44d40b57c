"""Which blocks hold which request's tokens, in every group of layers of one replica."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.config import SchedulerConfig
from jaxserve.kv_cache.block_pool import NULL_BLOCK, BlockPool
from jaxserve.kv_cache.prefix_cache import BlockHasher
from jaxserve.request import Request, Status

Tables = list[list[int]]
"""Per group of layers, a request's blocks in order of position; the null block where a window has moved on."""


class LayerGroup:
    """Blocks and tables of the layers that look back equally far."""

    def __init__(self, window: int | None, num_blocks: int, block_size: int) -> None:
        self.window, self.block_size = window, block_size
        self.pool = BlockPool(num_blocks)
        self.tables: dict[str, list[int]] = {}
        self._num_dropped: dict[str, int] = {}

    def table(self, request: Request) -> list[int]:
        return self.tables.get(request.request_id, [])

    def missing(self, request: Request, num_blocks: int) -> int:
        """Blocks to allocate before the request has ``num_blocks``, those that its window lets go of counted back."""
        new = num_blocks - len(self.table(request))
        return new if self.window is None else new - self.pool.num_held_once(self._out_of_window(request))

    def grow(self, request: Request, num_blocks: int) -> None:
        if self.window is not None:
            self._drop(request)
        table = self.tables.setdefault(request.request_id, [])
        if num_blocks > len(table):
            table += self.pool.allocate(num_blocks - len(table))

    def first_needed(self, position: int) -> int:
        """The first block that a token at ``position`` or after it sees."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.block_size

    def _out_of_window(self, request: Request) -> list[int]:
        start = self._num_dropped.get(request.request_id, 0)
        return self.table(request)[start : self.first_needed(request.num_computed_tokens)]

    def _drop(self, request: Request) -> None:
        """Free the blocks that no token still to be computed sees; the null block takes their places."""
        dropped = self._out_of_window(request)
        if dropped:
            start = self._num_dropped.get(request.request_id, 0)
            self.pool.free(dropped)
            self.table(request)[start : start + len(dropped)] = [NULL_BLOCK] * len(dropped)
            self._num_dropped[request.request_id] = start + len(dropped)

    def held(self, request: Request) -> list[int]:
        """The blocks that the request holds."""
        return self.table(request)[self._num_dropped.get(request.request_id, 0) :]

    def open(self, request: Request, hashes: Sequence[bytes], first: int) -> None:
        """Start a table: with the blocks that hold a prefix, where the next token still sees them, or without any and
        from block ``first`` on."""
        first = max(first, self.first_needed(len(hashes) * self.block_size))
        found = [self.pool.find(h) for h in hashes[first:]]
        blocks = [b for b in found if b is not None]
        assert len(blocks) == len(found)
        self.pool.share(blocks)
        self.tables[request.request_id] = [NULL_BLOCK] * first + blocks
        self._num_dropped[request.request_id] = first

    def longest_prefix(self, hashes: Sequence[bytes], limit: int) -> int:
        """The most of the first ``limit`` blocks after which computing can go on: those that the next token sees are
        all there."""
        best = run = 0
        for count, block_hash in enumerate(hashes[:limit], 1):
            run = run + 1 if self.pool.find(block_hash) is not None else 0
            if run >= count - self.first_needed(count * self.block_size):
                best = count
            elif self.window is None:
                break
        return best

    def num_free_needed(self, hashes: Sequence[bytes]) -> int:
        """Free blocks that ``open`` would take."""
        found = (self.pool.find(h) for h in hashes[self.first_needed(len(hashes) * self.block_size) :])
        return self.pool.num_free_among(b for b in found if b is not None)

    def free(self, request: Request) -> None:
        self.pool.free(self.held(request))
        self.tables.pop(request.request_id, None)
        self._num_dropped.pop(request.request_id, None)

    def check_integrity(self, running: Sequence[Request]) -> None:
        names = {r.request_id for r in running}
        assert set(self.tables) <= names and set(self._num_dropped) <= names, "somebody who left holds blocks"
        held = [block for r in running for block in self.held(r)]
        self.pool.check_integrity(held)
        for request in running:
            table, dropped = self.table(request), self._num_dropped.get(request.request_id, 0)
            assert table[:dropped] == [NULL_BLOCK] * dropped
            assert dropped <= self.first_needed(request.num_computed_tokens), "a block was dropped too early"
            assert len(table) * self.block_size >= request.num_computed_tokens, "a computed token has no block"


class KVCacheManager:
    """Block tables of the running requests of one replica, and the prefixes that are still there."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.block_size = config.block_size
        self.groups = [LayerGroup(w, config.blocks_of(w), config.block_size) for w in config.windows]
        self.hasher = BlockHasher(config.block_size, config.keys_depend_on_prompt_length)
        self._num_named: dict[str, int] = {}
        self._tables: dict[str, Tables] = {}

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def tables(self, request: Request) -> Tables:
        """The request's tables, as they are and as they will be: not copies."""
        return self._tables[request.request_id]

    # -- prefixes ----------------------------------------------------------------------------------------------------

    def find_prefix(self, request: Request) -> int:
        """Tokens from the first one on whose K and V are there: whole blocks, and never the last token, which has to
        be computed for its logits."""
        if not (self.config.enable_prefix_caching and request.reads_prefix_cache):
            return 0
        hashes = self.hasher.hashes(request)
        count, shorter = len(hashes) + 1, (request.num_tokens - 1) // self.block_size
        while shorter < count:  # until all groups agree
            count = shorter
            for group in self.groups:
                shorter = group.longest_prefix(hashes, shorter)
        return count * self.block_size

    def name_blocks(self, request: Request) -> None:
        """Make the request's full blocks findable, as far as they are computed and their tokens known."""
        if not self.config.enable_prefix_caching:
            return
        full = min(request.num_computed_tokens, request.num_tokens) // self.block_size
        named = self._num_named.get(request.request_id, 0)
        if full > named:
            hashes = self.hasher.hashes(request)
            for group in self.groups:
                table = group.table(request)
                for i in range(named, full):
                    if table[i] != NULL_BLOCK:
                        group.pool.name(table[i], hashes[i])
            self._num_named[request.request_id] = full

    def reset_prefix_cache(self) -> None:
        for group in self.groups:
            group.pool.forget_all()

    # -- blocks ------------------------------------------------------------------------------------------------------

    def needs(self, request: Request, num_present: int, num_tokens: int) -> list[int]:
        """Free blocks of each group that ``admit`` would take."""
        ends = [self._first_blocks(group, num_present, num_tokens) for group in self.groups]
        if request.status is Status.SWAPPED:
            return [end - group.first_needed(num_present) for group, end in zip(self.groups, ends, strict=True)]
        found = request.block_hashes[: num_present // self.block_size]
        return [end - len(found) + group.num_free_needed(found) for group, end in zip(self.groups, ends, strict=True)]

    def _first_blocks(self, group: LayerGroup, num_present: int, num_tokens: int) -> int:
        """Length of a table that starts with ``num_present`` tokens and is to hold ``num_tokens``: the blocks of all
        of them, or as many as pass through a window at one time."""
        most = self.config.most_blocks(group.window, num_tokens)
        return min(self.blocks_for(num_tokens), group.first_needed(num_present) + most)

    def admit(self, request: Request, num_present: int, num_tokens: int) -> bool:
        """Make room for the first ``num_tokens`` tokens of a request that has no blocks. The first ``num_present`` of
        them were found, and their blocks are shared; or they are in host memory, and get new blocks.

        Returns False, and changes nothing, if blocks run out.
        """
        needs = self.needs(request, num_present, num_tokens)
        if any(need > group.pool.num_free for group, need in zip(self.groups, needs, strict=True)):
            return False
        swapped = request.status is Status.SWAPPED
        found = [] if swapped else request.block_hashes[: num_present // self.block_size]
        for group in self.groups:
            group.open(request, found, group.first_needed(num_present) if swapped else 0)
            group.grow(request, self._first_blocks(group, num_present, num_tokens))
        self._tables[request.request_id] = [group.table(request) for group in self.groups]
        self._num_named[request.request_id] = len(found)
        return True

    def live(self, request: Request) -> list[list[int]]:
        """Per group, the blocks that hold computed tokens which tokens to come see."""
        end = self.blocks_for(request.num_computed_tokens)
        return [g.table(request)[g.first_needed(request.num_computed_tokens) : end] for g in self.groups]

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Make room for the request's first ``num_tokens`` tokens; False, and nothing changed, if blocks run out."""
        num_blocks = self.blocks_for(num_tokens)
        if len(self.groups) == 1 and num_blocks <= len(self.groups[0].table(request)):
            return True
        if any(group.missing(request, num_blocks) > group.pool.num_free for group in self.groups):
            return False
        for group in self.groups:
            group.grow(request, num_blocks)
        return True

    def free(self, request: Request) -> None:
        """Let go of everything the request holds; full blocks stay findable until they are used again."""
        if request.request_id in self._tables:
            self.name_blocks(request)
            del self._tables[request.request_id], self._num_named[request.request_id]
            for group in self.groups:
                group.free(request)

    def num_exclusive(self, request: Request) -> list[int]:
        """Per group, blocks that would be free if the request let go."""
        return [group.pool.num_held_once(group.held(request)) for group in self.groups]

    # -- figures -----------------------------------------------------------------------------------------------------

    @property
    def num_held(self) -> int:
        """Blocks that somebody holds, all groups together."""
        return sum(g.pool.num_usable - g.pool.num_free for g in self.groups)

    @property
    def usage(self) -> float:
        """Share of usable blocks that are held, 0 to 1, in the fullest group."""
        return max(1 - g.pool.num_free / g.pool.num_usable for g in self.groups)

    def num_unused_slots(self, running: Sequence[Request]) -> int:
        """Token slots of held blocks that hold no token: the ends of the sequences."""
        size = self.block_size
        return sum(len(t) * size - r.num_computed_tokens for r in running for t in self.tables(r))

    def check_integrity(self, running: Sequence[Request]) -> None:
        """Every running request's tokens have blocks, every block its holders, nothing else holds any."""
        assert set(self._tables) == {r.request_id for r in running}
        assert set(self._num_named) == set(self._tables)
        for group in self.groups:
            group.check_integrity(running)
