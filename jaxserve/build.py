"""From arguments to a running engine: find the model, lay out the mesh, load, size the cache, compile."""

from __future__ import annotations

import json
import os
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import Mesh
from tqdm import tqdm

from jaxserve import hub, model_configs
from jaxserve.batch import Batch, Features
from jaxserve.config import GIB, FairnessConfig, SchedulerConfig, SwapConfig, decode_buckets, token_buckets
from jaxserve.device_state import bytes_per_device, kv_bytes_per_block
from jaxserve.distributed import Job, connect
from jaxserve.engine import Engine
from jaxserve.engine_args import EngineArgs
from jaxserve.journal import Journal, LeaderJournal, LeadingScheduler, RecordedLeader
from jaxserve.models.config import DecoderConfig
from jaxserve.models.registry import decoder_config, family_of, load_hf_config
from jaxserve.models.shape import model_shape
from jaxserve.placement import placement
from jaxserve.recording import RecordedScheduler
from jaxserve.runner import ModelRunner, RunnerConfig
from jaxserve.scheduler import Scheduler
from jaxserve.scoring import score_rows
from jaxserve.step import Kernels
from jaxserve.step_costs import gpu_of, step_cost
from jaxserve.telemetry import RequestSpans
from jaxserve.tokenizer import load_tokenizer
from jaxserve.trace import EngineTrace, Sink, Trace
from jaxserve.trace_file import TraceFile
from jaxserve.weights.checkpoint import Checkpoint, weight_names
from jaxserve.weights.loader import (
    LayOut,
    abstract_params,
    abstract_weights,
    assemble,
    load_params,
    param_shardings,
    random_params,
)
from pallas_kernels import dispatch, matmul, sampling
from pallas_kernels.matmul import Matmul, reference
from pallas_kernels.paged_attention import Setting
from sharding import MeshConfig, ShardingRules, build_mesh
from sharding.platform import use_cpu_without_gpus
from sharding.xla_flags import compiler_options

DEMO_MODEL = Path(__file__).parent / "demo_model"
CPU_KV_BYTES = 2 * GIB
"""KV memory of a CPU run, all devices together, unless the user says otherwise."""
COMPILE_CACHE_BYTES = 8 * GIB
"""Largest size of the directory that keeps compiled programs."""
GPU_SWAP_GIB = 4.0
"""Host memory for preempted requests, per replica of GPUs, unless the user says otherwise."""
OWN_OPTIONS = (
    *("model", "revision", "tokenizer", "process_id"),
    *("compilation_cache_dir", "use_tqdm_on_load", "record", "trace"),
)
"""Of one process; it may have the same model in another place. All others are the same in all processes of a job."""
GPU_RESERVE_BYTES = GIB // 2
"""Left free on a GPU beside weights, step and cache: CUDA context, NCCL buffers, fragmentation."""


