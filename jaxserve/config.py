"""What an engine is told to be: validated once, frozen afterwards. No jax here."""

from __future__ import annotations

from dataclasses import dataclass, fields

GIB = 1 << 30


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one replica's batch and cache.

    max_model_len: longest sequence, prompt and output together, in tokens; max_num_seqs: sequences in one step;
    max_num_batched_tokens: tokens in one step; block_size: tokens in one KV block; num_blocks: KV blocks, the null
    block included.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    enable_chunked_prefill: bool = True
    num_replicas: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "enable_chunked_prefill" and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name}={value!r}: it is a whole number of at least 1")
        if self.num_blocks < 2:
            raise ValueError(f"num_blocks={self.num_blocks}: block 0 holds padding, so at least 2 are needed")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs="
                f"{self.max_num_seqs}: every sequence must be able to get a token in each step"
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ValueError(
                f"enable_chunked_prefill=False needs max_num_batched_tokens >= max_model_len, got "
                f"{self.max_num_batched_tokens} < {self.max_model_len}"
            )

    @property
    def blocks_per_sequence(self) -> int:
        """Blocks that a sequence of ``max_model_len`` tokens fills: the width of the block tables."""
        return -(-self.max_model_len // self.block_size)


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Numbers of sequences that a decoding step is compiled for: powers of two, and from 16 on the halfway points,
    so that at most a third of a larger step is padding."""
    sizes, size = {max_num_seqs}, 1
    while size < max_num_seqs:
        sizes.add(size)
        if size >= 16 and size * 3 // 2 < max_num_seqs:
            sizes.add(size * 3 // 2)
        size *= 2
    return tuple(sorted(sizes))


def token_buckets(max_num_batched_tokens: int, smallest: int = 64) -> tuple[int, ...]:
    """Numbers of tokens that a step with prompt chunks is compiled for: powers of two from ``smallest`` on."""
    sizes, size = {max_num_batched_tokens}, smallest
    while size < max_num_batched_tokens:
        sizes.add(size)
        size *= 2
    return tuple(sorted(sizes))
