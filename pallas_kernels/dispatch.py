"""(op, setting) -> implementation. A choice that cannot run raises; nothing is replaced in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from pallas_kernels import dequant_matmul, grouped_matmul, matmul, mla_attention, sampling
from pallas_kernels.dequant_matmul import DequantMatmul
from pallas_kernels.dequant_matmul import reference as dequant_reference
from pallas_kernels.dequant_matmul import triton as dequant_triton
from pallas_kernels.grouped_matmul import GroupedMatmul
from pallas_kernels.grouped_matmul import mosaic as grouped_mosaic
from pallas_kernels.grouped_matmul import reference as grouped_reference
from pallas_kernels.grouped_matmul import triton as grouped_triton
from pallas_kernels.matmul import Matmul
from pallas_kernels.matmul import native as matmul_native
from pallas_kernels.matmul import reference as matmul_reference
from pallas_kernels.mla_attention import MlaAttention
from pallas_kernels.mla_attention import reference as mla_reference
from pallas_kernels.mla_attention import triton as mla_triton
from pallas_kernels.paged_attention import PagedAttention, Setting, cpu, mosaic, native, reference, triton
from pallas_kernels.sampling import Tails
from pallas_kernels.sampling import reference as tails_reference
from pallas_kernels.sampling import triton as tails_triton


class Implementation(Protocol):
    """Of any op. Its setting has a ``platform``: cpu or gpu."""

    @property
    def name(self) -> str: ...

    @property
    def refuses(self) -> Callable[[Any], str | None]:
        """Why it cannot run in a setting, if so."""
        ...


def _by_name[I: Implementation](*implementations: I) -> dict[str, I]:
    return {implementation.name: implementation for implementation in implementations}


PAGED_ATTENTION: Mapping[str, PagedAttention] = _by_name(
    reference.IMPLEMENTATION,
    cpu.IMPLEMENTATION,
    native.IMPLEMENTATION,
    triton.IMPLEMENTATION,
    triton.SMALL_IMPLEMENTATION,
    triton.INTERPRETED,
    mosaic.IMPLEMENTATION,
)
MATMUL: Mapping[str, Matmul] = _by_name(matmul_reference.IMPLEMENTATION, matmul_native.IMPLEMENTATION)
MLA_ATTENTION: Mapping[str, MlaAttention] = _by_name(
    mla_reference.IMPLEMENTATION, mla_triton.IMPLEMENTATION, mla_triton.INTERPRETED
)
GROUPED_MATMUL: Mapping[str, GroupedMatmul] = _by_name(
    grouped_reference.IMPLEMENTATION,
    grouped_triton.IMPLEMENTATION,
    grouped_triton.INTERPRETED,
    grouped_mosaic.IMPLEMENTATION,
)
DEQUANT_MATMUL: Mapping[str, DequantMatmul] = _by_name(
    dequant_reference.IMPLEMENTATION, dequant_triton.IMPLEMENTATION, dequant_triton.INTERPRETED
)
TAILS: Mapping[str, Tails] = _by_name(
    tails_reference.IMPLEMENTATION, tails_reference.WIDE, tails_triton.IMPLEMENTATION, tails_triton.INTERPRETED
)

BEST: Mapping[str, Mapping[str, Sequence[str]]] = {
    "paged attention": {"cpu": ("native", "cpu"), "gpu": ("triton", "triton_small")},
    "matrix product": {"cpu": ("native", "reference"), "gpu": ("reference",)},
    "latent attention": {"cpu": ("reference",), "gpu": ("triton",)},
    "grouped matmul": {"cpu": ("reference",), "gpu": ("triton",)},
    "dequantising matmul": {"cpu": ("reference",), "gpu": ("triton",)},
    "tails of logits": {"cpu": ("reference",), "gpu": ("triton", "wide reference")},
}
"""Of each op and platform, the best first: the first that does not refuse runs. Those in Mosaic GPU, for Hopper alone,
come first once they have been timed there."""


def paged_attention(setting: Setting, backend: str | None = None) -> PagedAttention:
    """The ``backend`` that is asked for, or the best for the setting; ValueError says why there is none."""
    return _choose("paged attention", PAGED_ATTENTION, setting, backend)


def matmul_for(setting: matmul.Setting, backend: str | None = None) -> Matmul:
    """As ``paged_attention``."""
    return _choose("matrix product", MATMUL, setting, backend)


def mla_attention_for(setting: mla_attention.Setting, backend: str | None = None) -> MlaAttention:
    """As ``paged_attention``."""
    return _choose("latent attention", MLA_ATTENTION, setting, backend)


def grouped_matmul_for(setting: grouped_matmul.Setting, backend: str | None = None) -> GroupedMatmul:
    """As ``paged_attention``."""
    return _choose("grouped matmul", GROUPED_MATMUL, setting, backend)


def dequant_matmul_for(setting: dequant_matmul.Setting, backend: str | None = None) -> DequantMatmul:
    """As ``paged_attention``."""
    return _choose("dequantising matmul", DEQUANT_MATMUL, setting, backend)


def tails_for(setting: sampling.Setting, backend: str | None = None) -> Tails:
    """As ``paged_attention``."""
    return _choose("tails of logits", TAILS, setting, backend)


def _choose[I: Implementation](op: str, known: Mapping[str, I], setting: Any, backend: str | None) -> I:
    if backend is not None and backend not in known:
        raise ValueError(f"{op} {backend!r} does not exist; there are {', '.join(known)}")
    names: Iterable[str] = BEST[op].get(setting.platform, ()) if backend is None else (backend,)
    refused = {}
    for name in names:
        refused[name] = known[name].refuses(setting)
        if refused[name] is None:
            return known[name]
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items()) or f"none is for {setting.platform!r}"
    others = ", ".join(name for name in known if name not in refused)
    raise ValueError(f"no {op} for {setting._asdict()}: {reasons}; there are besides: {others}")
