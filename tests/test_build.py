"""How much KV memory an engine takes, and what it says when there is too little."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_models import SMALL

from jaxserve import LLM
from jaxserve.build import GPU_RESERVE_BYTES, blocks_that_fit, kv_bytes_on_gpu, step_bytes
from jaxserve.config import GIB, decode_buckets, token_buckets
from jaxserve.runner import ModelRunner
from pallas_kernels.dispatch import PAGED_ATTENTION

BLOCK_BYTES = 2 * 2 * 4 * 2 * 8 * 4
"""K and V, 2 layers, 4 tokens, 2 KV heads of 8 float32 numbers: a block of ``odd_model``."""


def num_blocks(directory: Path, **options: object) -> int:
    settings = {**SMALL, "num_gpu_blocks_override": None, **options}
    return LLM(directory, skip_tokenizer_init=True, use_tqdm_on_load=False, **settings).engine.runner.num_blocks[0]


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are told how many blocks they have, and compile nothing."""

    def note(runner: ModelRunner, num_blocks: tuple[int, ...], *_: object, **__: object) -> None:
        runner.num_blocks = num_blocks

    monkeypatch.setattr(ModelRunner, "warm_up", note)


@pytest.mark.usefixtures("cold")
def test_kv_cache_memory_bytes_is_what_the_blocks_take(odd_model: Path) -> None:
    assert num_blocks(odd_model, kv_cache_memory_bytes=50 * BLOCK_BYTES + 7) == 50


@pytest.mark.usefixtures("cold")
def test_no_more_blocks_than_could_be_used(odd_model: Path) -> None:
    """Four sequences of 128 tokens in blocks of four, and the null block."""
    assert num_blocks(odd_model) == 1 + 4 * 128 // 4


@pytest.mark.usefixtures("cold")
def test_a_cache_that_holds_nothing_is_refused_with_the_numbers(odd_model: Path) -> None:
    with pytest.raises(ValueError, match=rf"{BLOCK_BYTES:,}.*at least 2|kv_cache_memory_bytes leaves"):
        num_blocks(odd_model, kv_cache_memory_bytes=BLOCK_BYTES)


@pytest.mark.parametrize(("elements", "reached"), [(0.9, 0.9), (1.5, 1.0), (2.5, 2.5)])
def test_no_more_blocks_than_kernels_reach(tiny_llm: LLM, elements: float, reached: float) -> None:
    """Of 8 bits between 2 and 4 GiB a layer, which Triton's offsets do not; times 2**31 keys of a layer."""
    runner, attention = copy(tiny_llm.engine.runner), PAGED_ATTENTION["triton"]
    runner.config = replace(runner.config, kv_dtype=jnp.dtype(jnp.float8_e4m3fn))
    runner.kernels = runner.kernels._replace(attention=attention)
    limits = replace(tiny_llm.engine.scheduler.config, max_num_seqs=2**40, max_num_batched_tokens=2**40)
    block = 4 * 2 * 8  # tokens, heads, numbers
    found = blocks_that_fit(runner, limits, int(elements * 2**31) * runner.decoder.num_layers * 2)
    assert found == int(reached * 2**31) // block
    assert attention.addresses(found * block, found * block)


def test_what_a_gpu_has_left() -> None:
    assert kv_bytes_on_gpu(80 * GIB, 0.9, 20 * GIB) == 72 * GIB - 20 * GIB - GPU_RESERVE_BYTES
    assert kv_bytes_on_gpu(16 * GIB, 0.9, 20 * GIB) == 0


def test_the_step_says_what_it_needs(make_llm: Callable[..., LLM], odd_model: Path) -> None:
    """Weights, sampler rows, and a little for the step: independent of the number of blocks."""
    runner = make_llm(odd_model).engine.runner
    weights = sum(x.nbytes for x in jax.tree.leaves(runner.params))
    rows = 2 * 4 * 4 * runner.decoder.vocab_size
    runner.warm = False
    try:
        few, many = step_bytes(runner, 21), step_bytes(runner, 130)
    finally:
        runner.warm = True
    assert weights + rows < few < weights + rows + (1 << 20)
    assert abs(many - few) < 4096


def test_buckets_cover_every_size() -> None:
    assert decode_buckets(1) == (1,)
    assert decode_buckets(64) == (1, 2, 4, 8, 16, 24, 32, 48, 64)
    assert decode_buckets(20) == (1, 2, 4, 8, 16, 20)
    assert token_buckets(512) == (64, 96, 128, 192, 256, 384, 512)
    assert token_buckets(40) == (40,)
