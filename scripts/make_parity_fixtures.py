"""Make the Hugging Face parity fixtures in tests/parity/fixtures.

Each case is a tiny random checkpoint, in the layout and with the config.json that Hugging Face transformers
writes, plus what transformers itself computes from it in float32 on a CPU with eager attention. The parity
tests load the checkpoint with this project and compare. Nothing is downloaded: every checkpoint is made from
a config class and a seed.

This script needs PyTorch and transformers, which this project does not depend on. Run it from an environment
of its own, with Python 3.11:

    python3.11 -m venv hf-env
    hf-env/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors numpy

(the CPU build of torch is enough). Then, from the repository root:

    hf-env/bin/python scripts/make_parity_fixtures.py

rope_frequencies.json holds, for one rope_parameters of each kind, what positions are multiplied by in a sequence of
a given length. Angles grow with the position, and so does what the last bit of a frequency makes of them; prompts
long enough to show it would make large fixtures.

A case folder holds
    config.json        as transformers saves it, or rewritten with the older key names ("*_legacy" cases)
    model.safetensors  bfloat16 weights (one case has several shards and an index instead)
    expected.npz       for prompt i = 0, 1, 2:
        prompt_i    int32 [len]       token ids; the lengths are 1, 17 and 45
        logprobs_i  float32 [len, V]  log_softmax of the logits at every position of the prompt
        greedy_i    int32 [12]        argmax continuation, decoded with the KV cache
        greedy_nocache_i  int32 [12]  only in the dynamic NTK case: the continuation when every step
                                      recomputes the whole sequence; the two differ by definition there

Every case is checked before it is written, and the script stops where a check fails:
  * the saved checkpoint, loaded back, gives the log-probabilities of the model it was saved from;
  * decoding with and without the KV cache gives the same tokens (but in the dynamic NTK case);
  * no greedy step is a near tie (top-2 logit gap above MIN_GAP), no continuation holds the EOS id or is one
    token over and over; the seed moves on until this holds;
  * each config change listed in the case moves some log-probability by more than MIN_EFFECT, so a loader that
    ignores the key cannot pass (GELU and its approximation are closer, see MIN_FINE_EFFECT);
  * float32 and float64 give nearly the same log-probabilities, so that a test can have a tight tolerance;
  * reversing any one tensor along its first axis does so too, so a tensor that is ignored, permuted or mixed
    up with another cannot pass.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

MISSING: str | None = None
if TYPE_CHECKING:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers
    from safetensors.torch import load_file, save_file
else:
    try:
        import torch
        import transformers
        from safetensors.torch import load_file, save_file
    except ModuleNotFoundError as error:  # --help and --list work without them
        MISSING = error.name

TESTED_VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "tests" / "parity" / "fixtures"

PROMPT_LENGTHS = (1, 17, 45)
GREEDY_STEPS = 12
MIN_GAP = 1e-2  # smallest allowed difference of the two best logits at a greedy step
MIN_EFFECT = 1e-2  # smallest allowed effect of a config key or a tensor on the log-probabilities
MIN_FINE_EFFECT = 1e-3  # the same for the approximation of GELU; tests need a tolerance well below this
MIN_DISTINCT = 4  # smallest allowed number of different tokens in a greedy continuation
RELOAD_TOLERANCE = 1e-5
CACHE_TOLERANCE = 1e-3
MAX_ROUNDING = 2e-4  # largest allowed difference of float32 and float64, so that tests can be strict
MAX_ATTEMPTS = 200

JsonDict = dict[str, Any]
Tensors = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Case:
    """One fixture folder.

    name: the folder.
    about: one line on what the case is for.
    config: arguments of the transformers config class, and its model_type.
    checks: label -> changed config.json keys; each change must move the log-probabilities by MIN_EFFECT.
    fine_checks: the same for changes with a small effect (which GELU), which must reach MIN_FINE_EFFECT.
    rename: config.json keys to set after saving, to write the older spelling of the same model.
    drop: config.json keys to remove after saving.
    rewrite: turns the saved tensors into those of another layout that transformers reads as the same model.
    max_shard_size: passed to save_pretrained.
    cache_matters: decoding with and without the KV cache differ by definition (dynamic NTK).
    no_effect: ends of names of tensors that cannot change the result (checked as well).
    """

    name: str
    about: str
    config: JsonDict
    checks: dict[str, JsonDict] = field(default_factory=dict)
    fine_checks: dict[str, JsonDict] = field(default_factory=dict)
    rename: JsonDict = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    rewrite: Callable[[Tensors, JsonDict], Tensors] | None = None
    max_shard_size: str = "1GB"
    cache_matters: bool = False
    no_effect: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------------
# The cases
# ------------------------------------------------------------------------------------------------------------


def rope(theta: float = 500.0, rope_type: str = "default", **options: Any) -> JsonDict:
    """A rope_parameters dictionary. The small default base makes every frequency matter at these lengths."""
    return {"rope_type": rope_type, "rope_theta": theta, **options}


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    **IDS,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
NEOX_SMALL = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
LLAMA = {**SMALL, "model_type": "llama", "vocab_size": 103, "rope_parameters": rope()}
MISTRAL = {**SMALL, "model_type": "mistral", "vocab_size": 107, "rope_parameters": rope()}
QWEN2 = {**SMALL, "model_type": "qwen2", "vocab_size": 109, "rope_parameters": rope()}
QWEN3 = {**SMALL, "model_type": "qwen3", "vocab_size": 111, "rope_parameters": rope()}
PHI3 = {**SMALL, "model_type": "phi3", "vocab_size": 101, "rope_parameters": rope()}
GEMMA2 = {
    **SMALL,
    "model_type": "gemma2",
    "vocab_size": 113,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "head_dim": 24,
    "query_pre_attn_scalar": 40,
    "sliding_window": 8,
    "tie_word_embeddings": True,
    "rope_parameters": rope(),
}
GEMMA3_GLOBAL_ROPE = rope(5000.0, "linear", factor=4.0)
GEMMA3 = {
    **GEMMA2,
    "model_type": "gemma3_text",
    "head_dim": 20,
    "query_pre_attn_scalar": 32,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": rope(200.0),
        "full_attention": GEMMA3_GLOBAL_ROPE,
    },
}
GPT2 = {
    "model_type": "gpt2",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 119,
    "n_positions": 64,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 88,
}
NEOX = {
    **NEOX_SMALL,
    "model_type": "gpt_neox",
    "vocab_size": 127,
    "rope_parameters": rope(partial_rotary_factor=0.5),
}
OPT = {
    **IDS,
    "model_type": "opt",
    "vocab_size": 131,
    "hidden_size": 48,
    "ffn_dim": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
OLMO2 = {**SMALL, "model_type": "olmo2", "vocab_size": 137, "rope_parameters": rope()}

LLAMA3_ROPE = rope(
    10000.0,
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN_OPTIONS = {
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
    "mscale": 0.707,
    "mscale_all_dim": 0.3,
    "truncate": False,
}
SHORT_FACTOR = [1.0, 1.05, 1.1, 1.2, 1.35, 1.5]
LONG_FACTOR = [1.1, 1.6, 2.3, 3.1, 4.2, 5.0]
LONGROPE = rope(
    500.0,
    "longrope",
    short_factor=SHORT_FACTOR,
    long_factor=LONG_FACTOR,
    original_max_position_embeddings=32,
    partial_rotary_factor=1.0,
)
FULL, SLIDING = "full_attention", "sliding_attention"

FREQUENCIES = "rope_frequencies"  # the name of the file, and as a case
FREQUENCIES_HEAD_DIM = 96
FREQUENCIES_MAX_POSITION = 4096
FREQUENCIES_ROPES: list[tuple[int, JsonDict]] = [  # (length of the sequence, rope_parameters)
    (1, rope(100.0)),
    (1, rope(500000.0)),
    (1, rope(10000.0, "linear", factor=3.0)),
    (1, {**LLAMA3_ROPE, "rope_theta": 500000.0, "original_max_position_embeddings": 512}),
    (1, rope(10000.0, "yarn", factor=8.0, original_max_position_embeddings=512)),
    (1, rope(1000000.0, "yarn", **{**YARN_OPTIONS, "original_max_position_embeddings": 512})),
    (4096, rope(10000.0, "dynamic", factor=3.0)),
    (5000, rope(10000.0, "dynamic", factor=3.0)),
    *(
        (
            length,
            rope(
                10000.0,
                "longrope",
                short_factor=[round(1 + i / 70, 4) for i in range(FREQUENCIES_HEAD_DIM // 2)],
                long_factor=[round(1.03 * 1.08**i, 4) for i in range(FREQUENCIES_HEAD_DIM // 2)],
                original_max_position_embeddings=512,
            ),
        )
        for length in (512, 513)
    ),
]


def gpt2_hub_names(tensors: Tensors, config: JsonDict) -> Tensors:
    """The layout of the original GPT-2 checkpoints: no "transformer." prefix, causal masks as tensors."""
    size = config["n_positions"]
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for layer in range(config["n_layer"]):
        renamed[f"h.{layer}.attn.bias"] = torch.ones(size, size).tril().view(1, 1, size, size)
    return renamed


def neox_hub_buffers(tensors: Tensors, config: JsonDict) -> Tensors:
    """The layout of older GPT-NeoX checkpoints, with three buffers per layer that must be ignored."""
    size = config["max_position_embeddings"]
    extended = dict(tensors)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"gpt_neox.layers.{layer}.attention"
        extended[f"{prefix}.bias"] = torch.ones(size, size, dtype=torch.bool).tril().view(1, 1, size, size)
        extended[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
        extended[f"{prefix}.rotary_emb.inv_freq"] = torch.full((2,), 0.5)
    return extended


CASES = [
    Case(
        "llama",
        "grouped-query attention with 6 query and 2 KV heads of 10, untied embeddings",
        {**LLAMA, "hidden_size": 60, "intermediate_size": 84, "num_attention_heads": 6},
        checks={"rope base": {"rope_parameters": rope(10000.0)}},
    ),
    Case(
        "llama_tied",
        "multi-head attention, tied embeddings, an epsilon large enough to matter",
        {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True, "rms_norm_eps": 0.02},
        checks={"rms_norm_eps": {"rms_norm_eps": 1e-6}},
    ),
    Case(
        "llama_rope_llama3",
        "llama3 rope scaling with an untouched, a blended and some divided frequencies",
        {**LLAMA, "head_dim": 16, "max_position_embeddings": 256, "rope_parameters": LLAMA3_ROPE},
        checks={
            "scaling off": {"rope_parameters": rope(10000.0)},
            "factor": {"rope_parameters": {**LLAMA3_ROPE, "factor": 2.0}},
            "low_freq_factor": {"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 2.0}},
            "high_freq_factor": {"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 8.0}},
        },
    ),
    Case(
        "llama_rope_linear",
        "linear rope scaling",
        {**LLAMA, "max_position_embeddings": 256, "rope_parameters": rope(500.0, "linear", factor=4.0)},
        checks={"scaling off": {"rope_parameters": rope()}},
    ),
    Case(
        "llama_rope_dynamic",
        "dynamic NTK rope scaling; the longest prompt is longer than max_position_embeddings",
        {
            **LLAMA,
            "max_position_embeddings": 32,
            "rope_parameters": rope(500.0, "dynamic", factor=4.0),
        },
        checks={
            "scaling off": {"rope_parameters": rope()},
            "factor": {"rope_parameters": rope(500.0, "dynamic", factor=2.0)},
        },
        cache_matters=True,
    ),
    Case(
        "llama_rope_yarn",
        "YaRN rope scaling with its defaults",
        {
            **LLAMA,
            "head_dim": 24,
            "max_position_embeddings": 128,
            "rope_parameters": rope(500.0, "yarn", factor=4.0, original_max_position_embeddings=32),
        },
        checks={
            "scaling off": {"rope_parameters": rope()},
            "attention factor": {
                "rope_parameters": rope(
                    500.0, "yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.0
                )
            },
        },
    ),
    Case(
        "llama_rope_yarn_options",
        "YaRN rope scaling with betas, mscale, mscale_all_dim and no truncation",
        {
            **LLAMA,
            "head_dim": 24,
            "max_position_embeddings": 128,
            "rope_parameters": rope(500.0, "yarn", **YARN_OPTIONS),
        },
        checks={
            "betas": {"rope_parameters": rope(500.0, "yarn", **{**YARN_OPTIONS, "beta_fast": 32.0})},
            "mscale": {"rope_parameters": rope(500.0, "yarn", **{**YARN_OPTIONS, "mscale": 0.3})},
            "mscale_all_dim": {"rope_parameters": rope(500.0, "yarn", **{**YARN_OPTIONS, "mscale_all_dim": 0.0})},
            "truncate": {"rope_parameters": rope(500.0, "yarn", **{**YARN_OPTIONS, "truncate": True})},
        },
    ),
    Case(
        "llama_rope_yarn_top",
        "YaRN rope scaling with an original length at the top of config.json, which wins over the other",
        {
            **LLAMA,
            "head_dim": 24,
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 32,
            "rope_parameters": rope(500.0, "yarn", factor=4.0),
        },
        checks={"top": {"original_max_position_embeddings": 100}},
        rename={"rope_parameters": rope(500.0, "yarn", factor=4.0, original_max_position_embeddings=100)},
    ),
    Case(
        "llama_bias",
        "biases in attention and MLP",
        {**LLAMA, "attention_bias": True, "mlp_bias": True},
    ),
    Case(
        "llama_headdim80",
        "multi-query attention, head_dim 80, not hidden_size / heads",
        {
            **LLAMA,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 80,
            "intermediate_size": 72,
        },
    ),
    Case(
        "llama_sharded",
        "several safetensors files and an index",
        LLAMA,
        max_shard_size="40KB",
    ),
    Case(
        "llama_legacy",
        "older config.json: rope_theta, rope_scaling and torch_dtype at the top, no head_dim",
        {**LLAMA, "max_position_embeddings": 256, "rope_parameters": LLAMA3_ROPE},
        checks={"rope_scaling": {"rope_scaling": None}, "rope_theta": {"rope_theta": 500.0}},
        rename={
            "rope_theta": LLAMA3_ROPE["rope_theta"],
            "rope_scaling": {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"},
            "torch_dtype": "bfloat16",
        },
        drop=("rope_parameters", "head_dim", "dtype"),
    ),
    Case(
        "mistral",
        "sliding window 8 in every layer, 6 query and 2 KV heads, head_dim not hidden_size / heads",
        {**MISTRAL, "hidden_size": 52, "num_attention_heads": 6, "head_dim": 24, "sliding_window": 8},
        checks={"window off": {"sliding_window": None}, "window size": {"sliding_window": 9}},
    ),
    Case(
        "mistral_nowindow",
        "sliding_window null, multi-query attention, tied embeddings",
        {**MISTRAL, "num_key_value_heads": 1, "sliding_window": None, "tie_word_embeddings": True},
        checks={"window on": {"sliding_window": 8}},
    ),
    Case(
        "qwen2",
        "biases on q, k and v only, tied embeddings, 6 query and 2 KV heads of 10",
        {**QWEN2, "hidden_size": 60, "num_attention_heads": 6, "tie_word_embeddings": True},
        checks={"rope base": {"rope_parameters": rope(10000.0)}},
    ),
    Case(
        "qwen2_window",
        "layer 0 with full attention, layers 1 and 2 with a window of 8 (max_window_layers 1)",
        {
            **QWEN2,
            "num_hidden_layers": 3,
            "intermediate_size": 64,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
        checks={
            "window off": {"layer_types": [FULL] * 3},
            "window everywhere": {"layer_types": [SLIDING] * 3},
            "window size": {"sliding_window": 9},
        },
    ),
    Case(
        "qwen2_legacy",
        "older config.json: YaRN given by 'type', a sliding_window that use_sliding_window false turns off",
        {
            **QWEN2,
            "max_position_embeddings": 128,
            "rope_parameters": rope(500.0, "yarn", factor=4.0, original_max_position_embeddings=32),
        },
        checks={"rope_scaling": {"rope_scaling": None}, "window on": {"use_sliding_window": True}},
        rename={
            "rope_theta": 500.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            "torch_dtype": "bfloat16",
            "sliding_window": 8,
            "use_sliding_window": False,
            "max_window_layers": 1,
        },
        drop=("rope_parameters", "layer_types", "dtype"),
    ),
    Case(
        "qwen3",
        "per-head q and k norms, head_dim 24, not hidden_size / heads",
        {**QWEN3, "hidden_size": 56, "head_dim": 24},
        checks={"rope base": {"rope_parameters": rope(10000.0)}},
    ),
    Case(
        "qwen3_window",
        "attention_bias and a window of 8 in layers 1 and 2, tied embeddings",
        {
            **QWEN3,
            "num_hidden_layers": 3,
            "intermediate_size": 64,
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
        checks={"window off": {"layer_types": [FULL] * 3}, "window size": {"sliding_window": 7}},
    ),
    Case(
        "phi3",
        "fused qkv and gate/up projections",
        {**PHI3, "hidden_size": 60, "intermediate_size": 84, "num_attention_heads": 6},
        checks={"rope base": {"rope_parameters": rope(10000.0, partial_rotary_factor=1.0)}},
    ),
    Case(
        "phi3_partial",
        "rope on half of each head",
        {**PHI3, "num_key_value_heads": 4, "rope_parameters": rope(partial_rotary_factor=0.5)},
        checks={"partial_rotary_factor": {"rope_parameters": rope(partial_rotary_factor=1.0)}},
    ),
    Case(
        "phi3_window",
        "sliding window 8",
        {**PHI3, "sliding_window": 8},
        checks={"window off": {"sliding_window": None}, "window size": {"sliding_window": 9}},
    ),
    Case(
        "phi3_longrope",
        "longrope: short factors for prompts up to 32 tokens, long factors for the prompt of 45",
        {
            **PHI3,
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 32,
            "rope_parameters": LONGROPE,
        },
        checks={
            "scaling off": {"rope_parameters": rope(partial_rotary_factor=1.0)},
            "short_factor": {"rope_parameters": {**LONGROPE, "short_factor": [1.0] * 6}},
            "long_factor": {"rope_parameters": {**LONGROPE, "long_factor": SHORT_FACTOR}},
            "attention factor": {"rope_parameters": {**LONGROPE, "attention_factor": 1.0}},
        },
    ),
    Case(
        "phi3_legacy",
        "older config.json: longrope in rope_scaling, partial_rotary_factor 0.75 at the top",
        {
            **PHI3,
            "hidden_size": 64,
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 32,
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75},
        },
        checks={
            "rope_scaling": {"rope_scaling": None},
            "rope_theta": {"rope_theta": 10000.0},
        },
        rename={
            "rope_theta": 500.0,
            "rope_scaling": {"type": "longrope", "short_factor": SHORT_FACTOR, "long_factor": LONG_FACTOR},
            "partial_rotary_factor": 0.75,
            "torch_dtype": "bfloat16",
        },
        drop=("rope_parameters", "dtype"),
    ),
    Case(
        "gemma2",
        "both softcaps, alternating windows, query_pre_attn_scalar 40 with head_dim 24",
        {**GEMMA2, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 6.0},
        checks={
            "attention softcap": {"attn_logit_softcapping": None},
            "final softcap": {"final_logit_softcapping": None},
            "window off": {"sliding_window": 4096},
            "window size": {"sliding_window": 9},
            "window layers": {"layer_types": [FULL, SLIDING, FULL]},
            "query_pre_attn_scalar": {"query_pre_attn_scalar": 24},
            "rope base": {"rope_parameters": rope(10000.0)},
        },
        fine_checks={"gelu": {"hidden_activation": "gelu"}},
    ),
    Case(
        "gemma2_nosoftcap",
        "no softcaps, multi-query attention, explicit layer_types that start with full attention",
        {
            **GEMMA2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": [FULL, SLIDING],
        },
        checks={
            "attention softcap": {"attn_logit_softcapping": 3.0},
            "final softcap": {"final_logit_softcapping": 6.0},
            "window layers": {"layer_types": [SLIDING, FULL]},
        },
    ),
    Case(
        "gemma3_text",
        "q and k norms, local and global rope bases, linear rope scaling in the global layers",
        GEMMA3,
        checks={
            "window off": {"sliding_window": 4096},
            "window size": {"sliding_window": 9},
            "global scaling off": {"rope_parameters": {SLIDING: rope(200.0), FULL: rope(5000.0)}},
            "one rope for all": {"rope_parameters": dict.fromkeys((SLIDING, FULL), GEMMA3_GLOBAL_ROPE)},
            "query_pre_attn_scalar": {"query_pre_attn_scalar": 20},
        },
        fine_checks={"gelu": {"hidden_activation": "gelu"}},
    ),
    Case(
        "gemma3_legacy",
        "older config.json: sliding_window_pattern, rope_local_base_freq, rope_scaling; final softcap",
        {**GEMMA3, "final_logit_softcapping": 6.0},
        checks={
            "rope_scaling": {"rope_scaling": None},
            "rope_local_base_freq": {"rope_local_base_freq": 10000.0},
            "rope_theta": {"rope_theta": 200.0},
            "sliding_window_pattern": {"sliding_window_pattern": 3},
            "final softcap": {"final_logit_softcapping": None},
        },
        rename={
            "rope_theta": 5000.0,
            "rope_local_base_freq": 200.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "sliding_window_pattern": 2,
            "torch_dtype": "bfloat16",
        },
        drop=("rope_parameters", "layer_types", "_sliding_window_pattern", "dtype"),
    ),
    Case(
        "gpt2",
        "learned positions, transposed weights, gelu_new, n_inner that is not 4 n_embd",
        GPT2,
        fine_checks={"gelu": {"activation_function": "gelu"}},
    ),
    Case(
        "gpt2_options",
        "scale_attn_by_inverse_layer_idx, relu, default n_inner, untied embeddings, a large epsilon",
        {
            **GPT2,
            "n_embd": 40,
            "n_inner": None,
            "scale_attn_by_inverse_layer_idx": True,
            "activation_function": "relu",
            "tie_word_embeddings": False,
            "layer_norm_epsilon": 0.02,
        },
        checks={
            "inverse layer scale": {"scale_attn_by_inverse_layer_idx": False},
            "activation": {"activation_function": "gelu_new"},
            "layer_norm_epsilon": {"layer_norm_epsilon": 1e-5},
        },
    ),
    Case(
        "gpt2_hub_names",
        "tensor names without the 'transformer.' prefix, causal masks stored among the tensors",
        GPT2,
        rewrite=gpt2_hub_names,
    ),
    Case(
        "gpt_neox",
        "interleaved qkv, rope on half of each head, parallel residual",
        NEOX,
        checks={
            "partial_rotary_factor": {"rope_parameters": rope(partial_rotary_factor=1.0)},
            "parallel residual": {"use_parallel_residual": False},
        },
        fine_checks={"gelu": {"hidden_act": "gelu_new"}},
    ),
    Case(
        "gpt_neox_sequential",
        "use_parallel_residual false, three heads of 16, rope on a quarter of each, a large epsilon",
        {
            **NEOX,
            "num_attention_heads": 3,
            "rope_parameters": rope(50.0, partial_rotary_factor=0.25),
            "use_parallel_residual": False,
            "layer_norm_eps": 0.02,
        },
        checks={
            "parallel residual": {"use_parallel_residual": True},
            "layer_norm_eps": {"layer_norm_eps": 1e-5},
            "rope base": {"rope_parameters": rope(10000.0, partial_rotary_factor=0.25)},
        },
    ),
    Case(
        "gpt_neox_nobias",
        "attention_bias false, tied embeddings, gelu_new",
        {**NEOX, "attention_bias": False, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
        fine_checks={"gelu": {"hidden_act": "gelu"}},
    ),
    Case(
        "gpt_neox_legacy",
        "older config.json (rotary_pct, rotary_emb_base) and checkpoint with buffers to ignore",
        {**NEOX, "num_attention_heads": 3, "rope_parameters": rope(50.0, partial_rotary_factor=0.25)},
        checks={"rotary_pct": {"rotary_pct": 0.5}, "rotary_emb_base": {"rotary_emb_base": 10000}},
        rename={"rotary_pct": 0.25, "rotary_emb_base": 50, "torch_dtype": "float16"},
        drop=("rope_parameters", "dtype", "attention_bias"),
        rewrite=neox_hub_buffers,
    ),
    Case(
        "opt",
        "learned positions with an offset of 2, relu, norms before the blocks",
        OPT,
        checks={
            "do_layer_norm_before": {"do_layer_norm_before": False},
            "activation": {"activation_function": "gelu"},
        },
        no_effect=("k_proj.bias",),
    ),
    Case(
        "opt_postnorm",
        "do_layer_norm_before false: norms after the residual sums, no final norm",
        {**OPT, "do_layer_norm_before": False},
        checks={"norm order": {"do_layer_norm_before": True, "_remove_final_layer_norm": True}},
        no_effect=("k_proj.bias",),
    ),
    Case(
        "opt_proj",
        "embeddings of width 36 projected in and out of width 48",
        {**OPT, "word_embed_proj_dim": 36},
        no_effect=("k_proj.bias",),
    ),
    Case(
        "opt_nobias",
        "enable_bias false, norms without weights, gelu, a final norm that is removed",
        {
            **OPT,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "_remove_final_layer_norm": True,
        },
        checks={"final norm": {"_remove_final_layer_norm": False}},
        fine_checks={"gelu": {"activation_function": "gelu_new"}},
    ),
    Case(
        "olmo2",
        "norms after each block, q and k norms over all heads at once, 6 query and 2 KV heads",
        {**OLMO2, "num_attention_heads": 6},
        checks={"rope base": {"rope_parameters": rope(10000.0)}},
    ),
]


# ------------------------------------------------------------------------------------------------------------
# Making a checkpoint
# ------------------------------------------------------------------------------------------------------------


def randomise(model: torch.nn.Module, model_type: str, generator: torch.Generator) -> None:
    """Give every parameter values under which it matters: sharp attention, uneven norms, nonzero biases."""
    # Gemma norms multiply by 1 + weight. Its embeddings are tied and scaled by sqrt(hidden_size), which would
    # make every token predict itself: they are smaller here, and the last norm has weights of both signs.
    is_gemma = model_type.startswith("gemma")
    norm_centre, embedding_std = (0.0, 0.1) if is_gemma else (1.0, 0.3)
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:  # tied
                continue
            seen.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and name == "bias":
                value = 0.3 * noise
            elif parameter.ndim == 1:
                shift = 0.5 if module_name.endswith(("q_norm", "k_norm")) else 0.0
                std = 3.0 if is_gemma and module_name == "model.norm" else 0.3
                value = norm_centre + shift + std * noise
            elif isinstance(module, torch.nn.Embedding):
                is_position = module_name.endswith(("wpe", "embed_positions"))
                value = (0.8 if is_position else embedding_std) * noise
            else:
                fan_in = parameter.shape[0 if type(module).__name__ == "Conv1D" else 1]
                if module_name.endswith(("q_proj", "k_proj", "qkv_proj", "query_key_value", "c_attn")):
                    gain = 1.5
                elif module_name.endswith(("lm_head", "embed_out")):
                    gain = 2.0
                else:
                    gain = 1.2
                value = gain / fan_in**0.5 * noise
            parameter.data.copy_(value)


def build(case: Case, generator: torch.Generator) -> torch.nn.Module:
    """The case's model with random weights, rounded to bfloat16 but computing in float32."""
    options = dict(copy.deepcopy(case.config))
    config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    randomise(model, case.config["model_type"], generator)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    return model.eval()


