"""Which versions of jax compile the kernels in Mosaic GPU."""

from __future__ import annotations

import jax

COMPILES = jax.__version_info__ < (0, 12)


def refusal() -> str | None:
    """From 0.12 on Mosaic does not store an accumulator where banks of shared memory would conflict, and gives up."""
    return None if COMPILES else f"with jax {jax.__version__} Mosaic does not compile it; it does with 0.11"
