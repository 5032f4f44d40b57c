"""The arguments of an engine: what can be asked for, checked before anything is loaded. No jax here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict, Unpack

from jaxserve.config import FairnessConfig, PreemptionMode, check_types
from jaxserve.placement import check as check_placement

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES = (*DTYPES, "fp8")
LOAD_FORMATS = ("auto", "safetensors", "orbax", "dummy")


class EngineOptions(TypedDict, total=False):
    """Keyword arguments of ``LLM`` besides the model; ``EngineArgs`` documents them."""

    tokenizer: str | Path | None
    revision: str | None
    trust_remote_code: bool
    hf_overrides: Mapping[str, Any] | None
    skip_tokenizer_init: bool
    served_model_name: str | None
    load_format: str
    dtype: str
    seed: int
    mesh: Any
    tensor_parallel_size: int
    pipeline_parallel_size: int
    data_parallel_size: int
    decode_context_parallel_size: int
    enable_expert_parallel: bool
    max_model_len: int | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    enable_chunked_prefill: bool
    long_prefill_token_threshold: int
    max_num_partial_prefills: int
    scheduling_policy: str
    fairness: FairnessConfig | Mapping[str, Any] | None
    max_num_queued_requests: int | None
    max_num_queued_tokens: int | None
    async_scheduling: bool
    num_scheduler_steps: int
    block_size: int
    num_gpu_blocks_override: int | None
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    kv_cache_dtype: str
    swap_space: float | None
    preemption_mode: PreemptionMode
    enable_prefix_caching: bool
    attention_backend: str | None
    matmul_backend: str | None
    decode_buckets: tuple[int, ...] | None
    token_buckets: tuple[int, ...] | None
    compilation_cache_dir: str | None
    use_tqdm_on_load: bool
    record: str | Path | None
    trace: str | Path | None
    otlp_traces_endpoint: str | None
    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    quantization: None
    speculative_config: None
    enable_lora: bool


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """Everything an engine is built from. Names and meanings are vLLM's where it has them."""

    model: str | Path
    """"demo", a local Hugging Face checkpoint directory, one that ``jaxserve convert`` wrote, or a hub name."""
    tokenizer: str | Path | None = None
    """Directory or hub name of the tokenizer; None = the model's."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    hf_overrides: Mapping[str, Any] | None = None
    """Entries that replace those of config.json."""
    skip_tokenizer_init: bool = False
    """No tokenizer: prompts are token ids, outputs have no text."""
    served_model_name: str | None = None
    load_format: str = "auto"
    """auto, safetensors, orbax, or dummy (random weights: config.json is enough)."""
    dtype: str = "auto"
    """Of weights and activations; auto = the checkpoint's."""
    seed: int = 0
    """Of requests without a seed of their own, and of dummy weights."""
    mesh: Any = None
    """MeshConfig, path of a TOML mesh file, or "dp=2,tp=2"; agrees with the sizes below where both are given."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    decode_context_parallel_size: int = 1
    enable_expert_parallel: bool = False
    max_model_len: int | None = None
    """Longest sequence in tokens, prompt and output; None = the model's limit."""
    max_num_seqs: int | None = None
    """Sequences in one step, per replica; None = 64 on a CPU, 256 on a GPU."""
    max_num_batched_tokens: int | None = None
    """Tokens in one step, per replica; None = 512 on a CPU, 2048 on a GPU."""
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    """Most tokens of one prompt in a step while others decode; 0 = as many as the step has room for."""
    max_num_partial_prefills: int = 0
    """Requests that may be in the middle of their prompt at once; shorter prompts pass those held back. 0 = any."""
    scheduling_policy: str = "fcfs"
    """fcfs, priority (lower ``priority`` first; displaces), fair (among tenants), or "module:Class": a
    ``jaxserve.scheduler.Policy`` of your own, made with the SchedulerConfig."""
    fairness: FairnessConfig | Mapping[str, Any] | None = None
    """Of the fair policy: weights, rate caps and latency targets of tenants; ``config.FairnessConfig`` or a mapping
    with its fields."""
    max_num_queued_requests: int | None = None
    """Waiting requests beyond which new ones are rejected with QueueFullError; None = no limit."""
    max_num_queued_tokens: int | None = None
    """The same for their prompt tokens."""
    async_scheduling: bool = True
    """Schedule a step while the one before it runs; False = one after the other, with the same tokens."""
    num_scheduler_steps: int = 1
    """Decode steps in one call where nothing needs the host in between."""
    block_size: int = 16
    """Tokens in one KV block."""
    num_gpu_blocks_override: int | None = None
    """KV blocks per replica, whatever the memory."""
    gpu_memory_utilization: float = 0.92
    """Share of a GPU's memory that weights, step and KV blocks may take together."""
    kv_cache_memory_bytes: int | None = None
    """Bytes of KV blocks on each device."""
    kv_cache_dtype: str = "auto"
    """auto = the model's dtype. fp8 (e4m3, what is too large saturates) takes a byte per number, and gives other
    tokens."""
    swap_space: float | None = None
    """GiB of host memory per replica for the blocks of preempted requests; None = 4 on a GPU, and none on a CPU,
    whose cache is in host memory already."""
    preemption_mode: PreemptionMode = "auto"
    """What becomes of a preempted request's blocks: swap, recompute, or auto = what is quicker by measured rates."""
    enable_prefix_caching: bool = True
    """Share KV blocks between requests that begin with the same tokens."""
    attention_backend: str | None = None
    """An implementation of ``pallas_kernels.dispatch``; None = the best that runs here."""
    matmul_backend: str | None = None
    """As ``attention_backend``: of products with weights."""
    decode_buckets: tuple[int, ...] | None = None
    """Numbers of sequences that decoding steps are compiled for; None = powers of two up to max_num_seqs, and the
    halfway points between larger ones."""
    token_buckets: tuple[int, ...] | None = None
    """Numbers of tokens that steps with prompt chunks are compiled for; None = powers of two from 64 up to
    max_num_batched_tokens, and the halfway points."""
    compilation_cache_dir: str | None = None
    """Where compiled programs are kept between runs; None = nowhere, unless jax is configured otherwise."""
    use_tqdm_on_load: bool = True
    """Progress bars while loading and compiling."""
    record: str | Path | None = None
    """File that every event and decision of the scheduler is written to, for ``scripts/replay_schedule.py``."""
    trace: str | Path | None = None
    """File for a trace of every step and request, which Perfetto and ``scripts/trace_report.py`` read."""
    otlp_traces_endpoint: str | None = None
    """URL of an OpenTelemetry collector (OTLP over HTTP, like http://localhost:4318/v1/traces) that is sent a span per
    request, with its phases."""
    coordinator: str | None = None
    """HOST:PORT at which process 0 listens, where several processes (one per host) are one engine. This and the two
    below are found by themselves under Slurm, MPI and Kubernetes: ``docs/launch/README.md``."""
    num_processes: int | None = None
    """How many there are; 1 = only this one, whatever started it."""
    process_id: int | None = None
    """Which this one is, from 0."""
    quantization: None = None
    speculative_config: None = None
    enable_lora: bool = False

    def __post_init__(self) -> None:
        self._refuse_unsupported()
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_DTYPES)
        _one_of("load_format", self.load_format, LOAD_FORMATS)
        check_types(self)
        self._check_names()
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_gpu_blocks_override"):
            _at_least_one(name, getattr(self, name))
        if self.num_gpu_blocks_override == 1:
            raise ValueError("num_gpu_blocks_override=1: block 0 holds padding, so at least 2 are needed")
        _at_least_one("kv_cache_memory_bytes", self.kv_cache_memory_bytes)
        _at_least_one("block_size", self.block_size)
        if self.swap_space is not None and not 0 <= self.swap_space < float("inf"):
            raise ValueError(f"swap_space={self.swap_space!r}: it is a number of GiB, 0 or more")
        for name in ("decode_buckets", "token_buckets"):
            if getattr(self, name) is not None and not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: it has at least one number, or is None")
        FairnessConfig.of(self.fairness)
        check_placement(self.coordinator, self.num_processes, self.process_id)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization={self.gpu_memory_utilization!r}: it is above 0 and at most 1")

    def _check_names(self) -> None:
        """Of the model, the mesh, files and addresses."""
        if not str(self.model):
            raise ValueError("model='': it is \"demo\", a checkpoint's directory, or a hub name")
        # A MeshConfig is told by what only it has: the host half does not import ``sharding``.
        if not isinstance(self.mesh, str | Path | None) and not hasattr(self.mesh, "sharding_rules"):
            raise ValueError(
                f'mesh={self.mesh!r}: it is a text like "dp=2,tp=2", the path of a TOML mesh file, or a MeshConfig'
            )
        for name in ("record", "trace"):
            file = getattr(self, name)
            if file is not None and not Path(file).absolute().parent.is_dir():
                raise ValueError(f"{name}={str(file)!r}: {Path(file).parent} is no directory")
            if file is not None and Path(file).is_dir():
                raise ValueError(f"{name}={str(file)!r}: it is a directory, and a file is to be written")
        if self.trace is not None and self.record is not None and Path(self.trace) == Path(self.record):
            raise ValueError(f"trace and record are both {str(self.trace)!r}: give each a file of its own")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_traces_endpoint={endpoint!r}: it is a URL, like http://localhost:4318/v1/traces")

    def _refuse_unsupported(self) -> None:
        """Arguments of capabilities that are not there yet: accepted only where they ask for nothing."""
        for name, nothing in UNSUPPORTED.items():
            value = getattr(self, name)
            if value != nothing:
                raise NotImplementedError(f"{name}={value!r} is not supported yet; leave it at {nothing!r}")

    def as_json(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON has it; paths and meshes as text."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {f.name: given[f.name] for f in fields(self) if f.name == "model" or given[f.name] != f.default}
        if isinstance(self.fairness, FairnessConfig):
            changed["fairness"] = asdict(self.fairness)
        return json.loads(json.dumps(changed, default=str))

    @classmethod
    def of(cls, model: str | Path, **options: Unpack[EngineOptions]) -> EngineArgs:
        """Like the constructor, with one clear error for names that do not exist."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise TypeError(f"unknown argument {unknown[0]!r}; known: {', '.join(sorted(known - {'model'}))}")
        return cls(model=model, **options)


UNSUPPORTED: Mapping[str, Any] = {
    "trust_remote_code": False,
    "served_model_name": None,
    "enable_expert_parallel": False,
    "quantization": None,
    "speculative_config": None,
    "enable_lora": False,
}


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: it is one of {', '.join(allowed)}")


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name}={value!r}: it is a whole number of at least 1")