def save(case: Case, model: torch.nn.Module, folder: Path) -> None:
    """Write the checkpoint as save_pretrained does, then apply the case's rewrites."""
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    narrow.save_pretrained(folder, max_shard_size=case.max_shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    if case.rename or case.drop:
        config = {key: value for key, value in config.items() if key not in case.drop} | case.rename
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if case.rewrite is not None:
        weights = folder / "model.safetensors"
        tensors = case.rewrite(load_file(weights), config)
        save_file(tensors, weights, metadata={"format": "pt"})


def load(folder: Path, changes: JsonDict | None = None) -> torch.nn.Module:
    """The checkpoint as transformers loads it, in float32, eager attention; changes edit its config.json."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if changes is not None:
        raw = json.loads((folder / "config.json").read_text())
        config = type(config).from_dict(copy.deepcopy({**raw, **changes}))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    require(not info["missing_keys"], f"{folder.name}: tensors missing: {info['missing_keys']}")
    require(next(model.parameters()).dtype == torch.float32, f"{folder.name}: not loaded in float32")
    return model.eval()


# ------------------------------------------------------------------------------------------------------------
# Computing and checking
# ------------------------------------------------------------------------------------------------------------


def fail(message: str) -> NoReturn:
    """Stop with a message."""
    raise SystemExit(f"make_parity_fixtures: {message}")


def require(condition: bool, message: str) -> None:
    """Stop with a message where a check fails."""
    if not condition:
        fail(message)


def log_probabilities(model: torch.nn.Module, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """log_softmax of the logits at every position of each prompt, one full forward pass per prompt."""
    results = []
    for prompt in prompts:
        fresh = copy.deepcopy(model)  # dynamic NTK rope keeps the longest length seen as state
        logits = fresh(prompt[None], use_cache=False).logits[0]
        results.append(torch.log_softmax(logits.float(), dim=-1))
    return results


def largest_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """The largest absolute difference over all prompts."""
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


def greedy(model: torch.nn.Module, prompt: torch.Tensor, use_cache: bool) -> tuple[list[int], torch.Tensor]:
    """Greedy continuation of a prompt: the tokens, and the logits [steps, V] that each was taken from."""
    fresh = copy.deepcopy(model)
    tokens: list[int] = []
    rows = []
    past = None
    for _ in range(GREEDY_STEPS):
        if past is None:
            inputs = torch.cat([prompt, torch.tensor(tokens, dtype=torch.long)])
        else:
            inputs = torch.tensor(tokens[-1:])
        output = fresh(inputs[None], past_key_values=past, use_cache=use_cache)
        past = output.past_key_values if use_cache else None
        rows.append(output.logits[0, -1].float())
        tokens.append(int(rows[-1].argmax()))
    return tokens, torch.stack(rows)


def smallest_gap(logits: torch.Tensor) -> float:
    """The smallest difference between the best and the second best logit of a row."""
    best = logits.topk(2, dim=-1).values
    return float((best[:, 0] - best[:, 1]).min())


@dataclass
class Expected:
    """What expected.npz holds, and how close the closest greedy decision was."""

    arrays: dict[str, np.ndarray]
    gap: float


def compute(case: Case, model: torch.nn.Module, prompts: list[torch.Tensor]) -> Expected | None:
    """The reference results, or None where a continuation is a near tie, too dull or holds the EOS id."""
    arrays: dict[str, np.ndarray] = {}
    gap = float("inf")
    for index, (prompt, logprobs) in enumerate(zip(prompts, log_probabilities(model, prompts), strict=True)):
        tokens, logits = greedy(model, prompt, use_cache=True)
        plain_tokens, plain_logits = greedy(model, prompt, use_cache=False)
        gap = min(gap, smallest_gap(logits), smallest_gap(plain_logits))
        if gap <= MIN_GAP or len(set(tokens)) < MIN_DISTINCT or model.config.eos_token_id in tokens:
            return None
        if case.cache_matters:
            arrays[f"greedy_nocache_{index}"] = np.array(plain_tokens, dtype=np.int32)
        else:
            difference = float((logits - plain_logits).abs().max())
            require(
                tokens == plain_tokens and difference < CACHE_TOLERANCE,
                f"{case.name}: decoding with and without the KV cache differs by {difference:.2g}",
            )
        arrays[f"prompt_{index}"] = prompt.numpy().astype(np.int32)
        arrays[f"logprobs_{index}"] = logprobs.numpy().astype(np.float32)
        arrays[f"greedy_{index}"] = np.array(tokens, dtype=np.int32)
    return Expected(arrays, gap)


def check_config_changes(
    case: Case, folder: Path, prompts: list[torch.Tensor], reference: list[torch.Tensor]
) -> dict[str, float]:
    """Apply each listed config change and require that it shows. Returns the effects."""
    effects = {}
    for checks, least in ((case.checks, MIN_EFFECT), (case.fine_checks, MIN_FINE_EFFECT)):
        for label, changes in checks.items():
            effect = largest_difference(reference, log_probabilities(load(folder, changes), prompts))
            require(effect > least, f"{case.name}: the change '{label}' has an effect of only {effect:.2g}")
            effects[label] = effect
    return effects


def check_tensors(
    case: Case, model: torch.nn.Module, prompts: list[torch.Tensor], reference: list[torch.Tensor]
) -> tuple[str, float]:
    """Reverse one parameter at a time and require that it shows. Returns the least telling one."""
    weakest = ("", float("inf"))
    for name, parameter in model.named_parameters():
        original = parameter.data
        parameter.data = original.flip(0)
        effect = largest_difference(reference[-1:], log_probabilities(model, prompts[-1:]))
        parameter.data = original
        if name.endswith(case.no_effect or ("-",)):
            require(effect < CACHE_TOLERANCE, f"{case.name}: {name} has an effect of {effect:.2g}, none expected")
            continue
        require(effect > MIN_EFFECT, f"{case.name}: reversing {name} has an effect of only {effect:.2g}")
        weakest = min(weakest, (name, effect), key=lambda item: item[1])
    return weakest


def make_case(case: Case, out: Path, verbose: bool) -> None:
    """Make, check and write one case, and print a line about it."""
    for attempt in range(MAX_ATTEMPTS):
        generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + attempt)
        model = build(case, generator)
        vocabulary = case.config["vocab_size"]
        prompts = [torch.randint(3, vocabulary, (length,), generator=generator) for length in PROMPT_LENGTHS]
        expected = compute(case, model, prompts)
        if expected is not None:
            break
    else:
        fail(f"{case.name}: no good seed in {MAX_ATTEMPTS} attempts")

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / case.name
        save(case, model, folder)
        loaded = load(folder)
        reference = log_probabilities(loaded, prompts)
        difference = largest_difference(log_probabilities(model, prompts), reference)
        require(difference < RELOAD_TOLERANCE, f"{case.name}: the saved checkpoint differs by {difference:.2g}")
        expected = compute(case, loaded, prompts)
        if expected is None:
            fail(f"{case.name}: the saved checkpoint decodes differently")
        effects = check_config_changes(case, folder, prompts, reference)
        weakest = check_tensors(case, loaded, prompts, reference)
        rounding = largest_difference(reference, log_probabilities(copy.deepcopy(loaded).double(), prompts))
        require(rounding < MAX_ROUNDING, f"{case.name}: float32 and float64 differ by {rounding:.2g}")
        np.savez_compressed(folder / "expected.npz", allow_pickle=False, **expected.arrays)

        target = out / case.name
        if target.exists():
            shutil.rmtree(target)
        target.mkdir(parents=True)
        for file in sorted(folder.iterdir()):
            shutil.copyfile(file, target / file.name)

    sizes = {file.name: file.stat().st_size for file in target.iterdir()}
    weights = sum(size for name, size in sizes.items() if "safetensors" in name)
    print(
        f"{case.name:24} weights {weights / 1024:6.1f} KB  expected {sizes['expected.npz'] / 1024:5.1f} KB  "
        f"total {sum(sizes.values()) / 1024:6.1f} KB  gap {expected.gap:.3f}  attempt {attempt}",
        flush=True,
    )
    if verbose:
        for label, effect in effects.items():
            print(f"    config: {label}: {effect:.2g}")
        print(f"    rounding: float32 and float64 differ by {rounding:.1e}")
        print(f"    tensors: least telling is {weakest[0]}: {weakest[1]:.3f}", flush=True)


def make_frequencies(out: Path) -> None:
    """Write rope_frequencies.json: what a rotary embedding of transformers uses in a sequence of each length."""
    entries = []
    for length, parameters in FREQUENCIES_ROPES:
        settings = {
            "hidden_size": FREQUENCIES_HEAD_DIM,
            "num_attention_heads": 1,
            "max_position_embeddings": FREQUENCIES_MAX_POSITION,
            "rope_parameters": parameters,
        }
        config = transformers.AutoConfig.for_model("llama", **copy.deepcopy(settings))
        embedding = transformers.AutoModel.from_config(config).rotary_emb
        embedding(torch.zeros(1), torch.arange(length)[None])
        entries.append({"config": settings, "length": length, "frequencies": embedding.inv_freq.tolist()})
    out.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    (out / f"{FREQUENCIES}.json").write_text(f"[\n{lines}\n]\n")
    print(f"{FREQUENCIES:24} {len(entries)} entries", flush=True)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Make the Hugging Face parity fixtures: tiny random checkpoints and expected results.",
        epilog="""examples:
  make_parity_fixtures.py                                 all cases, into tests/parity/fixtures
  make_parity_fixtures.py --case llama --case gemma2 -v   these two, with the measured effects
  make_parity_fixtures.py --out fixtures                  all cases, elsewhere
  make_parity_fixtures.py --list                          the names of the cases and what they are for

The environment this needs is described at the top of the script.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="where to write (%(default)s)")
    parser.add_argument("--case", action="append", metavar="NAME", help="make only this case; may be repeated")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the effect of each checked switch")
    options = parser.parse_args(arguments)
    unknown = set(options.case or ()) - {case.name for case in CASES} - {FREQUENCIES}
    if unknown:
        parser.error(f"unknown case: {', '.join(sorted(unknown))} (--list shows them)")
    return options


def main() -> int:
    """Make the chosen cases."""
    options = parse_arguments()
    if options.list:
        for case in CASES:
            print(f"{case.name:24} {case.about}")
        print(f"{FREQUENCIES:24} the frequencies of every kind of rope")
        return 0
    require(MISSING is None, f"needs the module {MISSING}; the top of the script says how to set up")
    for module in (torch, transformers):
        version, tested = module.__version__.split("+")[0], TESTED_VERSIONS[module.__name__]
        if version != tested:
            print(f"warning: {module.__name__} {version}, the fixtures are of {tested}", file=sys.stderr)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with torch.no_grad():
        if not options.case or FREQUENCIES in options.case:
            make_frequencies(options.out)
        for case in CASES:
            if not options.case or case.name in options.case:
                make_case(case, options.out, options.verbose)
    return 0


if __name__ == "__main__":
    sys.exit(main())
