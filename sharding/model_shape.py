"""A decoder as the planner sees it: sizes, and which part of its parameters each GPU of a mesh holds.

Axis letters as everywhere: T tokens, D model, N query heads, K KV heads, G query heads per KV head, H head dim,
F feed-forward, V vocabulary, L layers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from sharding.mesh import MeshConfig
from sharding.padding import fit_heads, stage_starts, up_to_multiple

VOCABULARY_AXES = ("pp", "tp")
"""Embedding and unembedding are laid over these: no stage has more of them than another."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1}


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder. Parameters are *stored* (they take memory) or *active* (a token is multiplied by them); only
    experts would tell the two apart."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    gated: bool = True
    """Whether the feed-forward has three matrices (gate, up, down) or two."""
    tied: bool = False
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    windows: tuple[int | None, ...] = ()
    """How far each layer looks back, in tokens; () = all layers at everything."""
    embedding_size: int | None = None
    """Width of the token embedding where it differs from D."""
    layer_vectors: int = 0
    """Norm weights and biases of one layer: counted whole on every GPU."""
    tables: int = 0
    """Parameters outside of layers and vocabulary (learned positions, last norm): held whole on every GPU."""

    def __post_init__(self) -> None:
        for name in ("dtype", "kv_dtype"):
            if getattr(self, name) not in DTYPE_BYTES:
                raise ValueError(f"{name}={getattr(self, name)!r}: it is one of {', '.join(DTYPE_BYTES)}")
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.num_layers} layers")

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def kv_dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.kv_dtype]

    @property
    def attention_params(self) -> int:
        """QKV [D, K, G+2, H] and output [K, G, H, D] of one layer."""
        return 2 * self.hidden_size * (self.num_heads + self.num_kv_heads) * self.head_dim

    @property
    def stored_mlp_params(self) -> int:
        return (3 if self.gated else 2) * self.hidden_size * self.intermediate_size

    @property
    def active_mlp_params(self) -> int:
        return self.stored_mlp_params

    @property
    def unembedding_params(self) -> int:
        return self.vocab_size * (self.embedding_size or self.hidden_size)

    @property
    def vocabulary_params(self) -> int:
        return self.unembedding_params * (1 if self.tied else 2)

    @property
    def num_params(self) -> int:
        layer = self.attention_params + self.stored_mlp_params + self.layer_vectors
        return self.num_layers * layer + self.vocabulary_params + self.tables

    def layers_per_stage(self, mesh: MeshConfig) -> int:
        """Stages run one program: where they have not equally many layers, the shorter ones have places that idle."""
        starts = self._starts(mesh.pp)
        return -(-self.num_layers // mesh.pp) if starts is None else max(b - a for a, b in pairwise(starts))

    def stage_windows(self, mesh: MeshConfig) -> Counter[int | None]:
        """How many layers of one stage look back how far."""
        count = self.layers_per_stage(mesh)
        return Counter(self.windows[:count] or (None,) * count)

    def fit_to(self, mesh: MeshConfig) -> ModelShape:
        """The same model for the mesh, as ``DecoderConfig.fit_to`` and ``staged`` make it: KV heads are copied, and
        heads, feed-forward columns and vocabulary filled up until they divide. ValueError with the numbers, and what
        would fit, where that cannot be."""
        if mesh.tp > self.num_heads:
            raise ValueError(
                f"tp={mesh.tp} does not fit {self.num_heads} query heads; at most tp={self.num_heads} does"
            )
        self._check_stages(mesh.pp)
        if mesh.cp > 1 and any(self.windows):
            raise ValueError(f"cp={mesh.cp}: layers with a window cannot share a context")
        _, kv_heads, group = fit_heads(self.num_kv_heads, self.num_heads // self.num_kv_heads, mesh.tp)
        return replace(
            self,
            num_heads=kv_heads * group,
            num_kv_heads=kv_heads,
            intermediate_size=up_to_multiple(self.intermediate_size, mesh.tp),
            vocab_size=up_to_multiple(self.vocab_size, vocabulary_shards(mesh)),
        )

    def _check_stages(self, pp: int) -> None:
        if pp > self.num_layers:
            raise ValueError(f"pp={pp} does not fit {self.num_layers} layers; at most pp={self.num_layers} does")
        if self._starts(pp) is None:
            fits = ", ".join(str(n) for n in range(1, self.num_layers + 1) if self._starts(n) is not None)
            raise ValueError(
                f"pp={pp} puts layers of different windows at one place of its stages; pp that fits: {fits}"
            )

    def _starts(self, pp: int) -> tuple[int, ...] | None:
        return stage_starts(self.windows or (None,) * self.num_layers, pp)

    def params_per_gpu(self, mesh: MeshConfig) -> int:
        """Of a shape that was fitted to the mesh. dp and cp ranks hold the same."""
        layer = (self.attention_params + self.stored_mlp_params) // mesh.tp + self.layer_vectors
        return self.layers_per_stage(mesh) * layer + self.vocabulary_params // vocabulary_shards(mesh) + self.tables

    def weight_bytes_per_gpu(self, mesh: MeshConfig) -> int:
        return self.params_per_gpu(mesh) * self.dtype_bytes

    def kv_bytes_per_gpu(self, mesh: MeshConfig, num_tokens: int) -> float:
        """Of one sequence: K and V of one stage's layers, those with a window keeping no more than that."""
        kept = sum(n * min(num_tokens, w or num_tokens) for w, n in self.stage_windows(mesh).items())
        return kept * 2 * self.num_kv_heads * self.head_dim * self.kv_dtype_bytes / (mesh.tp * mesh.cp)


def vocabulary_shards(mesh: MeshConfig) -> int:
    return prod(getattr(mesh, axis) for axis in VOCABULARY_AXES)
