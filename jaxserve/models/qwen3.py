"""Qwen3: Llama with a norm on every query and key head, and a head_dim of its own."""

from __future__ import annotations

from jaxserve.models import hf as h
from jaxserve.models.config import DecoderConfig
from jaxserve.models.llama import llama_config, weights

__all__ = ["ARCHITECTURES", "config", "weights"]

ARCHITECTURES = ("Qwen3ForCausalLM",)


def config(hf: h.HFConfig) -> DecoderConfig:
    bias = bool(hf.attention_bias)
    return llama_config(hf, layers=h.window_layers(hf), qk_norm="head", qkv_bias=bias, out_bias=bias)
