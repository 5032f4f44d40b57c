"""GPT-NeoX (Pythia): parallel residual, partial rotary, q, k and v interleaved head by head."""

from __future__ import annotations

from collections.abc import Mapping

from jaxserve.models import hf as h
from jaxserve.models.config import DecoderConfig, LayerConfig, NormConfig
from jaxserve.weights.source import Source

ARCHITECTURES = ("GPTNeoXForCausalLM",)
PREFIXES = ("gpt_neox.",)


def config(hf: h.HFConfig) -> DecoderConfig:
    dim = hf.hidden_size // hf.num_attention_heads
    ropes = (h.rope(hf, dim, partial=True),)
    bias = bool(getattr(hf, "attention_bias", True))
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_attention_heads,
        head_dim=dim,
        layers=(LayerConfig(),) * hf.num_hidden_layers,
        max_position=h.max_position(hf, ropes),
        norm=NormConfig("layer", hf.layer_norm_eps),
        ropes=ropes,
        activation=h.activation(hf.hidden_act),
        gated_mlp=False,
        mlp_bias=True,
        qkv_bias=bias,
        out_bias=bias,
        parallel_residual=bool(hf.use_parallel_residual),
        tied_embeddings=bool(hf.tie_word_embeddings),
        eos_token_ids=h.eos_token_ids(hf),
    )


def weights(config: DecoderConfig, checkpoint: Mapping[str, Source]) -> h.Weights:
    yield from h.vocabulary(config, checkpoint, "gpt_neox.embed_in.weight", "embed_out.weight")
    yield from _linear(checkpoint, "gpt_neox.final_layer_norm", "final_norm.weight", "final_norm.bias")
    for i in range(config.num_layers):
        theirs, ours = f"gpt_neox.layers.{i}.", f"layers.{i}."
        split = (config.num_heads, 3, config.head_dim)
        qkv = checkpoint[theirs + "attention.query_key_value.weight"].split(0, split)
        yield ours + "attn.qkv", qkv.transpose(3, 0, 1, 2)
        yield ours + "attn.o", h.out_projection(config, checkpoint[theirs + "attention.dense.weight"])
        if config.qkv_bias:
            yield ours + "attn.qkv_bias", checkpoint[theirs + "attention.query_key_value.bias"].split(0, split)
            yield ours + "attn.o_bias", checkpoint[theirs + "attention.dense.bias"]
        for name, out in (("dense_h_to_4h", "up"), ("dense_4h_to_h", "down")):
            yield f"{ours}mlp.{out}", checkpoint[f"{theirs}mlp.{name}.weight"].transpose(1, 0)
            yield f"{ours}mlp.{out}_bias", checkpoint[f"{theirs}mlp.{name}.bias"]
        for name, out in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "mlp_norm")):
            yield from _linear(checkpoint, theirs + name, f"{ours}{out}.weight", f"{ours}{out}.bias")


def _linear(checkpoint: Mapping[str, Source], theirs: str, weight: str, bias: str) -> h.Weights:
    yield weight, checkpoint[theirs + ".weight"]
    yield bias, checkpoint[theirs + ".bias"]
