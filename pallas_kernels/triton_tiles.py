"""What kernels in Pallas's Triton style share: tiles of matrices, products, and how far offsets reach."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

SMALLEST = 16
"""Rows, columns or depth of the smallest product that a tensor core does."""
WIDE = ("float32", "bfloat16", "float16")


def addresses(num_elements: int, num_bytes: int) -> bool:
    """jax's Triton lowering computes offsets in 32 bits, of which one is the sign, for arrays of up to 2**32 bytes."""
    return num_elements <= 1 << 31 or num_bytes > 1 << 32


def check_offsets(cache: Array) -> None:
    """Raises ValueError for a cache that has elements which a kernel cannot address."""
    if not addresses(cache.size, cache.nbytes):
        raise ValueError(
            f"a cache of {cache.nbytes:,} bytes of {cache.dtype} has elements that a Triton kernel cannot address; "
            f"take at most {1 << 31:,} or more than {1 << 32:,} bytes per layer"
        )


def lacks_shared_memory(capability: tuple[int, int] | None, needed: int) -> str | None:
    """Why programs that need so many KiB cannot run there. CUDA programming guide, table of technical specifications:
    the most that a block may have."""
    most = {(8, 0): 163, (8, 7): 163}.get(
        capability or (0, 0), 227 if (9, 0) <= (capability or (0, 0)) < (12, 0) else 99
    )
    return None if needed <= most else f"a program needs {needed} KiB of shared memory, and there are {most}"


def power_of_two(n: int) -> int:
    """The next, but at least what a tensor core takes."""
    return max(SMALLEST, 1 << (n - 1).bit_length())


def load_tile(
    ref: Any, first: tuple[Any, Any], shape: tuple[int, int], ends: tuple[Any, Any], leading: tuple[Any, ...] = ()
) -> Array:
    """``shape`` of ref[*leading] from ``first``; zero from ``ends`` on, where None means that it is not reached."""
    part = ref.at[*leading, pl.ds(first[0], shape[0]), pl.ds(first[1], shape[1])]
    mask = _inside(first, shape, ends)
    return plt.load(part) if mask is None else plt.load(part, mask=mask, other=jnp.zeros((), ref.dtype))


def store_tile(
    ref: Any, tile: Array, first: tuple[Any, Any], ends: tuple[Any, Any], leading: tuple[Any, ...] = ()
) -> None:
    """The reverse: what lies from ``ends`` on is left alone."""
    part = ref.at[*leading, pl.ds(first[0], tile.shape[0]), pl.ds(first[1], tile.shape[1])]
    plt.store(part, tile.astype(ref.dtype), mask=_inside(first, tile.shape, ends))


def _inside(first: tuple[Any, Any], shape: tuple[int, ...], ends: tuple[Any, Any]) -> Array | None:
    masks = [
        jax.lax.broadcast_in_dim(start + jnp.arange(shape[axis]) < end, shape, (axis,))
        for axis, (start, end) in enumerate(zip(first, ends, strict=True))
        if end is not None
    ]
    return None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1]


def uneven(size: int, step: int) -> int | None:
    """The end to mask at; None if steps end there anyway."""
    return size if size % step else None


def dot(x: Array, w: Array) -> Array:
    """In float32. Of float32 operands all bits count: by default a tensor core takes 10 of the mantissa's."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, w, precision=precision, preferred_element_type=jnp.float32)


def place(program: Array, num_tiles: int, num_columns: int, band: int) -> tuple[Array, Array]:
    """Row tile and column tile of a program: bands of row tiles, through each of which columns are walked."""
    first = program // (band * num_columns) * band
    height = jnp.minimum(num_tiles - first, band)
    within = program - first * num_columns
    return first + within % height, within // height
