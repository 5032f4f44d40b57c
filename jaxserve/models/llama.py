"""Llama, and the families that differ from it by an option: Mistral (window) and Qwen2 (QKV bias, window)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models import hf as h
from jaxserve.models.config import DecoderConfig, LayerConfig, NormConfig
from jaxserve.weights.source import Source

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


def config(hf: h.HFConfig) -> DecoderConfig:
    windowed = hf.model_type in ("mistral", "qwen2")
    is_llama = hf.model_type == "llama"  # the one that reads attention_bias and mlp_bias
    out_bias = is_llama and bool(hf.attention_bias)
    return llama_config(
        hf,
        layers=h.window_layers(hf) if windowed else (LayerConfig(),) * hf.num_hidden_layers,
        qkv_bias=hf.model_type == "qwen2" or out_bias,
        out_bias=out_bias,
        mlp_bias=is_llama and bool(hf.mlp_bias),
    )


def llama_config(hf: h.HFConfig, **options: Any) -> DecoderConfig:
    """The config of a Llama-shaped model; ``options`` set or replace fields of DecoderConfig."""
    ropes = options.pop("ropes", None) or (h.rope(hf, h.head_dim(hf)),)
    fields: dict[str, Any] = {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "intermediate_size": hf.intermediate_size,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads,
        "head_dim": h.head_dim(hf),
        "layers": (LayerConfig(),) * hf.num_hidden_layers,
        "max_position": h.max_position(hf, ropes),
        "norm": NormConfig("rms", hf.rms_norm_eps),
        "ropes": ropes,
        "activation": h.activation(getattr(hf, "hidden_activation", None) or hf.hidden_act),
        "tied_embeddings": bool(hf.tie_word_embeddings),
        "eos_token_ids": h.eos_token_ids(hf),
    }
    return DecoderConfig(**(fields | options))


def weights(config: DecoderConfig, checkpoint: Mapping[str, Source]) -> h.Weights:
    """Everything that the config asks for, under Llama's names."""
    yield from h.vocabulary(config, checkpoint, "model.embed_tokens.weight", "lm_head.weight")
    yield "final_norm.weight", checkpoint["model.norm.weight"]
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}.", f"layers.{i}."
        yield from attention_weights(config, checkpoint, theirs + "self_attn.", ours + "attn.")
        yield from mlp_weights(config, checkpoint, theirs + "mlp.", ours + "mlp.")
        yield from norm_weights(config, checkpoint, theirs, ours)


def attention_weights(config: DecoderConfig, checkpoint: Mapping[str, Source], theirs: str, ours: str) -> h.Weights:
    q, k, v = (checkpoint[f"{theirs}{x}_proj.weight"] for x in "qkv")
    yield ours + "qkv", h.fuse_qkv(config, q, k, v)
    yield ours + "o", h.out_projection(config, checkpoint[theirs + "o_proj.weight"])
    if config.qkv_bias:
        q, k, v = (checkpoint[f"{theirs}{x}_proj.bias"] for x in "qkv")
        yield ours + "qkv_bias", h.fuse_qkv(config, q, k, v)
    if config.out_bias:
        yield ours + "o_bias", checkpoint[theirs + "o_proj.bias"]
    if config.qk_norm == "head":
        yield ours + "q_norm.weight", checkpoint[theirs + "q_norm.weight"]
        yield ours + "k_norm.weight", checkpoint[theirs + "k_norm.weight"]
    elif config.qk_norm == "full":
        kv_heads, group, dim = config.num_kv_heads, config.group_size, config.head_dim
        yield ours + "q_norm.weight", checkpoint[theirs + "q_norm.weight"].split(0, (kv_heads, group, dim))
        yield ours + "k_norm.weight", checkpoint[theirs + "k_norm.weight"].split(0, (kv_heads, dim))


def mlp_weights(config: DecoderConfig, checkpoint: Mapping[str, Source], theirs: str, ours: str) -> h.Weights:
    gate, up = checkpoint[theirs + "gate_proj.weight"], checkpoint[theirs + "up_proj.weight"]
    yield ours + "gate_up", h.fuse_gate_up(gate, up)
    yield ours + "down", checkpoint[theirs + "down_proj.weight"].transpose(1, 0)
    if config.mlp_bias:
        gate, up = checkpoint[theirs + "gate_proj.bias"], checkpoint[theirs + "up_proj.bias"]
        yield ours + "gate_up_bias", h.fuse_gate_up(gate, up)
        yield ours + "down_bias", checkpoint[theirs + "down_proj.bias"]


NORM_NAMES = {
    "pre": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {"post_attn_norm": "post_attention_layernorm", "post_mlp_norm": "post_feedforward_layernorm"},
    "both": {
        "attn_norm": "input_layernorm",
        "post_attn_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
}


def norm_weights(config: DecoderConfig, checkpoint: Mapping[str, Source], theirs: str, ours: str) -> h.Weights:
    for mine, name in NORM_NAMES[config.norm_placement].items():
        yield f"{ours}{mine}.weight", checkpoint[f"{theirs}{name}.weight"]
