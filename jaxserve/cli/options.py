"""The options that commands share, each defined once. Defaults are the engine's own."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.engine_args import EngineArgs
from jaxserve.placement import placement

if TYPE_CHECKING:
    from jaxserve.sampling_params import SamplingParams

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]


def cache_directory() -> Path:
    """Where compiled programs are kept between runs: the one place that reads the environment."""
    own = os.environ.get("JAXSERVE_CACHE_DIR")
    if own:
        return Path(own) / "xla"
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache") / "jaxserve" / "xla"


def _engine(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel="Engine")


def _scheduler(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel="Scheduler")


def _mesh(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel="Mesh")


def _sampling(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel="Sampling")


@dataclass(frozen=True, kw_only=True)
class CheckpointFlags:
    """Which model, in which precision."""

    model: Annotated[
        str,
        _engine("--model", "-m", help='"demo", a directory, a hub name (owner/name), or a shape (llama-3.1-70b).'),
    ] = "demo"
    revision: Annotated[str | None, _engine("--revision", help="Branch, tag or commit on the hub.")] = None
    hf_overrides: Annotated[
        str | None, _engine("--hf-overrides", metavar="JSON", help="Entries that replace those of config.json.")
    ] = None
    dtype: Annotated[
        str,
        _engine("--dtype", metavar="DTYPE", help="auto (the checkpoint's), float32, bfloat16 or float16."),
    ] = EngineArgs.dtype
    kv_cache_dtype: Annotated[
        str, _engine("--kv-cache-dtype", metavar="DTYPE", help="auto, float32, bfloat16, float16 or fp8 (e4m3).")
    ] = EngineArgs.kv_cache_dtype

    def engine_options(self) -> dict[str, Any]:
        """Keyword arguments of ``EngineArgs``."""
        return asdict(self) | {"hf_overrides": _json_object("--hf-overrides", self.hf_overrides)}

    def engine_args(self) -> EngineArgs:
        return EngineArgs(**self.engine_options())


@dataclass(frozen=True, kw_only=True)
class ModelFlags(CheckpointFlags):
    """Also on which devices: enough to describe an engine without making it."""

    mesh: Annotated[str | None, _mesh("--mesh", metavar="MESH", help='A TOML mesh file, or "dp=2,tp=4".')] = None
    tensor_parallel_size: Annotated[
        int, _mesh("--tensor-parallel-size", "-tp", help="Devices that share each layer.")
    ] = 1
    data_parallel_size: Annotated[int, _mesh("--data-parallel-size", "-dp", help="Replicas.")] = 1
    pipeline_parallel_size: Annotated[int, _mesh("--pipeline-parallel-size", "-pp", help="Stages of layers.")] = 1
    decode_context_parallel_size: Annotated[
        int, _mesh("--decode-context-parallel-size", "-dcp", help="Devices that share each sequence's KV blocks.")
    ] = 1


@dataclass(frozen=True, kw_only=True)
class StepFlags(ModelFlags):
    """Also the sizes and the kernels: enough to compile a step."""

    max_model_len: Annotated[
        int | None, _engine("--max-model-len", help="Longest sequence in tokens; none = the model's.")
    ] = None
    max_num_seqs: Annotated[
        int | None, _engine("--max-num-seqs", help="Sequences per step and replica; none = 64, GPU 256.")
    ] = None
    max_num_batched_tokens: Annotated[
        int | None,
        _engine("--max-num-batched-tokens", help="Tokens per step and replica; none = 512, GPU 2048."),
    ] = None
    block_size: Annotated[int, _engine("--block-size", help="Tokens in one KV block.")] = EngineArgs.block_size
    gpu_memory_utilization: Annotated[
        float, _engine("--gpu-memory-utilization", help="Share of a GPU's memory to use.")
    ] = EngineArgs.gpu_memory_utilization
    attention_backend: Annotated[
        str | None, _engine("--attention-backend", help="Paged attention to use. Default: the best that runs here.")
    ] = None
    matmul_backend: Annotated[
        str | None, _engine("--matmul-backend", help="Products with weights to use. Default: the best that runs here.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class EngineFlags(StepFlags):
    """Everything that ``LLM`` can be told from a command line."""

    tokenizer: Annotated[
        str | None, _engine("--tokenizer", help="Directory or hub name of the tokenizer, if not the model's.")
    ] = None
    skip_tokenizer_init: Annotated[
        bool, _engine("--skip-tokenizer-init", help="No tokenizer: prompts and outputs are token ids.")
    ] = False
    load_format: Annotated[
        str,
        _engine("--load-format", metavar="FORMAT", help="auto, safetensors, orbax, or dummy (random weights)."),
    ] = EngineArgs.load_format
    seed: Annotated[int, _engine("--seed", help="Of sampling, and of dummy weights.")] = EngineArgs.seed
    no_enable_chunked_prefill: Annotated[
        bool, _engine("--no-enable-chunked-prefill", help="Never split a prompt over steps.")
    ] = False
    num_gpu_blocks_override: Annotated[
        int | None, _engine("--num-gpu-blocks-override", help="KV blocks per replica, whatever the memory.")
    ] = None
    kv_cache_memory_bytes: Annotated[
        int | None, _engine("--kv-cache-memory-bytes", help="Bytes of KV cache on each device.")
    ] = None
    no_enable_prefix_caching: Annotated[
        bool, _scheduler("--no-enable-prefix-caching", help="Never share KV blocks between requests.")
    ] = False
    no_async_scheduling: Annotated[
        bool, _scheduler("--no-async-scheduling", help="Schedule a step only when the one before it is done.")
    ] = False
    num_scheduler_steps: Annotated[
        int, _scheduler("--num-scheduler-steps", help="Decode steps in one call where nothing is to be decided.")
    ] = EngineArgs.num_scheduler_steps
    scheduling_policy: Annotated[
        str, _scheduler("--scheduling-policy", metavar="POLICY", help="fcfs, priority, fair, or module:Class.")
    ] = EngineArgs.scheduling_policy
    fairness: Annotated[
        str | None, _scheduler("--fairness", metavar="JSON", help="Tenants, weights and caps of the fair policy.")
    ] = None
    long_prefill_token_threshold: Annotated[
        int, _scheduler("--long-prefill-token-threshold", help="Tokens of one prompt per step while others decode.")
    ] = EngineArgs.long_prefill_token_threshold
    max_num_partial_prefills: Annotated[
        int, _scheduler("--max-num-partial-prefills", help="Prompts in progress at once; 0 = any number.")
    ] = EngineArgs.max_num_partial_prefills
    swap_space: Annotated[
        float | None, _scheduler("--swap-space", help="GiB of host memory per replica for preempted requests.")
    ] = None
    preemption_mode: Annotated[
        str, _scheduler("--preemption-mode", metavar="MODE", help="auto, swap or recompute.")
    ] = EngineArgs.preemption_mode
    record: Annotated[
        str | None, _scheduler("--record", metavar="FILE", help="Write every scheduling decision here.")
    ] = None
    trace: Annotated[
        str | None, _engine("--trace", metavar="FILE", help="Write where the time goes here, for Perfetto.")
    ] = None
    otlp_traces_endpoint: Annotated[
        str | None, _engine("--otlp-traces-endpoint", metavar="URL", help="Send requests' spans to this collector.")
    ] = None
    compilation_cache_dir: Annotated[
        str | None,
        _engine(
            "--compilation-cache-dir",
            help='Keeps compiled programs; "none" = nowhere. Default: the user\'s cache.',
        ),
    ] = None

    coordinator: Annotated[
        str | None, _mesh("--coordinator", metavar="HOST:PORT", help="Of several processes: where process 0 listens.")
    ] = None
    num_processes: Annotated[
        int | None, _mesh("--num-processes", help="How many; found under Slurm, MPI, Kubernetes. 1 = only this.")
    ] = None
    process_id: Annotated[int | None, _mesh("--process-id", help="Which of them this is, from 0.")] = None

    @property
    def follows(self) -> bool:
        """Whether another process of the job has the prompts."""
        where = placement(self.coordinator, self.num_processes, self.process_id, os.environ)
        return where is not None and where.process_id > 0

    def engine_options(self) -> dict[str, Any]:
        options = super().engine_options()
        for name in ("enable_chunked_prefill", "enable_prefix_caching", "async_scheduling"):
            options[name] = not options.pop(f"no_{name}")
        options["fairness"] = _json_object("--fairness", self.fairness)
        cache = options["compilation_cache_dir"] or str(cache_directory())
        options["compilation_cache_dir"] = None if cache == "none" else cache
        return options


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """What ``SamplingParams`` can be told from a command line."""

    max_tokens: Annotated[int, _sampling("--max-tokens", help="Most tokens to generate.")] = 64
    temperature: Annotated[float, _sampling("--temperature", help="0 = always the likeliest token.")] = 1.0
    top_p: Annotated[float, _sampling("--top-p", help="Likeliest tokens up to this probability.")] = 1.0
    top_k: Annotated[int, _sampling("--top-k", help="This many likeliest tokens; 0 = all.")] = 0
    min_p: Annotated[float, _sampling("--min-p", help="Least share of the likeliest one's probability.")] = 0.0
    presence_penalty: Annotated[float, _sampling("--presence-penalty", help="Against tokens generated before.")] = 0.0
    frequency_penalty: Annotated[float, _sampling("--frequency-penalty", help="The same, per occurrence.")] = 0.0
    repetition_penalty: Annotated[
        float, _sampling("--repetition-penalty", help="Against tokens of prompt and output; 1 = off.")
    ] = 1.0
    stop: Annotated[list[str] | None, _sampling("--stop", help="Ends the text; may be repeated.")] = None
    stop_token_ids: Annotated[
        list[int] | None, _sampling("--stop-token-id", help="Ends the output; may be repeated.")
    ] = None
    include_stop_str_in_output: Annotated[
        bool, _sampling("--include-stop-str-in-output", help="The text ends after the stop string, not before it.")
    ] = False
    ignore_eos: Annotated[bool, _sampling("--ignore-eos", help="Go on after the end token.")] = False
    min_tokens: Annotated[int, _sampling("--min-tokens", help="Tokens before anything may end the output.")] = 0
    bad_words: Annotated[list[str] | None, _sampling("--bad-word", help="Is never generated; may be repeated.")] = None
    allowed_token_ids: Annotated[
        list[int] | None, _sampling("--allowed-token-id", help="Only these are generated; may be repeated.")
    ] = None
    logit_bias: Annotated[
        str | None, _sampling("--logit-bias", metavar="JSON", help='Added to logits, by token id: {"17": -2.5}.')
    ] = None
    request_seed: Annotated[
        int | None, _sampling("--request-seed", help="Of every request, whatever its number. Default: from --seed.")
    ] = None
    no_skip_special_tokens: Annotated[
        bool, _sampling("--no-skip-special-tokens", help="Special tokens stay in the text.")
    ] = False
    no_spaces_between_special_tokens: Annotated[
        bool, _sampling("--no-spaces-between-special-tokens", help="None where the tokenizer would put them.")
    ] = False

    def sampling_params(self, **more: Any) -> SamplingParams:
        from jaxserve.sampling_params import SamplingParams

        options = asdict(self)
        options["seed"] = options.pop("request_seed")
        options["logit_bias"] = _json_object("--logit-bias", self.logit_bias)
        for name in ("skip_special_tokens", "spaces_between_special_tokens"):
            options[name] = not options.pop(f"no_{name}")
        return SamplingParams(**options, **more)


def _json_object(name: str, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} {text!r}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f'{name} {text!r}: it is a JSON object, like {{"key": 1}}')
    return value
