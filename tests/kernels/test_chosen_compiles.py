"""What dispatch chooses on a GPU compiles for A100 and H100, through Triton, LLVM and ptxas, and spills no register.

``OPS`` goes through the tables of ``dispatch``: every op, dtype, dtype of caches or weights, head dim and kind of step.
The kernels of a case are compiled as one program; one that several cases have in common, in the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from gpu_kernels import Kernel, failures, kernels_of, mesh_of

from jaxserve import engine_args
from pallas_kernels import dequant_matmul, dispatch, grouped_matmul, mla_attention, paged_attention, sampling
from pallas_kernels.dequant_matmul import DequantMatmul, Int4Weights, Int8Weights
from pallas_kernels.grouped_matmul import GroupedMatmul
from pallas_kernels.grouped_matmul import triton as grouped_triton
from pallas_kernels.kv_write import HeadNorm, Inputs
from pallas_kernels.kv_write import triton as kv_write
from pallas_kernels.mla_attention import MlaAttention, Queries
from pallas_kernels.mla_attention import triton as mla
from pallas_kernels.paged_attention import PagedAttention, Ragged, Scoring, Shape
from pallas_kernels.paged_attention import triton as attention
from pallas_kernels.sampling import Tails
from pallas_kernels.triton_tiles import WIDE
from sharding import aot
from sharding.hardware import GPUS

needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
CHIPS = ("a100", "h100")
"""An H200 has an H100's chip."""
FP8 = "float8_e4m3fn"
NUM_SEQS, TABLE_WIDTH, KV_HEADS = 8, 64, 2
DECODE, MIXED = NUM_SEQS, 256
"""Tokens of a step."""


def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def ragged_of(num_tokens: int) -> Ragged:
    tokens, seqs, tables = array((num_tokens,)), array((NUM_SEQS,)), array((NUM_SEQS, TABLE_WIDTH))
    return Ragged(tokens, array((NUM_SEQS + 1,)), seqs, tables, tokens)


# -- paged attention, with its KV write --------------------------------------------------------------------------------

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
GROUPS = (1, 8)
"""Query heads per KV head besides 4: with them tiles are lower, or higher."""


def attention_cases() -> Iterator[tuple[str, list[paged_attention.Setting]]]:
    """Every head dim, where dtypes are usual. In the others K and V are widened in another way, that is all."""
    for dtype, kv_dtype in product(attention.WIDE_DTYPES, (*attention.WIDE_DTYPES, *attention.NARROW_DTYPES)):
        heads = [(80, 4)]
        if are_usual(dtype, kv_dtype):
            groups = GROUPS if dtype == "bfloat16" and kv_dtype != "int8" else ()
            heads = [(head_dim, 4) for head_dim in HEAD_DIMS] + [(128, group) for group in groups]
        yield f"{dtype}, {kv_dtype} cache", [attention_setting(dtype, kv_dtype, *sizes) for sizes in heads]


def are_usual(dtype: str, kv_dtype: str) -> bool:
    """What models are served with."""
    return kv_dtype == dtype or (dtype == "bfloat16" and kv_dtype in (FP8, "int8"))


def attention_setting(dtype: str, kv_dtype: str, head_dim: int, group: int) -> paged_attention.Setting:
    return paged_attention.Setting("gpu", None, dtype, kv_dtype, head_dim, group, block_size=16)


