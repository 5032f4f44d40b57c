"""Gemma 2 and Gemma 3 (text): norms around both halves, scaled embeddings, soft-caps, alternating windows."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.models import hf as h
from jaxserve.models.config import DecoderConfig, NormConfig
from jaxserve.models.llama import llama_config, weights

__all__ = ["ARCHITECTURES", "config", "weights"]

ARCHITECTURES = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")


def config(hf: h.HFConfig) -> DecoderConfig:
    layers = h.window_layers(hf)
    ropes = None
    if hf.model_type == "gemma3_text":
        kinds = ("sliding_attention", "full_attention")
        ropes = tuple(h.rope(hf, h.head_dim(hf), hf.rope_parameters[kind]) for kind in kinds)
        layers = tuple(
            replace(layer, rope=kinds.index(kind)) for layer, kind in zip(layers, hf.layer_types, strict=True)
        )
    if getattr(hf, "use_bidirectional_attention", None):
        raise ValueError("use_bidirectional_attention=True is not supported: this engine decodes causally")
    bias = bool(hf.attention_bias)
    return llama_config(
        hf,
        layers=layers,
        ropes=ropes,
        norm=NormConfig("rms", hf.rms_norm_eps, offset=1.0),
        norm_placement="both",
        qk_norm="head" if hf.model_type == "gemma3_text" else "none",
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=hf.query_pre_attn_scalar**-0.5,
        attention_softcap=hf.attn_logit_softcapping if hf.model_type == "gemma2" else None,
        logit_softcap=hf.final_logit_softcapping,
        embed_scale=hf.hidden_size**0.5,
    )
