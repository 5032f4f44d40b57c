"""OPT: learned positions counted from 2, ReLU, layer norms before (or, in OPT-350m, after) each half."""

from __future__ import annotations

from collections.abc import Mapping

from jaxserve.models import hf as h
from jaxserve.models.config import DecoderConfig, LayerConfig, NormConfig
from jaxserve.weights.source import Source

ARCHITECTURES = ("OPTForCausalLM",)
PREFIXES = ("model.",)

POSITION_OFFSET = 2  # rows 0 and 1 of the position table are reserved


def config(hf: h.HFConfig) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.ffn_dim,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_attention_heads,
        head_dim=hf.hidden_size // hf.num_attention_heads,
        layers=(LayerConfig(rope=None),) * hf.num_hidden_layers,
        max_position=hf.max_position_embeddings,
        norm=NormConfig("layer", 1e-5, affine=bool(hf.layer_norm_elementwise_affine)),
        activation=h.activation(hf.activation_function),
        gated_mlp=False,
        mlp_bias=bool(hf.enable_bias),
        qkv_bias=bool(hf.enable_bias),
        out_bias=bool(hf.enable_bias),
        residual_norm=not hf.do_layer_norm_before,
        final_norm=bool(hf.do_layer_norm_before and not hf._remove_final_layer_norm),
        learned_positions=hf.max_position_embeddings + POSITION_OFFSET,
        position_offset=POSITION_OFFSET,
        embed_dim=hf.word_embed_proj_dim if hf.word_embed_proj_dim != hf.hidden_size else None,
        tied_embeddings=bool(hf.tie_word_embeddings),
        eos_token_ids=h.eos_token_ids(hf),
    )


def weights(config: DecoderConfig, checkpoint: Mapping[str, Source]) -> h.Weights:
    root = "model.decoder."
    yield from h.vocabulary(config, checkpoint, root + "embed_tokens.weight", "lm_head.weight")
    yield "position_embedding.weight", checkpoint[root + "embed_positions.weight"]
    if config.embed_dim is not None:
        yield "project_in.weight", checkpoint[root + "project_in.weight"].transpose(1, 0)
        yield "project_out.weight", checkpoint[root + "project_out.weight"].transpose(1, 0)
    if config.final_norm and config.norm.affine:
        for leaf in ("weight", "bias"):
            yield f"final_norm.{leaf}", checkpoint[f"{root}final_layer_norm.{leaf}"]
    for i in range(config.num_layers):
        yield from _layer(config, checkpoint, f"{root}layers.{i}.", f"layers.{i}.")


def _layer(config: DecoderConfig, checkpoint: Mapping[str, Source], theirs: str, ours: str) -> h.Weights:
    attn = theirs + "self_attn."
    yield ours + "attn.qkv", h.fuse_qkv(config, *(checkpoint[f"{attn}{x}_proj.weight"] for x in "qkv"))
    yield ours + "attn.o", h.out_projection(config, checkpoint[attn + "out_proj.weight"])
    if config.qkv_bias:
        yield ours + "attn.qkv_bias", h.fuse_qkv(config, *(checkpoint[f"{attn}{x}_proj.bias"] for x in "qkv"))
        yield ours + "attn.o_bias", checkpoint[attn + "out_proj.bias"]
    for name, out in (("fc1", "up"), ("fc2", "down")):
        yield f"{ours}mlp.{out}", checkpoint[f"{theirs}{name}.weight"].transpose(1, 0)
        if config.mlp_bias:
            yield f"{ours}mlp.{out}_bias", checkpoint[f"{theirs}{name}.bias"]
    if not config.norm.affine:
        return
    for name, out in (("self_attn_layer_norm", "attn_norm"), ("final_layer_norm", "mlp_norm")):
        for leaf in ("weight", "bias"):
            yield f"{ours}{out}.{leaf}", checkpoint[f"{theirs}{name}.{leaf}"]
