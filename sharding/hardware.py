"""What GPUs and the links between them can do. Figures of data sheets, each with its source, and what of them is
reached in practice.

Bandwidths are bytes per second in one direction, per GPU; peaks are dense FLOP/s (data sheets print twice as much,
"with sparsity").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from sharding.mesh import MESH_AXES, MeshConfig

MIB = 1 << 20
GIB = 1 << 30
GB = 10**9
TERA = 10**12
MICROSECOND = 1e-6

COMPUTE_FRACTION = 0.7
"""Of the peak, by the products of a whole layer. Large bfloat16 products alone reach about 0.8 of it on an H100 (750 to
790 TFLOP/s), where power limits the clock; smaller ones and the elementwise work between them get less."""
MEMORY_FRACTION = 0.8
"""Of the memory bandwidth, by products that stream weights. A plain copy reaches 0.9 of it (3.0 of 3.35 TB/s, H100)."""
LINK_FRACTION = 0.8
"""Of a link's bandwidth, by collectives. NCCL's large all-reduces: 360 to 370 GB/s of 450 on 8 H100 without in-switch
reduction ("How to Scale Your Model", chapter on GPUs), 230 to 250 GB/s of 300 on 8 A100 (nccl-tests)."""
COLLECTIVE_SECONDS = 6.6 * MICROSECOND
"""What starting a collective costs before the first byte moves. NCCL's tuning model (``src/graph/tuning.cc``, ring, LL
protocol) has this base latency."""


@dataclass(frozen=True)
class Link:
    """How GPUs reach each other: bandwidth of one GPU in one direction, and seconds of one step (a hop)."""

    name: str
    bandwidth: float
    latency: float

    @property
    def achievable(self) -> float:
        return self.bandwidth * LINK_FRACTION


NVLINK3 = Link("NVLink 3", 300 * GB, 0.6 * MICROSECOND)
"""600 GB/s both directions (A100 data sheet). Latency: NCCL's tuning model, NVLink, ring, LL; so for all NVLinks."""
NVLINK4 = Link("NVLink 4", 450 * GB, 0.6 * MICROSECOND)
"""900 GB/s both directions (H100 and H200 data sheets)."""
NVLINK5 = Link("NVLink 5", 900 * GB, 0.6 * MICROSECOND)
"""1.8 TB/s both directions (HGX B200 data sheet)."""
PCIE4 = Link("PCIe 4 x16", 32 * GB, 1.0 * MICROSECOND)
"""64 GB/s both directions (L40S data sheet). Latency: NCCL's tuning model, PCI, ring, LL; so for PCIe 5."""
PCIE5 = Link("PCIe 5 x16", 64 * GB, 1.0 * MICROSECOND)
"""128 GB/s both directions (H100 data sheet)."""
INFINIBAND_HDR = Link("InfiniBand 200 Gb/s", 25 * GB, 2.7 * MICROSECOND)
"""One 200 Gb/s adapter per GPU (DGX A100 data sheet). Latency: NCCL's tuning model, NET, ring, LL; so for NDR."""
INFINIBAND_NDR = Link("InfiniBand 400 Gb/s", 50 * GB, 2.7 * MICROSECOND)
"""One ConnectX-7 400 Gb/s adapter per GPU (data sheets of DGX H100, H200 and B200)."""


@dataclass(frozen=True)
class Chip:
    """What a compiler asks of a GPU. Per capability: the CUDA programming guide's table of technical specifications."""

    name: str
    """As the driver calls it."""
    capability: tuple[int, int]
    num_sms: int
    clock_ghz: float
    """Boost."""
    l2_bytes: int
    fp32_units: int = 128
    """Of one SM."""
    shared_bytes: int = 228 << 10
    """Of one SM; a block may ask for all but 1 KiB."""
    threads: int = 2048
    """Of one SM."""


