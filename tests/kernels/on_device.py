"""The device that kernels are tested on: a CPU through the interpreters, or with JAXSERVE_TEST_PLATFORM=gpu the GPU
itself, with what is compiled for it."""

from __future__ import annotations

import jax

PLATFORM = jax.default_backend()
INTERPRET = PLATFORM == "cpu"


def _capability() -> tuple[int, int] | None:
    if INTERPRET:
        return None
    major, _, minor = str(jax.devices()[0].compute_capability).partition(".")
    return int(major), int(minor)


CAPABILITY = _capability()