@dataclass(frozen=True)
class ModelFiles:
    """A model's directory and its configs, before any weight is read."""

    directory: Path
    hf: Any
    decoder: DecoderConfig
    hub_name: str | None
    """Of a model on the hub, whose weights need not be in the directory yet."""

    @classmethod
    def find(cls, args: EngineArgs) -> ModelFiles:
        """Raises FileNotFoundError where there is no such model, ValueError for one that is not supported."""
        local, hub_name = local_directory(args.model), None
        if local is None:
            hub_name = str(args.model)
            local = hub.description(hub_name, args.revision)
        elif args.revision is not None:
            raise ValueError(f"revision={args.revision!r}: model {str(args.model)!r} is not on the hub but in {local}")
        hf = load_hf_config(local, dict(args.hf_overrides or {}))
        return cls(local, hf, decoder_config(hf), hub_name)

    @property
    def name(self) -> str:
        return self.hub_name or self.directory.name

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Of the config, and those that generation_config.json adds."""
        path = self.directory / "generation_config.json"
        ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        more = ids if isinstance(ids, list) else [] if ids is None else [ids]
        return tuple(sorted({*self.decoder.eos_token_ids, *more}))


def local_directory(model: str | Path) -> Path | None:
    """Of "demo", of a path, or of a name in ``model_configs`` (no weights); None = this is a hub name."""
    if str(model) == "demo":
        return DEMO_MODEL
    if Path(model).is_dir():
        return Path(model)
    if shape := model_configs.find(str(model)):
        return shape
    if hub.is_name(str(model)):
        return None
    raise FileNotFoundError(f'model {str(model)!r}: no such directory, and no hub name ("owner/name")')


def resolve_mesh(args: EngineArgs) -> MeshConfig:
    """The mesh that the arguments ask for."""
    return MeshConfig.resolve(
        args.mesh,
        dp=args.data_parallel_size,
        pp=args.pipeline_parallel_size,
        cp=args.decode_context_parallel_size,
        tp=args.tensor_parallel_size,
    )


def fit(decoder: DecoderConfig, mesh: MeshConfig) -> DecoderConfig:
    """The model for the mesh: heads, columns and vocabulary that divide, and layers cut into stages."""
    return decoder.fit_to(mesh.tp, vocab_shards=mesh.pp * mesh.tp).staged(mesh.pp)


def join(args: EngineArgs) -> Job | None:
    """Meet the other processes of the job, if there are any. To be called before jax starts."""
    where, mesh = placement(args.coordinator, args.num_processes, args.process_id, os.environ), resolve_mesh(args)
    if where is not None and mesh.num_devices % where.num_processes:
        raise ValueError(
            f"mesh {mesh} has {mesh.num_devices} devices, which {where.num_processes} processes cannot share evenly: "
            f"make it a multiple of {where.num_processes}"
        )
    if where is not None and args.swap_space:
        raise NotImplementedError(
            f"swap_space={args.swap_space!r} is not supported with several processes: preempted requests are computed "
            "again; leave it out"
        )
    job = connect(where)
    if job is not None:
        job.meet({k: v for k, v in args.as_json().items() if k not in OWN_OPTIONS})
    return job


def open_mesh(config: MeshConfig, num_processes: int = 1) -> Mesh:
    """The mesh over all devices of this process, or of all of them; on a CPU as many as it needs are simulated."""
    use_cpu_without_gpus()
    try:
        if config.num_devices > 1:
            jax.config.update("jax_num_cpu_devices", config.num_devices // num_processes)
    except RuntimeError:
        pass  # jax has its devices already: build_mesh says if they are too few
    if num_processes > 1:
        _check_spans(config, num_processes)
    return build_mesh(config)


def _check_spans(config: MeshConfig, num_processes: int) -> None:
    """ValueError unless the mesh takes every device, and as many of each process."""
    there = Counter(device.process_index for device in jax.devices())
    counts = [there[i] for i in range(num_processes)]
    if config.num_devices != sum(counts) or len(set(counts)) > 1:
        raise ValueError(
            f"mesh {config} has {config.num_devices} devices, the {num_processes} processes have {sum(counts)} "
            f"({', '.join(map(str, counts))}): it takes all of them, and as many of each process"
        )


def resolve_dtype(asked: str, hf: Any) -> jnp.dtype:
    stored = str(getattr(hf, "dtype", None) or "float32").removeprefix("torch.")
    return jnp.dtype(stored if asked == "auto" else asked)


def resolve_kv_dtype(asked: str, model: jnp.dtype) -> jnp.dtype:
    return model if asked == "auto" else jnp.dtype(jnp.float8_e4m3fn if asked == "fp8" else asked)


def load_model(
    files: ModelFiles,
    args: EngineArgs,
    decoder: DecoderConfig,
    mesh: Mesh,
    rules: ShardingRules,
    lay_out: LayOut = reference.lay_out,
) -> tuple[Any, Any]:
    """Graph definition and parameters, from whatever the directory holds, laid out for what multiplies them."""
    dtype = resolve_dtype(args.dtype, files.hf)
    if args.load_format == "dummy":
        return random_params(files.decoder, decoder, dtype, mesh, rules, args.seed, lay_out)
    from jaxserve.weights.orbax import is_orbax, tensors

    if args.load_format == "orbax" or (args.load_format == "auto" and is_orbax(files.directory)):
        weights = tensors(files.directory)
    else:
        if files.hub_name is not None:
            hub.add_weights(files.hub_name, files.directory, weight_names(files.directory))
        family = family_of(files.hf.architectures)
        checkpoint = Checkpoint(files.directory, getattr(family, "PREFIXES", ("model.",)))
        weights = family.weights(files.decoder, checkpoint)
    show = _progress("loading weights", args.use_tqdm_on_load)
    return load_params(files.decoder, decoder, dtype, weights, mesh, rules, lay_out, show)


def _progress(what: str, shown: bool) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """A progress bar that is gone when it is done, or nothing."""
    return lambda items: tqdm(items, desc=what, disable=not shown, leave=False)


def build_engine(args: EngineArgs, job: Job | None = None) -> Engine:
    """Load the model and compile its programs; what comes back is ready to serve. ``job``: of several processes, all
    of which make this call."""
    if job is not None:
        args = replace(args, swap_space=0.0, use_tqdm_on_load=args.use_tqdm_on_load and job.is_leader)
    if args.compilation_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", args.compilation_cache_dir)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        # With a limit jax locks the cache's files; without one, a second process may read a half-written program.
        jax.config.update("jax_compilation_cache_max_size", COMPILE_CACHE_BYTES)
    files = ModelFiles.find(args)
    mesh_config = resolve_mesh(args)
    decoder, rules = fit(files.decoder, mesh_config), mesh_config.sharding_rules
    tokenizer = None if args.skip_tokenizer_init else load_tokenizer(args.tokenizer or files.directory)
    mesh = open_mesh(mesh_config, 1 if job is None else job.num_processes)
    platform = mesh.devices.flat[0].platform
    products, _ = _products(args, files, mesh)
    model = load_model(files, args, decoder, mesh, rules, products.lay_out)
    runner, limits = _runner(args, files, decoder, model, mesh)
    num_blocks = _num_blocks(args, runner, limits, platform)
    limits = replace(limits, num_blocks=num_blocks if job is None else job.least("num_blocks", num_blocks))
    limits = replace(limits, swap=_swap(args, runner, platform))
    num_blocks = tuple(limits.blocks_of(window) for window in limits.windows)
    runner.warm_up(num_blocks, _progress("compiling", args.use_tqdm_on_load), swaps=limits.swap.num_blocks > 0)
    if limits.swap.num_blocks and limits.swap.mode == "auto":
        tokens, moved = runner.measure_rates()
        limits = replace(limits, swap=replace(limits.swap, prefill_tokens_per_second=tokens, bytes_per_second=moved))
    scheduler, journal = _scheduler(args, limits, job)
    if job is not None:
        rehearse(runner)
        job.serve(lambda: runner.is_computing)
    trace = Trace() if job is not None and not job.is_leader else _trace(args, files, mesh_config, runner)
    eos = files.eos_token_ids
    return Engine(scheduler, runner, tokenizer, eos, args.seed, args.async_scheduling, journal, trace)


def _trace(args: EngineArgs, files: ModelFiles, mesh: MeshConfig, runner: ModelRunner) -> Trace:
    """What is to be told where the time goes."""
    if args.trace is None and args.otlp_traces_endpoint is None:
        return Trace()
    device = runner.mesh.devices.flat[0]
    gpu, costs = gpu_of(device.device_kind, device.platform), {}
    if gpu is not None:
        dtype, kv_dtype = str(runner.params[0].dtype), str(runner.config.kv_dtype)
        shape = model_shape(files.decoder, dtype, kv_dtype).fit_to(mesh)
        costs = {runner.step_name(layout): step_cost(shape, mesh, gpu, layout) for layout in runner.config.layouts}
    sinks: list[Sink] = []
    if args.otlp_traces_endpoint is not None:
        sinks.append(RequestSpans(args.otlp_traces_endpoint))
    if args.trace is not None:
        name, simulated = None if gpu is None else gpu.name, device.platform == "cpu"
        sinks.append(TraceFile(Path(args.trace), mesh.dp, mesh.pp, name, simulated, costs))
    return EngineTrace(sinks, mesh.pp, costs)


def _scheduler(args: EngineArgs, limits: SchedulerConfig, job: Job | None) -> tuple[Scheduler, Journal]:
    """Of process 0, one that tells the others; it alone writes what is to be recorded."""
    if job is not None and not job.is_leader:
        return Scheduler(limits), Journal()
    record = None if args.record is None else (Path(args.record), args.as_json())
    if job is None:
        return Scheduler(limits) if record is None else RecordedScheduler(limits, *record), Journal()
    scheduler = LeadingScheduler(limits) if record is None else RecordedLeader(limits, *record)
    journal = LeaderJournal(job)
    scheduler.lead(journal)
    return scheduler, journal


def rehearse(runner: ModelRunner) -> None:
    """Run every step once on padding: the processes connect to each other now, and what their libraries print about
    it does not get among what a command prints."""
    features = Features(), Features(sampling=True, truncation=True, penalties=True, logit_bias=True)
    with stdout_to_stderr():
        for layout in runner.config.layouts:
            buffer = np.zeros((runner.mesh.shape["dp"], layout.num_words), np.int32)
            for wanted in features:
                batches = [Batch(layout, buffer, wanted)] * runner.decoder.num_stages
                pending = runner.tick(batches) if len(batches) > 1 else runner.step(batches[0])
                pending.output()
                if pending.hidden is not None:
                    score_rows(pending, runner, [(0, 0)], [0], 0)


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """For what libraries written in C++ print."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def abstract_runner(args: EngineArgs, files: ModelFiles, mesh: Mesh) -> tuple[ModelRunner, SchedulerConfig]:
    """A runner without weights on ``mesh``, whose devices need not be there: its programs can be compiled, not run.
    And the scheduler's limits, but for the number of blocks."""
    config, dtype = resolve_mesh(args), resolve_dtype(args.dtype, files.hf)
    decoder = fit(files.decoder, config)
    graph, params = abstract_params(decoder, dtype)
    shardings = param_shardings(params, mesh, config.sharding_rules)
    products, _ = _products(args, files, mesh)
    arrays = abstract_weights(params, shardings, products.lay_out)
    return _runner(args, files, decoder, (graph, assemble(params, arrays)), mesh)