A100 = Chip("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 40 * MIB, fp32_units=64, shared_bytes=164 << 10)
"""NVIDIA A100 white paper."""
H100 = Chip("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 50 * MIB)
"""NVIDIA H100 white paper (SXM5)."""
H200 = Chip("NVIDIA H200", (9, 0), 132, 1.98, 50 * MIB)
"""The H100's chip."""
B200 = Chip("NVIDIA B200", (10, 0), 148, 1.965, 132_644_864)
"""What the driver reports: OpenXLA's ``target_config/specs/b200.txtpb``, which agrees with the above for the others."""
L40S = Chip("NVIDIA L40S", (8, 9), 142, 2.52, 96 * MIB, shared_bytes=100 << 10, threads=1536)
"""NVIDIA L40S data sheet and Ada white paper."""


@dataclass(frozen=True)
class Gpu:
    """One GPU type, and the links of the machines that it comes in."""

    name: str
    memory_bytes: int
    """As the driver reports it (``nvidia-smi``); data sheets round."""
    memory_bandwidth: float
    peak_flops: Mapping[str, float] = field(hash=False)
    """By dtype. float32 products run as TF32, which keeps 10 bits of the mantissa; full float32 is 8 to 16 times
    slower on these GPUs."""
    intra: Link
    """Between GPUs of one host."""
    inter: Link
    """Between hosts."""
    chip: Chip
    most_per_host: int = 8

    def link(self, name: str) -> Link:
        """That mesh files call nvlink, pcie or infiniband; ValueError if this GPU does not come with it."""
        pcie = PCIE5 if self.chip.capability >= (9, 0) else PCIE4
        found = {"nvlink": self.intra, "pcie": pcie, "infiniband": self.inter}[name]
        if name == "nvlink" and self.intra.name == pcie.name:
            raise ValueError(f"links: {self.name} has no nvlink; it has pcie and infiniband")
        return found

    def flops(self, dtype: str) -> float:
        """Achievable FLOP/s; ValueError lists the dtypes that this GPU computes in."""
        if dtype not in self.peak_flops:
            raise ValueError(f"{self.name} does not compute in {dtype}; it does in {', '.join(self.peak_flops)}")
        return self.peak_flops[dtype] * COMPUTE_FRACTION

    @property
    def achievable_bandwidth(self) -> float:
        return self.memory_bandwidth * MEMORY_FRACTION


def _peaks(half: float, tf32: float, int8: float, fp8: float | None) -> Mapping[str, float]:
    peaks = {"bfloat16": half, "float16": half, "float32": tf32, "int8": int8}
    return {name: x * TERA for name, x in (peaks | ({} if fp8 is None else {"float8": fp8})).items()}


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 80GB data sheet (SXM4): 2,039 GB/s, 312 TFLOP/s, TF32 156, INT8 624; no FP8. 81,920 MiB.
        Gpu("a100", 81_920 * MIB, 2_039 * GB, _peaks(312, 156, 624, None), NVLINK3, INFINIBAND_HDR, A100),
        # NVIDIA H100 data sheet (SXM5), without sparsity: 3.35 TB/s, 989 TFLOP/s, TF32 494, FP8 and INT8 1,979.
        # 81,559 MiB.
        Gpu("h100", 81_559 * MIB, 3_350 * GB, _peaks(989, 494, 1_979, 1_979), NVLINK4, INFINIBAND_NDR, H100),
        # NVIDIA H200 data sheet (SXM5): the H100's compute, 4.8 TB/s. 143,771 MiB.
        Gpu("h200", 143_771 * MIB, 4_800 * GB, _peaks(989, 494, 1_979, 1_979), NVLINK4, INFINIBAND_NDR, H200),
        # NVIDIA HGX B200 data sheet, per GPU at 1,000 W, without sparsity: 2,250 TFLOP/s, TF32 1,100, FP8 and INT8
        # 4,500; 8 TB/s. 183,359 MiB.
        Gpu("b200", 183_359 * MIB, 8_000 * GB, _peaks(2_250, 1_100, 4_500, 4_500), NVLINK5, INFINIBAND_NDR, B200),
        # NVIDIA L40S data sheet, without sparsity: 864 GB/s, 362 TFLOP/s, TF32 183, FP8 and INT8 733; no NVLink.
        # 46,068 MiB. Servers differ in their network: 200 Gb/s per GPU is an assumption.
        Gpu("l40s", 46_068 * MIB, 864 * GB, _peaks(362, 183, 733, 733), PCIE4, INFINIBAND_HDR, L40S),
    )
}


