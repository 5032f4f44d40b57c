"""Names of full blocks: equal names, equal K and V."""

from __future__ import annotations

from array import array
from hashlib import sha256

from jaxserve.request import Request


class BlockHasher:
    """SHA-256 chained over the hash of the block before, a block's token ids, and, at the start of the chain, the
    request's extra keys. A block's name thus covers every token before it and whatever else its K and V depend on."""

    def __init__(self, block_size: int, by_prompt_length: bool = False) -> None:
        self.block_size, self.by_prompt_length = block_size, by_prompt_length

    def hashes(self, request: Request) -> list[bytes]:
        """Names of the request's full blocks whose tokens are known, in order. Each is computed once."""
        done, size = request.block_hashes, self.block_size
        count = request.num_tokens // size
        if len(done) < count:
            parent = done[-1] if done else self._root(request)
            start = len(done) * size
            tokens = array("i", request.tokens(start, count * size)).tobytes()
            width = 4 * size
            for at in range(0, len(tokens), width):
                parent = sha256(parent + tokens[at : at + width]).digest()
                done.append(parent)
        return done

    def _root(self, request: Request) -> bytes:
        length = request.num_prompt_tokens if self.by_prompt_length else None
        return sha256(repr((request.cache_salt, request.adapter, length)).encode()).digest()