def _runner(
    args: EngineArgs, files: ModelFiles, decoder: DecoderConfig, model: tuple[Any, Any], mesh: Mesh
) -> tuple[ModelRunner, SchedulerConfig]:
    """With the scheduler's limits, but for the number of blocks."""
    platform, dtype = mesh.devices.flat[0].platform, resolve_dtype(args.dtype, files.hf)
    mesh_config = resolve_mesh(args)
    products, min_rows = _products(args, files, mesh)
    limits = _limits(args, decoder, platform, min_rows, mesh_config)
    config = _runner_config(args, decoder, limits, dtype, min_rows)
    device = mesh.devices.flat[0]
    setting = Setting(
        platform,
        None if platform == "cpu" else _capability(device),
        str(dtype),
        str(config.kv_dtype),
        decoder.head_dim,
        decoder.group_size,
        config.block_size,
    )
    kernels = Kernels(
        dispatch.paged_attention(setting, args.attention_backend),
        products,
        dispatch.tails_for(sampling.Setting(platform, setting.capability)),
    )
    runner = ModelRunner(model, decoder, kernels, config, mesh, mesh_config.sharding_rules)
    runner.compiler_options = compiler_options(mesh_config, platform, jax.__version__)
    return runner, limits


def _products(args: EngineArgs, files: ModelFiles, mesh: Mesh) -> tuple[Matmul, int]:
    """What multiplies, and the fewest rows that it has a fast path for."""
    platform, dtype = mesh.devices.flat[0].platform, resolve_dtype(args.dtype, files.hf)
    setting = matmul.Setting(platform, str(dtype), mesh.devices.size)
    chosen = dispatch.matmul_for(setting, args.matmul_backend)
    return chosen, chosen.fewest_rows(setting)


