"""GPT-2: learned positions, layer norms, [in, out] weights with q, k and v side by side."""

from __future__ import annotations

from collections.abc import Mapping

from jaxserve.models import hf as h
from jaxserve.models.config import DecoderConfig, LayerConfig, NormConfig
from jaxserve.weights.source import Source

ARCHITECTURES = ("GPT2LMHeadModel",)
PREFIXES = ("transformer.",)


def config(hf: h.HFConfig) -> DecoderConfig:
    by_depth = hf.scale_attn_by_inverse_layer_idx
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.n_embd,
        intermediate_size=hf.n_inner or 4 * hf.n_embd,
        num_heads=hf.n_head,
        num_kv_heads=hf.n_head,
        head_dim=hf.n_embd // hf.n_head,
        attention_scale=None if hf.scale_attn_weights else 1.0,
        layers=tuple(LayerConfig(rope=None, scale=1 / (i + 1) if by_depth else 1.0) for i in range(hf.n_layer)),
        max_position=hf.n_positions,
        norm=NormConfig("layer", hf.layer_norm_epsilon),
        activation=h.activation(hf.activation_function),
        gated_mlp=False,
        mlp_bias=True,
        qkv_bias=True,
        out_bias=True,
        learned_positions=hf.n_positions,
        tied_embeddings=bool(hf.tie_word_embeddings),
        eos_token_ids=h.eos_token_ids(hf),
    )


def weights(config: DecoderConfig, checkpoint: Mapping[str, Source]) -> h.Weights:
    d = config.hidden_size
    yield from h.vocabulary(config, checkpoint, "transformer.wte.weight", "lm_head.weight")
    yield "position_embedding.weight", checkpoint["transformer.wpe.weight"]
    yield from _norm(checkpoint, "transformer.ln_f", "final_norm")
    for i in range(config.num_layers):
        theirs, ours = f"transformer.h.{i}.", f"layers.{i}."
        for leaf, out in (("weight", "attn.qkv"), ("bias", "attn.qkv_bias")):
            fused = checkpoint[f"{theirs}attn.c_attn.{leaf}"]
            fused = fused.transpose(1, 0) if leaf == "weight" else fused
            yield ours + out, h.fuse_qkv(config, *(fused.narrow(0, j * d, d) for j in range(3)))
        o = checkpoint[theirs + "attn.c_proj.weight"].transpose(1, 0)
        yield ours + "attn.o", h.out_projection(config, o)
        yield ours + "attn.o_bias", checkpoint[theirs + "attn.c_proj.bias"]
        for name, out in (("c_fc", "up"), ("c_proj", "down")):
            yield f"{ours}mlp.{out}", checkpoint[f"{theirs}mlp.{name}.weight"]
            yield f"{ours}mlp.{out}_bias", checkpoint[f"{theirs}mlp.{name}.bias"]
        yield from _norm(checkpoint, theirs + "ln_1", ours + "attn_norm")
        yield from _norm(checkpoint, theirs + "ln_2", ours + "mlp_norm")


def _norm(checkpoint: Mapping[str, Source], theirs: str, ours: str) -> h.Weights:
    for leaf in ("weight", "bias"):
        yield f"{ours}.{leaf}", checkpoint[f"{theirs}.{leaf}"]
