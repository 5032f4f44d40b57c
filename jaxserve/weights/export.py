"""Writing a Llama-shaped decoder as a Hugging Face checkpoint directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save

from jaxserve.models.config import DecoderConfig, LayerConfig, NormConfig, RopeConfig


def save_hf_llama(params: nnx.State, config: DecoderConfig, directory: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` (bfloat16, projections as [out, in]).

    ``params``: the state of a ``Decoder`` (``nnx.state(model)``). Raises ValueError when the config sets an
    option that a Llama checkpoint cannot express.
    """
    _check(config)
    flat = {".".join(map(str, path)): np.asarray(p[...]) for path, p in nnx.to_flat_state(params)}
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: _bfloat16(t) for name, t in hf_llama_tensors(flat, config).items()}
    (directory / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (directory / "config.json").write_text(json.dumps(hf_llama_config(config), indent=2) + "\n")


def hf_llama_tensors(params: Mapping[str, np.ndarray], config: DecoderConfig) -> dict[str, np.ndarray]:
    """The decoder's parameters (dotted names) under Llama's names and in its layouts."""
    d, group = config.hidden_size, config.group_size
    unembedding = params["unembedding.weight"][:, : config.vocab_size].T
    tensors = {"model.norm.weight": params["final_norm.weight"]}
    if config.tied_embeddings:
        tensors["model.embed_tokens.weight"] = unembedding
    else:
        tensors["model.embed_tokens.weight"] = params["embedding.weight"][: config.vocab_size]
        tensors["lm_head.weight"] = unembedding
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        qkv = params[ours + "attn.qkv"]  # [D, K, G+2, H]
        parts = {"q_proj": qkv[:, :, :group], "k_proj": qkv[:, :, group], "v_proj": qkv[:, :, group + 1]}
        for name, part in parts.items():
            tensors[f"{theirs}self_attn.{name}.weight"] = part.reshape(d, -1).T
        tensors[theirs + "self_attn.o_proj.weight"] = params[ours + "attn.o"].reshape(-1, d).T
        gate_up = params[ours + "mlp.gate_up"]  # [D, 2, F]
        tensors[theirs + "mlp.gate_proj.weight"] = gate_up[:, 0].T
        tensors[theirs + "mlp.up_proj.weight"] = gate_up[:, 1].T
        tensors[theirs + "mlp.down_proj.weight"] = params[ours + "mlp.down"].T
        tensors[theirs + "input_layernorm.weight"] = params[ours + "attn_norm.weight"]
        tensors[theirs + "post_attention_layernorm.weight"] = params[ours + "mlp_norm.weight"]
    return tensors


def hf_llama_config(config: DecoderConfig) -> dict[str, Any]:
    """What ``transformers.LlamaConfig`` needs to describe the model."""
    eos = list(config.eos_token_ids)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.ropes[0].theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": None,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "dtype": "bfloat16",
    }


def _check(config: DecoderConfig) -> None:
    """Compare with what a checkpoint can say: the sizes, the norm's epsilon and a plain rope's theta."""
    llama = DecoderConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        layers=(LayerConfig(),) * config.num_layers,
        max_position=config.max_position,
        norm=NormConfig("rms", config.norm.eps),
        ropes=tuple(RopeConfig(config.head_dim, r.theta) for r in config.ropes[:1]),
        tied_embeddings=config.tied_embeddings,
        vocab_padding=config.vocab_padding,
        eos_token_ids=config.eos_token_ids,
    )
    ropes = [(r.kind, r.dim) for r in config.ropes]
    different = {name for name, value in vars(llama).items() if getattr(config, name) != value} - {"ropes"}
    different |= {"ropes"} if ropes != [("default", config.head_dim)] else set()
    if different:
        names = ", ".join(sorted(different))
        raise ValueError(f"not a plain Llama model: its config.json has no place for {names}")


def _bfloat16(tensor: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(tensor.astype(ml_dtypes.bfloat16))
