"""Which blocks hold which request's tokens."""

from __future__ import annotations

from jaxserve.kv_cache.block_pool import BlockPool
from jaxserve.request import Request


class KVCacheManager:
    """Block tables of the running requests of one replica."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self._tables: dict[str, list[int]] = {}

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def table(self, request: Request) -> list[int]:
        """Blocks of the request in order of position."""
        return self._tables.get(request.request_id, [])

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Make room for the request's first ``num_tokens`` tokens; False, and nothing changed, if blocks run out."""
        table = self._tables.get(request.request_id, [])
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > self.pool.num_free:
            return False
        if missing > 0:
            self._tables[request.request_id] = table + self.pool.allocate(missing)
        return True

    def free(self, request: Request) -> None:
        self.pool.free(self._tables.pop(request.request_id, []))

    @property
    def usage(self) -> float:
        """Share of usable blocks that are in use, 0 to 1."""
        return 1 - self.pool.num_free / self.pool.num_usable

    def check_integrity(self, running: list[Request]) -> None:
        """Every running request's tokens have blocks, no block has two owners, nothing else holds any."""
        self.pool.check_integrity()
        owned = [block for table in self._tables.values() for block in table]
        assert len(owned) == len(set(owned)) == self.pool.num_usable - self.pool.num_free
        assert set(self._tables) <= {r.request_id for r in running}
        for request in running:
            assert len(self.table(request)) >= self.blocks_for(request.num_computed_tokens)
