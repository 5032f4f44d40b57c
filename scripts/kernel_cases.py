"""Shapes that kernels are measured at, and for each the arrays, the bytes and FLOP that it takes, and who can do it.

Bytes are those of operands read once and results written once. A goal is a share of one of the two measured limits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from gpu_timing import Work, copies

from pallas_kernels import dequant_matmul, dispatch, grouped_matmul, sampling
from pallas_kernels.dequant_matmul import Int4Weights, Int8Weights
from pallas_kernels.grouped_matmul import NARROW, Weights
from pallas_kernels.kv_write import HeadNorm, Inputs
from pallas_kernels.kv_write import reference as kv_reference
from pallas_kernels.kv_write import triton as kv_triton
from pallas_kernels.paged_attention import PagedAttention, Ragged, Scoring, Setting, Shape
from pallas_kernels.paged_attention import reference as attention_reference
from sharding.cost_model import Group, Step, attended, keys_read

Bound = Literal["bandwidth", "flops"]
BLOCK_SIZE = 16
BF16, FLOAT32 = 2, 4
KV_WRITE = {i.name: i for i in (kv_reference.IMPLEMENTATION, kv_triton.IMPLEMENTATION, kv_triton.INTERPRETED)}


@dataclass(frozen=True)
class Platform:
    """What runs: as the settings of all ops have it."""

    name: str
    capability: tuple[int, int] | None


@dataclass(frozen=True)
class Goal:
    """A share of what the GPU's memory, or its tensor cores, do in a large copy or product."""

    bound: Bound
    share: float | None = None
    """None: nobody has set one."""


