"""OLMo 2: norms after attention and feed-forward only, and over all heads of q and of k at once."""

from __future__ import annotations

from jaxserve.models import hf as h
from jaxserve.models.config import DecoderConfig
from jaxserve.models.llama import llama_config, weights

__all__ = ["ARCHITECTURES", "config", "weights"]

ARCHITECTURES = ("Olmo2ForCausalLM",)


def config(hf: h.HFConfig) -> DecoderConfig:
    bias = bool(hf.attention_bias)
    return llama_config(hf, norm_placement="post", qk_norm="full", qkv_bias=bias, out_bias=bias)