def find_gpu(name: str) -> Gpu:
    """By name, whatever its case and with or without the form factor ("H100-SXM"); ValueError lists what there is."""
    short = re.sub(r"[-_ ]?(sxm\d?|pcie|\d+gb)", "", name.strip().lower())
    if short not in GPUS:
        raise ValueError(f"GPU {name!r} is not known; known: {', '.join(GPUS)}")
    return GPUS[short]


@dataclass(frozen=True)
class Span:
    """The ranks of a group that communicates: how many, and how many of them share a host."""

    size: int
    per_host: int
    intra: Link
    inter: Link

    @property
    def hosts(self) -> int:
        return self.size // self.per_host


@dataclass(frozen=True)
class Cluster:
    """Hosts that are alike."""

    gpu: Gpu
    gpus_per_host: int
    hosts: int = 1

    @classmethod
    def parse(cls, text: str, hosts: int | None = None) -> Cluster:
        """Read "8xh200" or "h200:8"; a number of GPUs above a host's most is spread over hosts unless ``hosts`` says
        how many have that number each."""
        count, name = _count_and_name(text)
        gpu = find_gpu(name)
        most = gpu.most_per_host
        if hosts is None:
            if count > most and count % most:
                raise ValueError(f"GPUs {text!r}: more than {most} are spread over hosts of {most} each")
            return cls(gpu, min(count, most), max(1, count // most))
        if count > most or hosts < 1:
            raise ValueError(
                f"{hosts} hosts of {count} × {gpu.name}: a host has 1 to {most}, and there is at least one"
            )
        return cls(gpu, count, hosts)

    @property
    def num_gpus(self) -> int:
        return self.gpus_per_host * self.hosts

    @property
    def intra(self) -> Link:
        return self.gpu.intra

    @property
    def inter(self) -> Link:
        return self.gpu.inter

    def span(self, mesh: MeshConfig, axes: tuple[str, ...]) -> Span:
        """Where the ranks along ``axes`` lie, devices being in the mesh's order (tp varies fastest). An axis goes over
        the link that the mesh names for it, else over this cluster's; several over the slowest of theirs."""
        size = per_host = 1
        inside, between = [], []
        for axis in axes:
            ranks = getattr(mesh, axis)
            stride = prod(getattr(mesh, name) for name in MESH_AXES[MESH_AXES.index(axis) + 1 :])
            here = _ranks_per_host(ranks, stride, self.gpus_per_host)
            size, per_host = size * ranks, per_host * here
            named = dict(mesh.links).get(axis)
            if here > 1:
                inside.append(self.gpu.link(named) if named else self.intra)
            if ranks > here:
                between.append(self.gpu.link(named) if named else self.inter)
        return Span(size, per_host, _slowest(inside, self.intra), _slowest(between, self.inter))

    def __str__(self) -> str:
        per_host = f"{self.gpus_per_host} × {self.gpu.name}"
        return per_host if self.hosts == 1 else f"{self.hosts} hosts of {per_host}"


def _count_and_name(text: str) -> tuple[int, str]:
    first = re.fullmatch(r"\s*(\d+)\s*[x×*]\s*(\S+)\s*", text)
    last = re.fullmatch(r"\s*([^\s:]+)\s*(?::\s*(\d+))?\s*", text)
    if first:
        count, name = int(first[1]), first[2]
    elif last:
        count, name = int(last[2] or 1), last[1]
    else:
        raise ValueError(f'GPUs {text!r}: write "8xh200" or "h200:8"')
    if count < 1:
        raise ValueError(f"GPUs {text!r}: there is at least one")
    return count, name


def _slowest(links: list[Link], otherwise: Link) -> Link:
    return min(links, key=lambda link: link.bandwidth, default=otherwise)


def _ranks_per_host(size: int, stride: int, gpus_per_host: int) -> int:
    """Ranks ``stride`` devices apart that share a host. Groups that straddle hosts at odd places count as one rank per
    host: their collectives go at the pace of the slow link."""
    if gpus_per_host % (size * stride) == 0:
        return size
    whole = gpus_per_host // stride
    return whole if gpus_per_host % stride == 0 and size % whole == 0 else 1
