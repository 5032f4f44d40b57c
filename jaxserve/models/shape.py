"""A decoder as the planner sees it."""

from __future__ import annotations

from jaxserve.models.config import DecoderConfig
from sharding.model_shape import ModelShape


def model_shape(decoder: DecoderConfig, dtype: str, kv_dtype: str) -> ModelShape:
    """What the planner needs to know of a decoder."""
    d, norm = decoder.hidden_size, _norm_size(decoder)
    embedding = decoder.embed_dim or d
    projections = 2 * d * embedding if embedding != d else 0
    return ModelShape(
        num_layers=decoder.num_layers,
        hidden_size=d,
        num_heads=decoder.num_heads,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        intermediate_size=decoder.intermediate_size,
        vocab_size=decoder.vocab_size,
        gated=decoder.gated_mlp,
        tied=decoder.tied_embeddings,
        dtype=dtype,
        kv_dtype="float8" if kv_dtype.startswith("float8") else kv_dtype,
        windows=tuple(layer.window for layer in decoder.layers),
        embedding_size=embedding,
        layer_vectors=_layer_vectors(decoder, norm),
        tables=decoder.learned_positions * d + projections + decoder.final_norm * norm,
    )


def _norm_size(decoder: DecoderConfig) -> int:
    """Parameters of a norm over D."""
    return decoder.hidden_size * decoder.norm.affine * (2 if decoder.norm.kind == "layer" else 1)


def _layer_vectors(decoder: DecoderConfig, norm: int) -> int:
    """Norms and biases of one layer."""
    heads, head = decoder.num_heads + decoder.num_kv_heads, decoder.head_dim
    qk_norms = {"none": 0, "head": 2 * head, "full": heads * head}[decoder.qk_norm]
    qkv_bias = decoder.qkv_bias * (heads + decoder.num_kv_heads) * head
    columns = decoder.intermediate_size * (2 if decoder.gated_mlp else 1)
    mlp_bias = decoder.mlp_bias * (columns + decoder.hidden_size)
    norms = norm * (4 if decoder.norm_placement == "both" else 2)
    return norms + qk_norms + qkv_bias + decoder.out_bias * decoder.hidden_size + mlp_bias
