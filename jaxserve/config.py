"""What an engine is told to be: validated once, frozen afterwards. No jax here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

GIB = 1 << 30

SWAP_CHUNK = 8
"""KV blocks of every layer that are moved to host memory or back at once; a request's last chunk may be part empty."""

PreemptionMode = Literal["auto", "swap", "recompute"]
POLICIES = ("fcfs", "priority", "fair")
TYPES_IN_WORDS: Mapping[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    NoneType: "None",
    tuple[int, ...]: "a list of whole numbers",
}


def check_types(config: Any, what: str = "") -> None:
    """ValueError for the first field of a dataclass whose value is not of the type that the field declares. A whole
    number is a number too; True and False are none."""
    for name, declared in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _is_of(value, declared):
            raise ValueError(f"{what}{name}={value!r}: it is {_in_words(declared)}")


def _is_of(value: Any, declared: Any) -> bool:
    kind, arguments = get_origin(declared) or declared, get_args(declared)
    if kind in (Union, UnionType):
        return any(_is_of(value, argument) for argument in arguments)
    if kind is Literal:
        return isinstance(value, str) and value in arguments
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    if kind is tuple:  # JSON has lists
        return isinstance(value, list | tuple) and all(_is_of(item, arguments[0]) for item in value)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(
            _is_of(key, arguments[0]) and _is_of(item, arguments[1]) for key, item in value.items()
        )
    return kind is Any or isinstance(value, kind)


def _in_words(declared: Any) -> str:
    kind, arguments = get_origin(declared) or declared, get_args(declared)
    if kind in (Union, UnionType, Literal):
        *most, last = [str(a) if kind is Literal else _in_words(a) for a in arguments]
        return f"{', '.join(most)} or {last}"
    if kind is Mapping:
        return "a mapping whose keys are texts" + (f", to {arguments[1].__name__}" if arguments[1] is not Any else "")
    return TYPES_IN_WORDS.get(declared) or f"a {kind.__name__}"


@dataclass(frozen=True)
class TenantConfig:
    """What one tenant is owed under the ``fair`` policy."""

    weight: float = 1.0
    """Its share of the service while others wait too, relative to theirs."""
    max_tokens_per_second: float | None = None
    """Most tokens computed for it per second, averaged over a second; None = no cap."""
    ttft_target: float | None = None
    """Seconds from arrival within which its requests should get their first token; a tenant that is past it goes
    first among those that are level with it."""

    def __post_init__(self) -> None:
        check_types(self, "tenant ")
        for name in ("weight", "max_tokens_per_second", "ttft_target"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"tenant {name}={value!r}: it is a number above 0")


@dataclass(frozen=True)
class FairnessConfig:
    """The ``fair`` policy: tenants by name, and what counts as service."""

    tenants: Mapping[str, TenantConfig] = field(default_factory=dict)
    """Tenants not named here have weight 1, no cap and no target."""
    prompt_token_weight: float = 1.0
    """Service per prompt token computed; tokens from the prefix cache, or computed again, are free."""
    output_token_weight: float = 2.0
    """Service per generated token."""
    slack: float = 8.0
    """How far, in service per weight, a tenant may be ahead of another that waits before it is held back."""

    def __post_init__(self) -> None:
        check_types(self, "fairness ")
        for name in ("prompt_token_weight", "output_token_weight", "slack"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"fairness {name}={value!r}: it is a number above 0")

    @classmethod
    def of(cls, value: FairnessConfig | Mapping[str, Any] | None) -> FairnessConfig:
        """From plain dictionaries, such as a JSON file holds; ValueError for names that do not exist."""
        if value is None or isinstance(value, FairnessConfig):
            return value or cls()
        options = dict(_known_only("fairness", cls, value))
        tenants = options.pop("tenants", {})
        if isinstance(tenants, Mapping):
            tenants = {
                name: t if isinstance(t, TenantConfig) else TenantConfig(**_known_only("tenant", TenantConfig, t))
                for name, t in tenants.items()
            }
        return cls(tenants=tenants, **options)


