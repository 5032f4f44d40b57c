"""(op, backend) -> implementation. A choice that cannot run raises; nothing is replaced in silence."""

from __future__ import annotations

from pallas_kernels.paged_attention import PagedAttention, cpu, reference

PAGED_ATTENTION = {impl.name: impl for impl in (reference.IMPLEMENTATION, cpu.IMPLEMENTATION)}

DEFAULTS = {"cpu": "cpu", "gpu": "reference"}
"""Backend of each platform when the user names none."""


def paged_attention(platform: str, backend: str | None = None) -> PagedAttention:
    """The paged attention for ``platform`` ("cpu" or "gpu"): its default, or the ``backend`` that is asked for."""
    name = backend or DEFAULTS.get(platform)
    if name not in PAGED_ATTENTION:
        raise ValueError(
            f"attention backend {backend!r} on platform {platform!r} does not exist; "
            f"backends: {', '.join(PAGED_ATTENTION)}; platforms: {', '.join(DEFAULTS)}"
        )
    return PAGED_ATTENTION[name]
