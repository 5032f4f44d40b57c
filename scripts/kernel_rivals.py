"""Attention by others on the same tensors, laid out without pages: cuDNN through jax, and PyTorch's.

Only where all sequences are alike, since neither takes a ragged batch. What is not installed says so in the report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from gpu_timing import REPEAT_SECONDS, REPEATS, Timing, Work, time_work
from kernel_cases import AttentionCase, Case

Rival = Callable[[], tuple[Any, Callable[[], Timing]]]
"""() -> a result as ``Case.expected`` has it, and what times it."""
CALLS = 8
"""Of which PyTorch starts one behind the other, before the clock is read."""


def of(case: Case) -> Mapping[str, Rival]:
    """Of a case; none for what they cannot do."""
    if not isinstance(case, AttentionCase) or not comparable(case):
        return {}
    return {"cuDNN": lambda: cudnn(case), "torch SDPA": lambda: torch_sdpa(case)}


def comparable(case: AttentionCase) -> bool:
    """One group of sequences that decode, or that have nothing in the cache yet; bfloat16."""
    if len(case.step.groups) != 1 or case.kv_dtype != "bfloat16":
        return False
    return case.shape.one_token_each or case.step.groups[0].num_cached == 0


def dense(case: AttentionCase, copy: int = 0) -> tuple[Any, Any]:
    """K and V [B, S, K, H], without the pages' padding."""
    length, tables = int(case.lengths[1][0]), case.ragged.block_tables

    def unpaged(cache: Any) -> Any:
        pages = jnp.moveaxis(cache[tables], 3, 2)  # [B, blocks, size, K, H]
        return pages.reshape(pages.shape[0], -1, *pages.shape[3:])[:, :length]

    k, v = case.caches(copy)
    return jax.jit(unpaged)(k), jax.jit(unpaged)(v)


def batched(case: AttentionCase, q: Any) -> Any:
    """[T, K, G, H] -> [B, T/B, K*G, H]."""
    return q.reshape(case.step.num_seqs, -1, q.shape[1] * q.shape[2], q.shape[3])


def cudnn(case: AttentionCase, implementation: Any = "cudnn") -> tuple[Any, Callable[[], Timing]]:
    causal = not case.shape.one_token_each

    def call(q: Any, operands: Any) -> tuple[Any, Any]:
        out = jax.nn.dot_product_attention(
            batched(case, q), *operands, scale=case.scoring.scale, is_causal=causal, implementation=implementation
        )
        return out.reshape(q.shape), ()

    work = Work(call, case.queries, [dense(case, i) for i in range(case.num_copies)])
    return work.result(), lambda: time_work(work)


def torch_sdpa(case: AttentionCase) -> tuple[Any, Callable[[], Timing]]:
    """With time_work's method: one call needs the result of the one before it."""
    import torch  # pyright: ignore[reportMissingImports]

    causal = not case.shape.one_token_each

    def as_torch(x: Any) -> Any:
        return torch.from_dlpack(x).transpose(1, 2)  # heads before tokens

    def attend(q: Any, k: Any, v: Any) -> Any:
        options = {"is_causal": causal, "scale": case.scoring.scale, "enable_gqa": True}
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    q = as_torch(batched(case, case.queries()))
    operands = [tuple(map(as_torch, dense(case, i))) for i in range(case.num_copies)]

    def run(times: int) -> float:
        torch.cuda.synchronize()
        start, x = time.perf_counter(), q
        for i in range(times):
            x = attend(x, *operands[i % len(operands)])
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def timed() -> Timing:
        run(CALLS)
        calls = CALLS * max(1, round(REPEAT_SECONDS / run(CALLS)))
        times = [run(calls) / calls for _ in range(REPEATS)]
        return Timing(median(times), min(times), max(times), calls)

    out = jax.dlpack.from_dlpack(attend(q, *operands[0]).transpose(1, 2).contiguous())
    return (out.reshape(case.queries().shape), ()), timed
