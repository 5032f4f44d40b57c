"""(op, setting) -> implementation. A choice that cannot run raises; nothing is replaced in silence."""

from __future__ import annotations

from pallas_kernels.paged_attention import PagedAttention, Setting, cpu, reference, triton

PAGED_ATTENTION = {
    impl.name: impl
    for impl in (reference.IMPLEMENTATION, cpu.IMPLEMENTATION, triton.IMPLEMENTATION, triton.INTERPRETED)
}

DEFAULTS = {"cpu": ("cpu",), "gpu": ("reference",)}
"""Of each platform, the best first: the first that does not refuse runs."""


def paged_attention(setting: Setting, backend: str | None = None) -> PagedAttention:
    """The ``backend`` that is asked for, or the best for the setting; ValueError says why there is none."""
    if backend is not None and backend not in PAGED_ATTENTION:
        raise ValueError(f"attention backend {backend!r} does not exist; there are {', '.join(PAGED_ATTENTION)}")
    names = DEFAULTS.get(setting.platform, ()) if backend is None else (backend,)
    refused = {}
    for name in names:
        implementation = PAGED_ATTENTION[name]
        refused[name] = implementation.refuses(setting)
        if refused[name] is None:
            return implementation
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items()) or f"none is for {setting.platform!r}"
    others = ", ".join(name for name in PAGED_ATTENTION if name not in refused)
    raise ValueError(f"no paged attention for {setting._asdict()}: {reasons}; attention backends besides: {others}")