def _capability(device: Any) -> tuple[int, int]:
    major, _, minor = str(device.compute_capability).partition(".")
    return int(major), int(minor)


def _limits(
    args: EngineArgs, decoder: DecoderConfig, platform: str, min_rows: int, mesh: MeshConfig
) -> SchedulerConfig:
    """The scheduler's limits, but for the number of blocks, which is known once the step is compiled."""
    longest = args.max_model_len or decoder.max_position
    table = decoder.learned_positions - decoder.position_offset
    if decoder.learned_positions and longest > table:
        raise ValueError(f"max_model_len={longest}: this model's position table ends at {table}")
    if longest > decoder.max_position:
        raise ValueError(
            f"max_model_len={longest}: this model's context ends at {decoder.max_position} tokens; "
            'hf_overrides={"max_position_embeddings": N} moves its end, at your own risk'
        )
    tokens = args.max_num_batched_tokens or (512 if platform == "cpu" else 2048)
    if not args.enable_chunked_prefill and args.max_num_batched_tokens is None:
        tokens = max(tokens, longest)
    seqs = args.max_num_seqs or min(tokens, 64 if platform == "cpu" else 256)
    decode = args.decode_buckets or decode_buckets(seqs)
    _check_buckets("decode_buckets", decode, "max_num_seqs", seqs)
    windows = check_context(decoder, mesh, longest)
    rows = args.token_buckets or token_buckets(tokens)
    _check_buckets("token_buckets", rows, "max_num_batched_tokens", tokens)
    return SchedulerConfig(
        max_model_len=longest,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        block_size=mesh.cp * args.block_size,  # one block of every rank that shares the context
        num_blocks=2,
        windows=windows,
        enable_chunked_prefill=args.enable_chunked_prefill,
        long_prefill_token_threshold=args.long_prefill_token_threshold,
        max_num_partial_prefills=args.max_num_partial_prefills,
        enable_prefix_caching=args.enable_prefix_caching,
        keys_depend_on_prompt_length=any(rope.depends_on_length for rope in decoder.ropes),
        num_scheduler_steps=args.num_scheduler_steps,
        decode_buckets=tuple(sorted({max(b, min_rows) for b in decode})),
        token_buckets=tuple(rows),
        policy=args.scheduling_policy,
        fairness=FairnessConfig.of(args.fairness),
        max_num_queued_requests=args.max_num_queued_requests,
        max_num_queued_tokens=args.max_num_queued_tokens,
        num_replicas=mesh.dp,
        num_stages=mesh.pp,
    )


