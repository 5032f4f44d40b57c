"""What the families share in reading a Hugging Face config and a checkpoint's names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from jaxserve.models.config import Activation, DecoderConfig, LayerConfig, RopeConfig, RopeKind
from jaxserve.weights.source import Source, concat, same, stack

HFConfig = Any
"""A transformers PretrainedConfig: defaults filled in, rope settings under ``rope_parameters``."""

Weights = Iterator[tuple[str, Source]]
"""(decoder parameter, where it comes from) pairs."""

ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def activation(name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def head_dim(hf: HFConfig) -> int:
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def eos_token_ids(hf: HFConfig) -> tuple[int, ...]:
    eos = getattr(hf, "eos_token_id", None)
    return tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,)


def window_layers(hf: HFConfig) -> tuple[LayerConfig, ...]:
    """Layers by ``layer_types``, or all with the one ``sliding_window`` where there is no such list."""
    window = getattr(hf, "sliding_window", None)
    types = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown:
        raise ValueError(f"layer type {unknown[0]!r} is not supported; supported: sliding_attention, full_attention")
    return tuple(LayerConfig(window=window if t == "sliding_attention" else None) for t in types)


def rope(hf: HFConfig, dim: int, parameters: Mapping[str, Any] | None = None, *, partial: bool = False) -> RopeConfig:
    """RopeConfig from ``rope_parameters`` (Hugging Face's ``modeling_rope_utils`` says what they mean).

    ``parameters``: those of one type of layers, where types have their own. ``partial``: whether the family turns a
    part of each head only, if the config says so.
    """
    p = dict(parameters if parameters is not None else hf.rope_parameters)
    kind = p.get("rope_type") or p.get("type") or "default"
    kind = "longrope" if kind == "su" else kind
    if kind not in ROPE_KINDS:
        raise ValueError(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    part = p.get("partial_rotary_factor", 1.0)
    if part != 1 and not partial:
        raise ValueError(
            f"partial_rotary_factor={part} is not supported: transformers' {hf.model_type} does not read it, and turns "
            "whole heads; leave it out for that"
        )
    # Beside one dictionary for all layers, a length at the top of the config wins.
    top = None if parameters is not None else getattr(hf, "original_max_position_embeddings", None)
    original = top or p.get("original_max_position_embeddings") or hf.max_position_embeddings
    if kind == "dynamic":
        original = hf.max_position_embeddings
    factor = p.get("factor") or hf.max_position_embeddings / original
    return RopeConfig(
        dim=int(dim * part),
        theta=float(p["rope_theta"]),
        kind=kind,
        factor=float(factor),
        original_max_position=int(original),
        low_freq_factor=p.get("low_freq_factor", 1.0),
        high_freq_factor=p.get("high_freq_factor", 4.0),
        beta_fast=p.get("beta_fast") or 32.0,
        beta_slow=p.get("beta_slow") or 1.0,
        truncate=p.get("truncate", True),
        attention_factor=_attention_factor(kind, float(factor), int(original), p),
        short_factor=tuple(p.get("short_factor") or ()),
        long_factor=tuple(p.get("long_factor") or ()),
    )


def _attention_factor(kind: str, factor: float, original: int, p: Mapping[str, Any]) -> float:
    """What cos and sin are multiplied by: only yarn and longrope have it."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    if p.get("mscale") and p.get("mscale_all_dim"):
        return temperature(p["mscale"]) / temperature(p["mscale_all_dim"])
    return temperature(1.0)


def max_position(hf: HFConfig, ropes: tuple[RopeConfig, ...]) -> int:
    """Longest context. What the config calls the maximum is the unscaled one with dynamic and linear scaling, but for
    Gemma 3's, and may be with yarn; with llama3 and longrope it is the scaled one (as vLLM derives max_model_len)."""
    longest = hf.max_position_embeddings
    unscaled = ("dynamic",) if hf.model_type.startswith("gemma3") else ("dynamic", "linear")
    scaled = [longest * r.factor for r in ropes if r.kind in unscaled]
    scaled += [r.original_max_position * r.factor for r in ropes if r.kind == "yarn"]
    return int(max([longest, *scaled]))


def fuse_qkv(config: DecoderConfig, q: Source, k: Source, v: Source) -> Source:
    """Weights [out, D] (or biases [out]) of q, k and v -> [D, K, G+2, H] (or [K, G+2, H])."""
    heads, group, dim = config.num_kv_heads, config.group_size, config.head_dim
    keys, values = (x.split(0, (heads, 1, dim)) for x in (k, v))
    fused = concat([q.split(0, (heads, group, dim)), keys, values], axis=1)
    return fused if len(fused.shape) == 3 else fused.transpose(3, 0, 1, 2)


def out_projection(config: DecoderConfig, o: Source) -> Source:
    """[D, N*H] -> [K, G, H, D]."""
    return o.transpose(1, 0).split(0, (config.num_kv_heads, config.group_size, config.head_dim))


def fuse_gate_up(gate: Source, up: Source) -> Source:
    """Two [F, D] weights -> [D, 2, F], or two [F] biases -> [2, F]."""
    fused = stack([gate, up], axis=0)
    return fused if len(fused.shape) == 2 else fused.transpose(2, 0, 1)


def vocabulary(config: DecoderConfig, checkpoint: Mapping[str, Source], embed: str, unembed: str) -> Weights:
    """The embedding [V, D] and the unembedding [D, V], from the tensors of these names.

    If they are tied, the unembedding is all there is, from whichever is stored. Raises ValueError where both are, and
    differ: they are not tied then, whatever the config says.
    """
    if config.tied_embeddings:
        name = unembed if unembed in checkpoint and embed not in checkpoint else embed
        if name == embed and unembed in checkpoint and not same(checkpoint[embed], checkpoint[unembed]):
            raise ValueError(
                f"tie_word_embeddings is true, but {unembed} is stored and differs from {embed}: transformers does not "
                "tie them then; set it to false, in config.json or by hf_overrides"
            )
        yield "unembedding.weight", _of_vocabulary(config, checkpoint[name]).transpose(1, 0)
        return
    yield "embedding.weight", _of_vocabulary(config, checkpoint[embed])
    yield "unembedding.weight", checkpoint[unembed].transpose(1, 0)


def _of_vocabulary(config: DecoderConfig, embed: Source) -> Source:
    if embed.shape[0] != config.vocab_size:
        raise ValueError(f"the embedding has {embed.shape[0]} rows, vocab_size is {config.vocab_size}")
    return embed