def attention_kernels(implementation: PagedAttention, setting: paged_attention.Setting) -> Iterator[Kernel]:
    """Of decodes and of prompts, in a layer that sees everything; of some sizes, of prompts with a window too."""
    size, head_dim = setting.block_size, setting.head_dim
    scoring = Scoring(head_dim**-0.5)
    caches = [array(shape, setting.kv_dtype) for shape in implementation.cache_shapes(256, size, KV_HEADS, head_dim)]
    steps = [("decode", DECODE, Shape(size, one_token_each=True)), ("mixed", MIXED, Shape(size))]
    if setting.group == 4 and head_dim in (80, 128):
        steps.append(("mixed, window", MIXED, Shape(size, window=500)))
    for step, num_tokens, shape in steps:
        angles, norm = array((num_tokens, head_dim // 2), jnp.float32), array((head_dim,), setting.dtype)
        qkv = array((num_tokens, KV_HEADS, setting.group + 2, head_dim), setting.dtype)
        inputs = Inputs(qkv, array((num_tokens,)), (angles, angles), (norm, norm))

        def write(k_cache: Any, v_cache: Any, inputs: Inputs, scoring: Scoring = scoring) -> Any:
            return implementation.kv_write.write(k_cache, v_cache, inputs, HeadNorm(1e-6), scoring)

        def attend(q: Any, k_cache: Any, v_cache: Any, plan: Any, shape: Shape = shape) -> Any:
            return implementation.attend(q, k_cache, v_cache, plan, shape, scoring)

        label = f"head dim {head_dim}, {setting.group} heads, {step}:"
        q = array((num_tokens, KV_HEADS, setting.group, head_dim), setting.dtype)
        yield from kernels_of(label, write, *caches, inputs)
        yield from kernels_of(label, attend, q, *caches, attention_plan(implementation.plan, num_tokens, shape))


@cache
def attention_plan(plan: Callable[..., Any], num_tokens: int, shape: Shape) -> Any:
    return jax.eval_shape(lambda ragged: plan(ragged, num_tokens, shape), ragged_of(num_tokens))


# -- latent attention --------------------------------------------------------------------------------------------------

LATENT_DIM, ROPE_DIM, LATENT_BLOCK = 512, 64, 64


def latent_cases() -> Iterator[tuple[str, list[mla_attention.Setting]]]:
    """DeepSeek's sizes; 16 and 128 heads are those of V2-Lite and V3, or of V3 over eight GPUs and one."""
    for dtype, kv_dtype in product(WIDE, (*WIDE, mla.FP8)):
        heads = (16, 128) if are_usual(dtype, kv_dtype) else (16,)
        yield f"{dtype}, {kv_dtype} cache", [latent_setting(dtype, kv_dtype, num_heads) for num_heads in heads]


def latent_setting(dtype: str, kv_dtype: str, num_heads: int) -> mla_attention.Setting:
    return mla_attention.Setting("gpu", None, dtype, kv_dtype, num_heads, LATENT_DIM, ROPE_DIM, LATENT_BLOCK)


def latent_kernels(implementation: MlaAttention, setting: mla_attention.Setting) -> Iterator[Kernel]:
    scoring, heads = Scoring(192**-0.5), setting.num_heads
    widths = setting.latent_dim, setting.rope_dim
    kv_cache = array(mla_attention.cache_shape(512, setting.block_size, *widths), setting.kv_dtype)
    for step, num_tokens, shape in (
        ("decode", DECODE, Shape(setting.block_size, one_token_each=True)),
        ("mixed", MIXED, Shape(setting.block_size)),
    ):

        def run(cache: Any, rows: list[Any], queries: Queries, ragged: Ragged, shape: Shape = shape) -> Any:
            plan = implementation.plan(ragged, queries.latent.shape[0], heads, shape)
            written = implementation.write(cache, rows[0], rows[1], ragged.slot_mapping, scoring)
            return written, implementation.attend(queries, cache, plan, shape, scoring)

        rows = [array((num_tokens, n), setting.dtype) for n in widths]
        queries = Queries(*(array((num_tokens, heads, n), setting.dtype) for n in widths))
        yield from kernels_of(f"{heads} heads, {step}:", run, kv_cache, rows, queries, ragged_of(num_tokens))


# -- products ----------------------------------------------------------------------------------------------------------

FEW_ROWS, MANY_ROWS = 8, 4096


def grouped_cases() -> Iterator[tuple[str, list[grouped_matmul.Setting]]]:
    """Mixtral, Qwen3-MoE, and sizes that no tile divides."""
    for dtype in WIDE:
        for weights in (dtype, *grouped_matmul.NARROW):
            sizes = ((8, 4096, 14336), (128, 2048, 768), (3, 1000, 1400))
            few = sizes[:1] if dtype == "float32" else sizes  # unrolled products take three times as long to compile
            yield f"{dtype} by {weights}", [grouped_setting(dtype, weights, *experts) for experts in few]


def grouped_setting(dtype: str, weights: str, experts: int, depth: int, columns: int) -> grouped_matmul.Setting:
    return grouped_matmul.Setting("gpu", None, dtype, weights, experts, depth, columns)


def grouped_kernels(implementation: GroupedMatmul, setting: grouped_matmul.Setting) -> Iterator[Kernel]:
    experts, depth, columns = setting.num_experts, setting.depth, setting.columns
    narrow = setting.weight_dtype in grouped_matmul.NARROW
    scales = array((experts, columns), jnp.float32) if narrow else None
    weights = grouped_matmul.Weights(array((experts, depth, columns), setting.weight_dtype), scales)
    for num_rows in (FEW_ROWS, MANY_ROWS):

        def run(x: Any, weights: Any, sizes: Any, num_rows: int = num_rows) -> Any:
            return implementation.product(x, weights, implementation.plan(sizes, num_rows))

        x = array((num_rows, depth), setting.dtype)
        label = f"{num_rows} rows, {experts} experts of {depth}x{columns}:"
        yield from kernels_of(label, run, x, weights, array((experts,)))


def dequant_cases() -> Iterator[tuple[str, list[dequant_matmul.Setting]]]:
    """Llama-3.1-8B, and columns that no tile divides."""
    for dtype, group in product(WIDE, (None, *dequant_matmul.GROUPS)):
        bits = "8 bits" if group is None else f"4 bits in groups of {group}"
        sizes = ((4096, 14336),) if dtype == "float32" else ((4096, 14336), (896, 4808))
        yield f"{dtype} by {bits}", [dequant_setting(dtype, group, *weights) for weights in sizes]


def dequant_setting(dtype: str, group: int | None, depth: int, columns: int) -> dequant_matmul.Setting:
    return dequant_matmul.Setting("gpu", None, dtype, 8 if group is None else 4, group, depth, columns)


def dequant_kernels(implementation: DequantMatmul, setting: dequant_matmul.Setting) -> Iterator[Kernel]:
    """Zero points, where weights may have them: with few rows of the one size, and with many of the other."""
    depth, columns = setting.depth, setting.columns
    for num_rows in (FEW_ROWS, MANY_ROWS):
        zeros = setting.group is not None and (num_rows == FEW_ROWS) == (depth == 4096)
        x, weights = array((num_rows, depth), setting.dtype), dequant_weights(setting, zeros)
        label = f"{num_rows} rows, {depth}x{columns}{', zero points' if zeros else ''}:"
        yield from kernels_of(label, implementation.product, x, weights)


def dequant_weights(setting: dequant_matmul.Setting, zeros: bool) -> dequant_matmul.Weights:
    depth, columns = setting.depth, setting.columns
    if setting.group is None:
        return Int8Weights(array((depth, columns), jnp.int8), array((columns,), jnp.float32))
    groups = (depth // setting.group, columns)
    packed, scales = array((depth // 2, columns), jnp.uint8), array(groups, setting.dtype)
    return Int4Weights(packed, scales, array(groups, jnp.int8) if zeros else None)


# -- tails of logits ---------------------------------------------------------------------------------------------------

LOGITS = ((1, 151936), (256, 50257), (256, 128256 // 8), (256, 262144))
"""Rows, and the entries of one: of whole vocabularies, and of one device's part."""


def tails_kernels(implementation: Tails, setting: sampling.Setting) -> Iterator[Kernel]:
    def both(logits: Any, best: Any, thresholds: Any) -> Any:
        return implementation.count(logits)(thresholds), implementation.mass(logits, best)(thresholds)

    for num_rows, vocab in LOGITS:
        thresholds = array((num_rows, 2**implementation.bits - 1), jnp.uint32)
        logits, best = array((num_rows, vocab), jnp.float32), array((num_rows,), jnp.float32)
        yield from kernels_of(f"{num_rows} rows of {vocab}:", both, logits, best, thresholds)


# -- all of it ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """``choose``: of dispatch; ``cases``: of each, in words, the settings, with the GPU left open; ``kernels``: of an
    implementation in a setting."""

    choose: Callable[[Any], Any]
    cases: Mapping[str, Sequence[Any]]
    kernels: Callable[[Any, Any], Iterator[Kernel]]


OPS = {
    "paged attention": Op(dispatch.paged_attention, dict(attention_cases()), attention_kernels),
    "latent attention": Op(dispatch.mla_attention_for, dict(latent_cases()), latent_kernels),
    "grouped matmul": Op(dispatch.grouped_matmul_for, dict(grouped_cases()), grouped_kernels),
    "dequantising matmul": Op(dispatch.dequant_matmul_for, dict(dequant_cases()), dequant_kernels),
    "tails of logits": Op(dispatch.tails_for, {"all sizes": [sampling.Setting("gpu", None)]}, tails_kernels),
}


def refused(chip: str, case: str) -> bool:
    """As dispatch has to say too."""
    return chip == "a100" and FP8 in case


def settings_on(chip: str, op: str, case: str) -> list[Any]:
    return [setting._replace(capability=GPUS[chip].chip.capability) for setting in OPS[op].cases[case]]


@cache
def kernels_on(chip: str, op: str, case: str) -> list[Kernel]:
    with jax.set_mesh(mesh_of(chip)):
        return [
            kernel
            for setting in settings_on(chip, op, case)
            for kernel in OPS[op].kernels(OPS[op].choose(setting), setting)
        ]


def in_every_run(op: str, case: str) -> bool:
    """Of the tests; the others are slow ones."""
    setting = OPS[op].cases[case][0]
    return not hasattr(setting, "kv_dtype") or are_usual(setting.dtype, setting.kv_dtype)


def compiled_before(chip: str, op: str, case: str) -> set[str]:
    """What the cases before this one have, in every run: merging, for one, does not depend on what is merged."""
    cases = list(OPS[op].cases)
    earlier = (other for other in cases[: cases.index(case)] if in_every_run(op, other) and not refused(chip, other))
    return {kernel.program for other in earlier for kernel in kernels_on(chip, op, other)}


def test_every_op_is_here() -> None:
    """That has a kernel. And an H200 is an H100 to the compiler, and attention has all dtypes that can be asked for."""
    only_xla = [op for op, platforms in dispatch.BEST.items() if platforms.get("gpu", ()) in ((), ("reference",))]
    assert {*OPS, *only_xla} == set(dispatch.BEST) and not {*OPS} & {*only_xla}
    assert replace(GPUS["h200"].chip, name="") == replace(GPUS["h100"].chip, name="")
    settings = [setting for cases in OPS["paged attention"].cases.values() for setting in cases]
    assert {s.dtype for s in settings} >= set(engine_args.DTYPES) - {"auto"}
    assert {s.kv_dtype for s in settings} | {"fp8"} >= set(engine_args.KV_DTYPES) - {"auto"}
    assert set(attention.NARROW_DTYPES) | set(WIDE) == set(kv_write.SUPPORTED_KV_DTYPES)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chip", CHIPS)
def test_a_kernel_is_chosen(chip: str, op: str) -> None:
    """Triton's, and not XLA's, wherever the hardware reads the dtype."""
    for case in OPS[op].cases:
        for setting in settings_on(chip, op, case):
            if refused(chip, case):
                with pytest.raises(ValueError, match=r"triton: .*8\.9"):
                    OPS[op].choose(setting)
            else:
                assert OPS[op].choose(setting).name == "triton"


def may_spill(op: str, setting: Any) -> bool:
    """Products of float32, which no tensor core does and Triton unrolls: of matmuls, and of latent attention with a
    cache of less. Paged attention has tiles for them. And, of jax 0.12, few rows by 4 bits in groups under 128."""
    if op == "dequantising matmul" and setting.group in (32, 64):
        return True
    if "matmul" in op:
        return setting.dtype == "float32"
    if op != "latent attention":
        return False
    dtype, kv_dtype = jnp.dtype(setting.dtype), jnp.dtype(setting.kv_dtype)
    return attention.operand_dtype(dtype, kv_dtype) == jnp.float32 and kv_dtype != jnp.float32


def runs() -> Iterator[Any]:
    for chip, op in product(CHIPS, OPS):
        for case in OPS[op].cases:
            if not refused(chip, case):
                marks = () if in_every_run(op, case) else pytest.mark.slow
                yield pytest.param(chip, op, case, id=f"{chip}-{op}-{case}", marks=marks)


@needs_compiler
@pytest.mark.parametrize(("chip", "op", "case"), list(runs()))
def test_it_compiles_without_spills(chip: str, op: str, case: str) -> None:
    before = compiled_before(chip, op, case)
    kernels = {kernel.program: kernel for kernel in kernels_on(chip, op, case) if kernel.program not in before}
    assert failures(chip, list(kernels.values()), may_spill(op, OPS[op].cases[case][0])) == {}


@needs_compiler
@pytest.mark.parametrize(("kv_dtype", "head_dims"), [("bfloat16", (64, 128, 256)), (FP8, (128,))])
def test_a_gpu_with_little_shared_memory(kv_dtype: str, head_dims: Sequence[int]) -> None:
    """An L40S: a block has 99 KiB."""
    capability = GPUS["l40s"].chip.capability
    for head_dim in head_dims:
        setting = attention_setting("bfloat16", kv_dtype, head_dim, 4)._replace(capability=capability)
        assert "99" in str(attention.IMPLEMENTATION.refuses(setting))
        chosen = dispatch.paged_attention(setting)
        assert chosen.name == "triton_small"
        assert planted("paged attention", chosen, "l40s", setting) == {}
    with pytest.raises(ValueError, match="99"):
        dispatch.mla_attention_for(latent_setting("bfloat16", "bfloat16", 16)._replace(capability=capability))


# -- faults ------------------------------------------------------------------------------------------------------------


def planted(op: str, implementation: Any, chip: str, setting: Any) -> dict[str, str]:
    """What the test above would have found, had dispatch chosen this implementation."""
    with jax.set_mesh(mesh_of(chip)):
        kernels = list(OPS[op].kernels(implementation, setting))
    return failures(chip, kernels)


@needs_compiler
def test_too_much_shared_memory_is_noticed() -> None:
    """Four steps of 136 KiB under way."""
    tiles = grouped_triton.Tiles(16, 256, 256, num_warps=8, num_stages=4)
    found = planted(
        "grouped matmul",
        grouped_triton.implementation("greedy", grouped_triton.refuses, tiles),
        "a100",
        grouped_setting("bfloat16", "bfloat16", 128, 4096, 768),
    )
    assert len(found) == 2 and all("hared memory" in reason for reason in found.values()), found


@needs_compiler
def test_a_dtype_that_triton_cannot_is_noticed() -> None:
    """Dispatch refuses it: the kernel of an A100 that writes fp8, and the one that reads it."""
    found = planted("paged attention", attention.IMPLEMENTATION, "a100", attention_setting("bfloat16", FP8, 128, 4))
    assert any("kv_write" in name for name in found) and any("attend" in name for name in found), found


@needs_compiler
def test_spills_are_noticed() -> None:
    """Tiles of 128 rows of 128 numbers in 4 warps are too much: of seven kernels the two for prompts."""
    tiling = attention.Tiling()
    large = replace(tiling, many=replace(tiling.many, tile=attention.Tile(2, 64, 4, 3)))
    implementation = attention.implementation("large", attention.refuses, large)
    found = planted("paged attention", implementation, "h100", attention_setting("bfloat16", "bfloat16", 128, 4))
    assert len(found) == 2 and all("register spilling" in reason for reason in found.values()), found