def check_context(decoder: DecoderConfig, mesh: MeshConfig, longest: int) -> tuple[int | None, ...]:
    """How far groups of layers look back in sequences of up to ``longest`` tokens; NotImplementedError if ranks were to
    share the context of a layer with a window."""
    windows = decoder.layer_groups(longest)[0]
    if mesh.cp > 1 and windows != (None,):
        raise NotImplementedError(
            f"decode_context_parallel_size={mesh.cp} is not supported for layers with a window "
            f"({max(w for w in windows if w)} tokens); leave it at 1"
        )
    return windows


def _swap(args: EngineArgs, runner: ModelRunner, platform: str) -> SwapConfig:
    """Host memory for preempted requests; the rates are measured once the engine is warm."""
    default = 0.0 if platform == "cpu" or runner.decoder.num_stages > 1 else GPU_SWAP_GIB
    space = int((default if args.swap_space is None else args.swap_space) * GIB)
    config, shape = runner.config, runner.mesh.shape
    sizes = len(config.layer_groups), config.block_size, config.kv_dtype.itemsize, shape["tp"]
    block = shape["tp"] * shape["cp"] * kv_bytes_per_block(runner.decoder, *sizes)
    return SwapConfig(num_blocks=space // block, mode=args.preemption_mode, block_bytes=block)


def _runner_config(
    args: EngineArgs, decoder: DecoderConfig, limits: SchedulerConfig, dtype: jnp.dtype, min_rows: int
) -> RunnerConfig:
    return RunnerConfig(
        decode_buckets=limits.decode_buckets,
        token_buckets=limits.token_buckets,
        max_num_seqs=limits.max_num_seqs,
        blocks_per_sequence=limits.blocks_per_sequence,
        block_size=args.block_size,
        kv_dtype=resolve_kv_dtype(args.kv_cache_dtype, dtype),
        windows=limits.windows,
        layer_groups=decoder.layer_groups(limits.max_model_len)[1],
        num_steps=limits.num_scheduler_steps,
        min_rows=min_rows,
    )


def _check_buckets(name: str, buckets: tuple[int, ...], limit_name: str, limit: int) -> None:
    if sorted(set(buckets)) != list(buckets) or buckets[-1] != limit or buckets[0] < 1:
        raise ValueError(f"{name}={buckets!r}: whole numbers that rise, the last of them {limit_name}={limit}")


def _num_blocks(args: EngineArgs, runner: ModelRunner, limits: SchedulerConfig, platform: str) -> int:
    """KV blocks per replica, of layers that keep every token: as told, or what fits the memory, and never more than
    could be used."""
    if args.num_gpu_blocks_override is not None:
        _check_host_memory(runner, replace(limits, num_blocks=args.num_gpu_blocks_override), platform)
        return args.num_gpu_blocks_override
    if args.kv_cache_memory_bytes is not None:
        available, source = args.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    elif platform == "cpu":
        free = psutil.virtual_memory().available
        available, source = min(CPU_KV_BYTES, free // 2) // runner.mesh.size, "half of the free memory"
    else:
        limit = _memory_limit(runner.mesh.devices.flat[0])
        available = kv_bytes_on_gpu(limit, args.gpu_memory_utilization, step_bytes(runner))
        source = f"gpu_memory_utilization={args.gpu_memory_utilization}"

    def needed(num_blocks: int) -> int:
        return kv_bytes(runner, replace(limits, num_blocks=num_blocks))

    if needed(2) > available:
        raise ValueError(
            f"no room for KV blocks: {source} leaves {available:,} bytes on each device, a block of "
            f"{limits.block_size} tokens takes {needed(2) // 2:,}, and at least 2 are needed"
        )
    return blocks_that_fit(runner, limits, available)


def _check_host_memory(runner: ModelRunner, limits: SchedulerConfig, platform: str) -> None:
    """ValueError if this machine has no memory for the KV blocks of simulated devices. A GPU's is not asked for: what a
    step needs besides is known only to its compiled program."""
    needed, free = kv_bytes(runner, limits) * len(runner.mesh.local_devices), psutil.virtual_memory().available
    if platform == "cpu" and needed > free:
        raise ValueError(
            f"num_gpu_blocks_override={limits.num_blocks}: these KV blocks take {needed:,} bytes, and this machine has "
            f"{free:,} free; leave it out for as many as fit"
        )


def blocks_that_fit(runner: ModelRunner, limits: SchedulerConfig, available: int) -> int:
    """KV blocks per replica in so many bytes on each device, no more than could be used."""
    useful = 1 + limits.max_num_seqs * limits.blocks_per_sequence
    sizes = range(useful + 1)
    most = bisect_right(sizes, available, lo=2, key=lambda n: kv_bytes(runner, replace(limits, num_blocks=n))) - 1
    if most < 2 or _addressed(runner, replace(limits, num_blocks=most)):
        return most
    return (1 << 31) // _block_elements(runner)


def _addressed(runner: ModelRunner, limits: SchedulerConfig) -> bool:
    """Whether attention's kernels reach all of every layer's caches."""
    sizes = [limits.blocks_of(window) * _block_elements(runner) for window in limits.windows]
    return all(runner.kernels.attention.addresses(n, n * runner.config.kv_dtype.itemsize) for n in sizes)


def _block_elements(runner: ModelRunner) -> int:
    """Of the keys of one block of one layer, on one device."""
    return kv_bytes_per_block(runner.decoder, 1, runner.config.block_size, 1, runner.mesh.shape["tp"]) // 2


def kv_bytes(runner: ModelRunner, limits: SchedulerConfig) -> int:
    """Bytes per device of the caches of all layers."""
    config, tp = runner.config, runner.mesh.shape["tp"]
    layer = kv_bytes_per_block(runner.decoder, 1, config.block_size, config.kv_dtype.itemsize, tp)
    return sum(layer * limits.blocks_of(limits.windows[group]) for group in config.layer_groups)


def _memory_limit(device: Any) -> int:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ValueError(f"{device} does not say how much memory it has: give kv_cache_memory_bytes")
    return stats["bytes_limit"]


def kv_bytes_on_gpu(limit: int, utilization: float, step: int) -> int:
    """What is left of a GPU for KV blocks: the agreed share of its memory, less what the step needs, less the
    reserve; 0 if nothing is."""
    return max(0, int(limit * utilization) - step - GPU_RESERVE_BYTES)


def step_bytes(runner: ModelRunner, probe: int = 2) -> int:
    """Bytes per device that the largest step needs besides KV blocks (weights, batch, sampler rows, temporaries,
    outputs), read from its program, compiled for ``probe`` blocks."""
    probe_blocks = (probe,) * len(runner.config.windows)
    analysis = runner.step_program(runner.config.layouts[-1], probe_blocks).memory_analysis()
    total = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    state = runner.abstract_state(probe_blocks)
    return total - analysis.alias_size_in_bytes - bytes_per_device((state.keys, state.values))