@dataclass(frozen=True)
class SwapConfig:
    """Host memory for the blocks of preempted requests, and the rates by which swapping or recomputing is chosen."""

    num_blocks: int = 0
    """KV blocks of host memory per replica; 0 = preempted requests are always recomputed."""
    mode: PreemptionMode = "auto"
    """auto = whichever the rates say is quicker; swap still recomputes when host memory is full."""
    block_bytes: int = 1
    """Bytes of one block of every layer, on all devices."""
    bytes_per_second: float = 1.0
    """Between device and host."""
    prefill_tokens_per_second: float = 1.0
    """At which prompts, and preempted requests, are computed."""

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "swap", "recompute"):
            raise ValueError(f"preemption_mode={self.mode!r}: it is auto, swap or recompute")
        if self.mode == "swap" and not self.num_blocks:
            raise ValueError("preemption_mode='swap' needs host memory: set swap_space (GiB) above 0")


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one replica's batch and cache, and how its tokens are shared out."""

    max_model_len: int
    """Longest sequence, prompt and output together, in tokens."""
    max_num_seqs: int
    """Sequences in one step."""
    max_num_batched_tokens: int
    """Tokens in one step."""
    block_size: int
    """Tokens in one KV block."""
    num_blocks: int
    """KV blocks of the layers that look back farthest, the null block included."""
    windows: tuple[int | None, ...] = (None,)
    """Groups of layers by the tokens that they look back on (None = all), the farthest first; each has tables and
    blocks of its own."""
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    """Most tokens of one prompt in a step while others decode; 0 = as many as the step has room for."""
    max_num_partial_prefills: int = 0
    """Requests that may be in the middle of their prompt at once; 0 = any number."""
    enable_prefix_caching: bool = True
    keys_depend_on_prompt_length: bool = False
    """Whether a token's key depends on how long its prompt is (some rotary embeddings): then blocks are shared
    between prompts of the same length only."""
    num_scheduler_steps: int = 1
    """Decode steps in one call where nothing needs the host in between."""
    decode_buckets: tuple[int, ...] = ()
    """Numbers of rows that steps with one token per sequence are padded to; () = none are padded."""
    token_buckets: tuple[int, ...] = ()
    """The same for all other steps."""
    policy: str = "fcfs"
    """One of ``POLICIES``, or "module:Class"."""
    fairness: FairnessConfig = field(default_factory=FairnessConfig)
    swap: SwapConfig = field(default_factory=SwapConfig)
    max_num_queued_requests: int | None = None
    """Waiting requests, all replicas together, beyond which new ones are rejected; None = no limit."""
    max_num_queued_tokens: int | None = None
    """The same for the prompt tokens of waiting requests."""
    num_replicas: int = 1
    num_stages: int = 1
    """Pipeline stages: a sampled token is there as many steps after its request was scheduled."""

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "num_blocks"):
            _whole_number(name, getattr(self, name), 1)
        for name in ("num_scheduler_steps", "num_replicas", "num_stages"):
            _whole_number(name, getattr(self, name), 1)
        for name in ("long_prefill_token_threshold", "max_num_partial_prefills"):
            _whole_number(name, getattr(self, name), 0)
        for name in ("max_num_queued_requests", "max_num_queued_tokens"):
            if getattr(self, name) is not None:
                _whole_number(name, getattr(self, name), 1)
        if self.policy not in POLICIES and ":" not in self.policy:
            raise ValueError(f"scheduling_policy={self.policy!r}: it is one of {', '.join(POLICIES)}, or module:Class")
        if self.num_blocks < 2:
            raise ValueError(f"num_blocks={self.num_blocks}: block 0 holds padding, so at least 2 are needed")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is less than max_num_seqs="
                f"{self.max_num_seqs}: every sequence must be able to get a token in each step"
            )
        self._check_chunking()
        if self.num_stages > 1 and self.num_scheduler_steps > 1:
            raise ValueError(
                f"num_scheduler_steps={self.num_scheduler_steps} is not supported with pipeline stages: leave it at 1"
            )
        if self.num_stages > 1 and self.swap.num_blocks:
            raise ValueError("swap_space is not supported with pipeline stages: leave it at 0")

    def _check_chunking(self) -> None:
        if self.enable_chunked_prefill:
            return
        if self.max_num_batched_tokens < self.max_model_len:
            raise ValueError(
                f"enable_chunked_prefill=False needs max_num_batched_tokens >= max_model_len, got "
                f"{self.max_num_batched_tokens} < {self.max_model_len}"
            )
        if self.long_prefill_token_threshold:
            raise ValueError(
                f"long_prefill_token_threshold={self.long_prefill_token_threshold} cuts prompts into chunks, and "
                "enable_chunked_prefill=False forbids it: leave one of them out"
            )
        if self.policy == "fair":
            raise ValueError("scheduling_policy='fair' shares steps out in chunks: enable_chunked_prefill must be True")

    @property
    def blocks_per_sequence(self) -> int:
        """Blocks that a sequence of ``max_model_len`` tokens fills: the width of the block tables."""
        return -(-self.max_model_len // self.block_size)

    def bucket(self, num_rows: int, one_token_each: bool) -> int:
        """Rows of the smallest step that has room for ``num_rows``."""
        buckets = self.decode_buckets if one_token_each else self.token_buckets
        return next((b for b in buckets if b >= num_rows), num_rows)

    def blocks_of(self, window: int | None) -> int:
        """Blocks of the layers with ``window``. Those that look back less far than others need fewer: twice what
        ``max_num_seqs`` windows and one step's tokens fill, so that as much again is left for cached prefixes."""
        if window is None or window == self.windows[0]:
            return self.num_blocks
        chunk = -(-self.max_num_batched_tokens // self.block_size)
        windows = self.max_num_seqs * (-(-(window - 1) // self.block_size) + 2)
        return min(self.num_blocks, 1 + 2 * (windows + chunk))

    def most_blocks(self, window: int | None, num_tokens: int) -> int:
        """Blocks that a sequence growing to ``num_tokens`` holds at most at one time."""
        every = -(-num_tokens // self.block_size)
        if window is None:
            return every
        chunk = min(num_tokens, self.max_num_batched_tokens)
        return min(every, -(-(window - 1 + chunk) // self.block_size) + 1)


def _whole_number(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: it is a whole number of at least {least}")


def _known_only(what: str, cls: type, options: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(options, Mapping):
        raise ValueError(f"{what} {options!r}: it is a mapping from names to values")
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{what} option {unknown[0]!r} does not exist; there are {', '.join(known)}")
    return options


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Numbers of sequences that a decoding step is compiled for: powers of two, and from 16 on the halfway points,
    so that at most a third of a larger step is padding."""
    sizes, size = {max_num_seqs}, 1
    while size < max_num_seqs:
        sizes.add(size)
        if size >= 16 and size * 3 // 2 < max_num_seqs:
            sizes.add(size * 3 // 2)
        size *= 2
    return tuple(sorted(sizes))


def token_buckets(max_num_batched_tokens: int, smallest: int = 64) -> tuple[int, ...]:
    """Numbers of tokens that a step with prompt chunks is compiled for: powers of two from ``smallest`` on, and the
    halfway points, so that at most a third of a larger step is padding."""
    sizes, size = {max_num_batched_tokens}, smallest
    while size < max_num_batched_tokens:
        sizes.add(size)
        if size * 3 // 2 < max_num_batched_tokens:
            sizes.add(size * 3 // 2)
        size *= 2
    return tuple(sorted(sizes))
