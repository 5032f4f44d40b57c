"""What a decoder is made of: the options that the model families set. Plain data, no jax."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding over the first ``dim`` entries of each head, halves paired (i, i + dim/2).

    ``factor`` and the fields below it matter only to the kinds that name them.
    """

    dim: int
    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's angles depend on how long its sequence was when it was computed."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class NormConfig:
    """``rms`` or ``layer`` norm; ``offset`` is added to the weight (Gemma stores weight - 1)."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    affine: bool = True
    """Whether there is a weight (and a bias)."""


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer: the window (tokens, None = all), the rope (index or None), and what the
    attention scale is multiplied by."""

    window: int | None = None
    rope: int | None = 0
    scale: float = 1.0


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    Axis letters as in the code: D ``hidden_size``, K ``num_kv_heads``, G ``group_size``, H ``head_dim``,
    F ``intermediate_size``, V ``vocab_size``, L ``num_layers``.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    max_position: int
    norm: NormConfig = NormConfig()
    ropes: tuple[RopeConfig, ...] = ()
    activation: Activation = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """pre: x + f(norm(x)); both (Gemma 2/3): x + norm(f(norm(x))); post (OLMo 2): x + norm(f(x))."""
    residual_norm: bool = False
    """norm(x + f(x)), with no other norm: the original transformer's order (an OPT option)."""
    parallel_residual: bool = False
    final_norm: bool = True
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float | None = None
    learned_positions: int = 0
    """Rows of the learned position table; 0 = none."""
    position_offset: int = 0
    """Added to positions before the table is read (OPT: 2)."""
    embed_dim: int | None = None
    """Width of the token embedding where it differs from D (projected in and out)."""
    tied_embeddings: bool = False
    unembed_bias: bool = False
    kv_copies: int = 1
    """How often each KV head of the checkpoint is repeated, for a mesh with more ranks than heads."""
    vocab_padding: int = 0
    """Rows behind the vocabulary that make it divide over a mesh; their logits are -inf."""
    eos_token_ids: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads are not a multiple of {self.num_kv_heads} KV heads")

    def fit_to(self, tp: int) -> DecoderConfig:
        """The same model for ``tp`` ranks: fewer KV heads than ranks are repeated, the vocabulary is padded.

        Raises ValueError with the numbers when heads or feed-forward columns do not divide.
        """
        if not self._fits(tp):
            sizes = (n for n in range(1, self.num_heads + 1) if self._fits(n))
            raise ValueError(
                f"tensor_parallel_size={tp} does not fit this model: {self.num_heads} query heads, "
                f"{self.num_kv_heads} KV heads, feed-forward size {self.intermediate_size}; "
                f"sizes that fit: {', '.join(map(str, sizes))}"
            )
        kv_heads = max(self.num_kv_heads, tp)
        copies = self.kv_copies * kv_heads // self.num_kv_heads
        return replace(self, num_kv_heads=kv_heads, kv_copies=copies, vocab_padding=-self.vocab_size % tp)

    def _fits(self, tp: int) -> bool:
        kv_divides = self.num_kv_heads % tp == 0 or tp % self.num_kv_heads == 0
        return self.num_heads % tp == 0 and kv_divides and self.intermediate_size % tp == 0

    def layer_groups(self, max_model_len: int) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
        """How far layers look back, each distance once, the farthest first (None = ``max_model_len`` or more), and
        which of these is each layer's own."""
        windows = [None if o.window is None or o.window >= max_model_len else o.window for o in self.layers]
        distinct = sorted(set(windows), key=lambda w: -(w or max_model_len))
        return tuple(distinct), tuple(distinct.index(w) for w in windows)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
