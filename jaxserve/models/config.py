"""What a decoder is made of: the options that the model families set. Plain data, no jax."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from sharding.padding import fit_heads, stage_starts, up_to_multiple

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
    """How often each KV head of the checkpoint is there; its query heads are spread over its copies."""
    head_padding: int = 0
    """Of ``num_heads``, how many have only zero weights: those that fill up copies, and those of zero KV heads."""
    kv_head_padding: int = 0
    """Of ``num_kv_heads``, how many have only zero weights: the last ones."""
    vocab_padding: int = 0
    """Rows behind the vocabulary that make it divide over a mesh; their logits are -inf."""
    num_stages: int = 1
    """Pipeline stages that the layers are cut into (``staged``)."""
    eos_token_ids: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads are not a multiple of {self.num_kv_heads} KV heads")

    def fit_to(self, tp: int, vocab_shards: int | None = None) -> DecoderConfig:
        """This model, as its checkpoint has it, for ``tp`` ranks: KV heads are copied, and heads, feed-forward columns
        and the vocabulary filled up with zeros until they divide. It computes the same.

        ``vocab_shards``: ranks that share the vocabulary, if not these. Raises ValueError with the numbers where some
        rank would have no query head.
        """
        assert (self.kv_copies, self.head_padding, self.vocab_padding) == (1, 0, 0), "fitted already"
        if tp > self.num_heads:
            raise ValueError(
                f"tensor_parallel_size={tp} does not fit this model: {self.num_heads} query heads, "
                f"{self.num_kv_heads} KV heads; the largest size that fits is {self.num_heads}"
            )
        copies, kv_heads, group = fit_heads(self.num_kv_heads, self.group_size, tp)
        return replace(
            self,
            num_heads=kv_heads * group,
            num_kv_heads=kv_heads,
            intermediate_size=up_to_multiple(self.intermediate_size, tp),
            kv_copies=copies,
            head_padding=kv_heads * group - self.num_heads,
            kv_head_padding=kv_heads - self.num_kv_heads * copies,
            vocab_padding=-self.vocab_size % (vocab_shards or tp),
        )

    def layer_groups(self, max_model_len: int) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
        """How far layers look back, each distance once, the farthest first (None = ``max_model_len`` or more), and
        which of these is each layer's own."""
        windows = [None if o.window is None or o.window >= max_model_len else o.window for o in self.stage_layers]
        distinct = sorted(set(windows), key=lambda w: -(w or max_model_len))
        return tuple(distinct), tuple(distinct.index(w) for w in windows)

    def staged(self, num_stages: int) -> DecoderConfig:
        """The same model cut into stages of layers.

        Every stage runs the same program, so layer i of all stages must be of one kind; raises ValueError where that
        cannot be. Where stages differ in length, the later ones are shorter, and idle for it.
        """
        if num_stages > self.num_layers:
            raise ValueError(f"pipeline_parallel_size={num_stages}: this model has {self.num_layers} layers")
        if stage_starts(self.layers, num_stages) is None:
            sizes = [n for n in range(1, self.num_layers + 1) if stage_starts(self.layers, n) is not None]
            raise ValueError(
                f"pipeline_parallel_size={num_stages} puts layers of different kinds (windows, rotary embeddings, "
                f"scales) at the same place of different stages; sizes that fit: {', '.join(map(str, sizes))}"
            )
        return replace(self, num_stages=num_stages)

    @property
    def _starts(self) -> tuple[int, ...]:
        starts = stage_starts(self.layers, self.num_stages)
        assert starts is not None, "staged() refuses it"
        return starts

    @property
    def layers_per_stage(self) -> int:
        """Of the longest stage: the places that all of them have."""
        return max(end - start for start, end in pairwise(self._starts))

    @property
    def has_idle_places(self) -> bool:
        """Whether some stage has fewer layers than places."""
        return self.layers_per_stage * self.num_stages > self.num_layers

    def layer_at(self, stage: int, slot: int) -> int | None:
        """The layer that is the ``slot``-th of a stage; None where the stage has fewer."""
        first, end = self._starts[stage : stage + 2]
        return first + slot if first + slot < end else None

    @property
    def stage_layers(self) -> tuple[LayerConfig, ...]:
        """Of every stage alike."""
        return self.layers[: self.layers_per_stage]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