class Case(Protocol):
    """One shape of one op."""

    @property
    def op(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def goal(self) -> Goal: ...
    @property
    def num_bytes(self) -> float: ...
    @property
    def num_flops(self) -> float: ...
    def refusals(self, platform: Platform) -> Mapping[str, str | None]:
        """Of every implementation, why it cannot run there, if so."""
        ...

    def work(self, implementation: str) -> Work: ...
    def expected(self) -> Any:
        """The result of one call, by the definition of correct."""
        ...


def random(shape: Sequence[int], dtype: Any, seed: int, scale: float = 1.0) -> Any:
    """Normally distributed, on the device; 8-bit integers evenly."""
    key, dtype = jax.random.key(seed), jnp.dtype(dtype)
    if dtype == jnp.int8:
        return jax.random.randint(key, tuple(shape), -127, 128, jnp.int8)
    made = jax.jit(lambda: (jax.random.normal(key, tuple(shape), jnp.bfloat16) * scale).astype(dtype))
    return made()


# -- paged attention ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """K KV heads of G query heads each, head dim H."""

    kv_heads: int
    group: int
    head_dim: int = 128


LLAMA_8B, LLAMA_70B_TP8 = Heads(8, 4), Heads(1, 8)


@dataclass(frozen=True)
class AttentionCase:
    """Attention of one layer: bfloat16 queries, blocks in random order."""

    title: str
    step: Step
    heads: Heads
    kv_dtype: str = "bfloat16"
    goal: Goal = Goal("bandwidth")

    @property
    def op(self) -> str:
        return "paged attention"

    @property
    def name(self) -> str:
        cache = "" if self.kv_dtype == "bfloat16" else f", {self.kv_dtype} cache"
        return f"{self.title}, {self.heads.kv_heads} × {self.heads.group} heads{cache}"

    @property
    def shape(self) -> Shape:
        return Shape(BLOCK_SIZE, one_token_each=all(g.num_tokens == 1 for g in self.step.groups))

    @property
    def num_bytes(self) -> float:
        h, groups = self.heads, self.step.groups
        keys = sum(g.num_seqs * keys_read(g.num_tokens, g.num_cached) for g in groups)
        of_q = self.step.num_rows * h.kv_heads * h.group * h.head_dim
        return 2 * keys * h.kv_heads * h.head_dim * jnp.dtype(self.kv_dtype).itemsize + of_q * 2 * BF16

    @property
    def num_flops(self) -> float:
        pairs = sum(g.num_seqs * attended(g.num_tokens, g.num_cached) for g in self.step.groups)
        return 4 * pairs * self.heads.kv_heads * self.heads.group * self.heads.head_dim

    def refusals(self, platform: Platform) -> Mapping[str, str | None]:
        h = self.heads
        setting = Setting(
            platform.name, platform.capability, "bfloat16", self.kv_dtype, h.head_dim, h.group, BLOCK_SIZE
        )
        return {
            name: _other_layout(known) or known.refuses(setting) for name, known in dispatch.PAGED_ATTENTION.items()
        }

    @cached_property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """New tokens, and tokens in the cache with these, of each sequence."""
        each = [(g.num_tokens, g.num_tokens + g.num_cached) for g in self.step.groups for _ in range(g.num_seqs)]
        q_lens, kv_lens = np.array(each, np.int32).T
        return q_lens, kv_lens

    @cached_property
    def ragged(self) -> Ragged:
        q_lens, kv_lens = self.lengths
        blocks = -(-kv_lens // BLOCK_SIZE)
        order = 1 + np.random.default_rng(0).permutation(blocks.sum()).astype(np.int32)
        tables = np.zeros((len(blocks), blocks.max()), np.int32)
        tables[np.arange(blocks.max())[None] < blocks[:, None]] = order
        ends = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
        visible = np.concatenate([np.arange(n - q, n) + 1 for q, n in zip(q_lens, kv_lens, strict=True)])
        arrays = np.zeros(ends[-1], np.int32), ends, kv_lens, tables, visible.astype(np.int32)
        return Ragged(*map(jnp.asarray, arrays))

    @property
    def num_blocks(self) -> int:
        return 1 + int((-(-self.lengths[1] // BLOCK_SIZE)).sum())

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.heads.head_dim**-0.5)

    def queries(self) -> Any:
        h = self.heads
        return random((self.step.num_rows, h.kv_heads, h.group, h.head_dim), jnp.bfloat16, 0)

    def caches(self, copy: int = 0) -> tuple[Any, Any]:
        h = self.heads
        dims = attention_reference.cache_shapes(self.num_blocks, BLOCK_SIZE, h.kv_heads, h.head_dim)[0]
        return random(dims, self.kv_dtype, 2 * copy + 1), random(dims, self.kv_dtype, 2 * copy + 2)

    @property
    def num_copies(self) -> int:
        """Of the caches."""
        h = self.heads
        tokens = self.num_blocks * BLOCK_SIZE * jnp.dtype(self.kv_dtype).itemsize
        return copies(2 * tokens * h.kv_heads * h.head_dim)

    def work(self, implementation: str) -> Work:
        """What is kept is rounded to the queries' dtype, as the engine does it, and are the next call's queries."""
        return self.work_of(dispatch.PAGED_ATTENTION[implementation])

    def work_of(self, attention: PagedAttention) -> Work:
        shape, scoring = self.shape, self.scoring
        plan = jax.jit(lambda ragged: attention.plan(ragged, self.step.num_rows, shape))(self.ragged)

        def call(q: Any, operands: Any) -> tuple[Any, Any]:
            k, v, plan = operands
            return attention.attend(q, k, v, plan, shape, scoring)[0].astype(q.dtype), ()

        return Work(call, self.queries, [(*self.caches(i), plan) for i in range(self.num_copies)])

    def expected(self) -> Any:
        q, (k, v) = self.queries(), self.caches()
        attend = partial(attention_reference.attend, shape=self.shape, scoring=self.scoring)
        return jax.jit(attend)(q, k, v, self.ragged)[0].astype(q.dtype), ()


def _other_layout(attention: PagedAttention) -> str | None:
    sizes = (2, 16, 3, 8)
    same = attention.cache_shapes(*sizes) == attention_reference.cache_shapes(*sizes)
    return None if same else "its cache has another layout"


# -- KV write ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KvWriteCase:
    """Norm if asked for, rotary embedding, and K and V into caches of as many tokens; bfloat16."""

    tokens: int
    heads: Heads
    qk_norm: bool = False
    kv_dtype: str = "bfloat16"
    goal: Goal = Goal("bandwidth")

    @property
    def op(self) -> str:
        return "KV write"

    @property
    def name(self) -> str:
        norm = ", QK-norm" if self.qk_norm else ""
        cache = "" if self.kv_dtype == "bfloat16" else f", {self.kv_dtype} cache"
        return f"{self.tokens} tokens, {self.heads.kv_heads} × {self.heads.group} heads{norm}{cache}"

    @property
    def num_bytes(self) -> float:
        h, t = self.heads, self.tokens
        q, kv = t * h.kv_heads * h.group * h.head_dim, 2 * t * h.kv_heads * h.head_dim
        return (2 * q + kv) * BF16 + kv * jnp.dtype(self.kv_dtype).itemsize + t * (h.head_dim + 1) * FLOAT32

    @property
    def num_flops(self) -> float:
        return 0.0

    def refusals(self, platform: Platform) -> Mapping[str, str | None]:
        h = self.heads
        setting = Setting(
            platform.name, platform.capability, "bfloat16", self.kv_dtype, h.head_dim, h.group, BLOCK_SIZE
        )
        return {name: known.refuses(setting) for name, known in KV_WRITE.items()}

    def inputs(self, copy: int = 0) -> Inputs:
        h, t = self.heads, self.tokens
        qkv = random((t, h.kv_heads, h.group + 2, h.head_dim), jnp.bfloat16, copy)
        slots = BLOCK_SIZE + np.random.default_rng(0).permutation(t).astype(np.int32)
        angles = random((t, h.head_dim // 2), jnp.float32, 1)
        weights = random((h.head_dim,), jnp.bfloat16, 2)
        norm = (weights, weights) if self.qk_norm else None
        return Inputs(qkv, jnp.asarray(slots), (jnp.cos(angles), jnp.sin(angles)), norm)

    def work(self, implementation: str) -> Work:
        return self.work_of(KV_WRITE[implementation].write)

    def work_of(self, write: Callable[..., Any]) -> Work:
        h = self.heads
        dims = (2 + -(-self.tokens // BLOCK_SIZE), h.kv_heads, BLOCK_SIZE, h.head_dim)

        def call(caches: Any, operands: Any) -> tuple[Any, Any]:
            q, *caches_now = write(*caches, operands, HeadNorm(), Scoring(1.0))
            return tuple(caches_now), q

        def empty() -> Any:
            return jnp.zeros(dims, jnp.dtype(self.kv_dtype)), jnp.zeros(dims, jnp.dtype(self.kv_dtype))

        num_copies = copies(self.tokens * h.kv_heads * (h.group + 2) * h.head_dim * BF16)
        return Work(call, empty, [self.inputs(i) for i in range(num_copies)])

    def expected(self) -> Any:
        return self.work("reference").result()


# -- products ----------------------------------------------------------------------------------------------------------


def _product_call(product: Callable[[Any, Any], Any]) -> Callable[[Any, Any], tuple[Any, Any]]:
    """One number of the result goes into the next x: a small kernel, so that the products wait for each other."""

    def call(x: Any, operands: Any) -> tuple[Any, Any]:
        out = product(x, operands)
        return x.at[0, 0].set(out[0, 0]), out

    return call


@dataclass(frozen=True)
class GroupedCase:
    """The up projection of a mixture of experts, for tokens that a random router deals out evenly; bfloat16 rows."""

    model: str
    tokens: int
    num_experts: int
    experts_per_token: int
    depth: int
    columns: int
    weight_dtype: str = "bfloat16"
    goal: Goal = Goal("bandwidth")

    @property
    def op(self) -> str:
        return "grouped matmul"

    @property
    def name(self) -> str:
        return f"{self.model}, {self.tokens} tokens, {self.weight_dtype}"

    @property
    def num_rows(self) -> int:
        return self.tokens * self.experts_per_token

    @property
    def num_bytes(self) -> float:
        read = int((self.group_sizes > 0).sum()) * self.depth * self.columns * jnp.dtype(self.weight_dtype).itemsize
        return read + self.num_rows * (self.depth + self.columns) * BF16

    @property
    def num_flops(self) -> float:
        return 2 * self.num_rows * self.depth * self.columns

    @cached_property
    def group_sizes(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        chosen = [rng.choice(self.num_experts, self.experts_per_token, replace=False) for _ in range(self.tokens)]
        return np.bincount(np.concatenate(chosen), minlength=self.num_experts).astype(np.int32)

    def refusals(self, platform: Platform) -> Mapping[str, str | None]:
        sizes = self.num_experts, self.depth, self.columns
        setting = grouped_matmul.Setting(platform.name, platform.capability, "bfloat16", self.weight_dtype, *sizes)
        return {name: known.refuses(setting) for name, known in dispatch.GROUPED_MATMUL.items()}

    def rows(self) -> Any:
        return random((self.num_rows, self.depth), jnp.bfloat16, 0)

    def weights(self, copy: int = 0) -> Weights:
        values = random((self.num_experts, self.depth, self.columns), self.weight_dtype, copy + 1, self.depth**-0.5)
        if self.weight_dtype not in NARROW:
            return Weights(values)
        scale = self.depth**-0.5 / 73 if self.weight_dtype == "int8" else 1.0  # 73: of evenly drawn -127 to 127
        return Weights(values, jnp.full((self.num_experts, self.columns), scale, jnp.float32))

    def work(self, implementation: str) -> Work:
        known = dispatch.GROUPED_MATMUL[implementation]
        return self.work_of(known.plan, known.product)

    def work_of(self, make_plan: Callable[..., Any], product: Callable[..., Any]) -> Work:
        plan = jax.jit(make_plan, static_argnums=1)(jnp.asarray(self.group_sizes), self.num_rows)
        weights = [(self.weights(i), plan) for i in range(copies(self.weights_bytes))]
        return Work(_product_call(lambda x, operands: product(x, *operands)), self.rows, weights)

    @property
    def weights_bytes(self) -> int:
        return self.num_experts * self.depth * self.columns * jnp.dtype(self.weight_dtype).itemsize

    def expected(self) -> Any:
        """Of one expert after the other: the reference takes, on a GPU, a copy of all rows for each of them."""
        x, weights = self.rows(), self.weights()
        ends = jnp.cumsum(jnp.asarray(self.group_sizes))
        owner = jnp.sum((jnp.arange(self.num_rows)[:, None] >= ends[None]).astype(jnp.int32), axis=1)

        def add(expert: Any, out: Any) -> Any:
            w = weights.values[expert].astype(jnp.float32)
            w = w if weights.scales is None else w * weights.scales[expert][None]
            own = jnp.dot(x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
            return jnp.where((owner == expert)[:, None], own, out)

        start = jnp.zeros((self.num_rows, self.columns), jnp.float32)
        out = jax.jit(lambda: jax.lax.fori_loop(0, self.num_experts, add, start))().astype(x.dtype)
        return x.at[0, 0].set(out[0, 0]), out


@dataclass(frozen=True)
class DequantCase:
    """bfloat16 rows by int8 weights, or by 4 bits in groups of 128."""

    rows: int
    bits: int
    depth: int = 4096
    columns: int = 14336
    goal: Goal = Goal("bandwidth")

    @property
    def op(self) -> str:
        return "dequantising matmul"

    @property
    def name(self) -> str:
        kind = "int8" if self.group is None else f"4 bits, groups of {self.group}"
        return f"{self.rows} rows, {self.depth} × {self.columns}, {kind}"

    @property
    def group(self) -> int | None:
        return None if self.bits == 8 else 128

    @property
    def weights_bytes(self) -> int:
        scales = self.columns * (1 if self.group is None else self.depth // self.group)
        return self.depth * self.columns * self.bits // 8 + scales * FLOAT32

    @property
    def num_bytes(self) -> float:
        return self.weights_bytes + self.rows * (self.depth + self.columns) * BF16

    @property
    def num_flops(self) -> float:
        return 2 * self.rows * self.depth * self.columns

    def refusals(self, platform: Platform) -> Mapping[str, str | None]:
        sizes = self.bits, self.group, self.depth, self.columns
        setting = dequant_matmul.Setting(platform.name, platform.capability, "bfloat16", *sizes)
        return {name: known.refuses(setting) for name, known in dispatch.DEQUANT_MATMUL.items()}

    def weights(self, copy: int = 0) -> dequant_matmul.Weights:
        values = random((self.depth * self.bits // 8, self.columns), jnp.int8, copy + 1)
        if self.group is None:
            return Int8Weights(values, jnp.full((self.columns,), self.depth**-0.5 / 73, jnp.float32))
        packed = jax.lax.bitcast_convert_type(values, jnp.uint8)
        return Int4Weights(
            packed, jnp.full((self.depth // self.group, self.columns), self.depth**-0.5 / 5, jnp.float32)
        )

    def work(self, implementation: str) -> Work:
        return self.work_of(dispatch.DEQUANT_MATMUL[implementation].product)

    def work_of(self, product: Callable[..., Any]) -> Work:
        weights = [self.weights(i) for i in range(copies(self.weights_bytes))]
        return Work(_product_call(product), lambda: random((self.rows, self.depth), jnp.bfloat16, 0), weights)

    def expected(self) -> Any:
        return self.work("reference").result()


# -- tails of logits ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TailsCase:
    """One pass over float32 logits: what reaches each of 15 thresholds."""

    rows: int
    vocab: int
    goal: Goal = Goal("bandwidth")
    thresholds: int = 15

    @property
    def op(self) -> str:
        return "tails of logits"

    @property
    def name(self) -> str:
        return f"{self.rows} rows of {self.vocab}, {self.thresholds} thresholds"

    @property
    def num_bytes(self) -> float:
        return self.rows * self.vocab * FLOAT32

    @property
    def num_flops(self) -> float:
        return 0.0

    def refusals(self, platform: Platform) -> Mapping[str, str | None]:
        setting = sampling.Setting(platform.name, platform.capability)
        return {name: known.refuses(setting) for name, known in dispatch.TAILS.items()}

    def work(self, implementation: str) -> Work:
        known = dispatch.TAILS[implementation]

        def call(thresholds: Any, logits: Any) -> tuple[Any, Any]:
            counts = known.count(logits)(thresholds)
            return thresholds + (counts & 1).astype(jnp.uint32), counts

        logits = [random((self.rows, self.vocab), jnp.float32, i) for i in range(copies(int(self.num_bytes)))]
        return Work(call, self._thresholds, logits)

    def _thresholds(self) -> Any:
        spread = jnp.linspace(-2.0, 4.0, self.thresholds, dtype=jnp.float32)
        return jnp.broadcast_to(sampling.ordered_bits(spread)[None], (self.rows, self.thresholds))

    def expected(self) -> Any:
        return self.work("reference").result()


# -- all of them -------------------------------------------------------------------------------------------------------

PREFILL, GROUPED, WRITE = Goal("flops", 0.6), Goal("flops", 0.6), Goal("bandwidth", 0.7)


def _attention_cases() -> list[Case]:
    whale = Step.decode(1, 128 << 10) + Step.decode(255, 64)
    mixed = Step.decode(63, 2048) + Step((Group(1, 2048, 6144),))
    two_each = [
        AttentionCase("decode 64 × 8k", Step.decode(64, 8192), LLAMA_8B, goal=Goal("bandwidth", 0.85)),
        AttentionCase("decode 1 × 32k", Step.decode(1, 32768), LLAMA_8B, goal=Goal("bandwidth", 0.7)),
        AttentionCase("decode 256 × 1k", Step.decode(256, 1024), LLAMA_8B),
        AttentionCase("decode 128k beside 255 × 64", whale, LLAMA_8B),
        AttentionCase("prefill 8k", Step.prefill(8192), LLAMA_8B, goal=PREFILL),
        AttentionCase("prefill 4 × 2k", Step((Group(4, 2048),)), LLAMA_8B, goal=Goal("flops")),
        AttentionCase("63 × 2k decode, 2k of 8k prompt", mixed, LLAMA_8B, goal=Goal("flops")),
    ]
    fp8 = [replace(case, kv_dtype="float8_e4m3fn") for case in (two_each[0], two_each[4])]
    return [*two_each, *(replace(case, heads=LLAMA_70B_TP8) for case in two_each), *fp8]


def _grouped_cases() -> list[Case]:
    models = {"Mixtral": (8, 2, 4096, 14336), "Qwen3-MoE": (128, 8, 2048, 768)}
    goals = {64: Goal("bandwidth"), 4096: GROUPED}
    cases = [
        GroupedCase(name, tokens, *sizes, goal=goal) for name, sizes in models.items() for tokens, goal in goals.items()
    ]
    narrow = [replace(c, weight_dtype=d) for c in cases if c.model == "Mixtral" for d in ("int8", "float8_e4m3fn")]
    return [*cases, *narrow]


def cases() -> list[Case]:
    """The table of docs/kernels.md."""
    writes = [
        KvWriteCase(64, LLAMA_8B),
        KvWriteCase(8192, LLAMA_8B, goal=WRITE),
        KvWriteCase(8192, LLAMA_8B, qk_norm=True, goal=WRITE),
        KvWriteCase(8192, LLAMA_8B, kv_dtype="float8_e4m3fn", goal=WRITE),
    ]
    goals = {8: Goal("bandwidth"), 4096: Goal("flops")}
    dequant = [DequantCase(rows, bits, goal=goals[rows]) for bits in (8, 4) for rows in goals]
    tails = [TailsCase(rows, 128256) for rows in (8, 64, 256)]
    return [*_attention_cases(), *writes, *_grouped_cases(), *dequant, *tails]


def small_cases() -> list[Case]:
    """Of every op, sizes that an interpreter does in seconds."""
    heads = Heads(1, 2, 16)
    return [
        AttentionCase("decode 2 × 40", Step.decode(2, 40), heads, goal=Goal("bandwidth", 0.85)),
        AttentionCase("decode 30, prefill 20", Step.decode(1, 30) + Step.prefill(20), heads, goal=PREFILL),
        KvWriteCase(24, heads, goal=WRITE),
        GroupedCase("4 experts", 8, 4, 2, 32, 32, goal=GROUPED),
        DequantCase(4, 8, 64, 32),
        DequantCase(4, 4, 128, 32),
        TailsCase(2, 40),
    ]
