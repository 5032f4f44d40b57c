"""Phi-3: Llama with q, k and v stored in one tensor, gate and up in another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from jaxserve.models import hf as h
from jaxserve.models.config import DecoderConfig, LayerConfig
from jaxserve.models.llama import llama_config
from jaxserve.models.llama import weights as llama_weights
from jaxserve.weights.source import Source

ARCHITECTURES = ("Phi3ForCausalLM",)


def config(hf: h.HFConfig) -> DecoderConfig:
    # Whatever layer_types says, all layers have the one window.
    layers = (LayerConfig(window=hf.sliding_window),) * hf.num_hidden_layers
    return llama_config(hf, layers=layers, ropes=(h.rope(hf, h.head_dim(hf), partial=True),))


def weights(config: DecoderConfig, checkpoint: Mapping[str, Source]) -> h.Weights:
    return llama_weights(config, _Unfused(config, checkpoint))


class _Unfused(Mapping[str, Source]):
    """The checkpoint under Llama's names: parts of the fused tensors."""

    def __init__(self, config: DecoderConfig, checkpoint: Mapping[str, Source]) -> None:
        self.checkpoint = checkpoint
        self.queries = config.num_heads * config.head_dim
        self.ffn = config.intermediate_size

    def __getitem__(self, name: str) -> Source:
        head, _, leaf = name.rpartition(".")
        module, _, part = head.rpartition(".")
        if part in ("q_proj", "k_proj", "v_proj"):
            fused = self.checkpoint[f"{module}.qkv_proj.{leaf}"]
            keys = (fused.shape[0] - self.queries) // 2
            start = {"q_proj": 0, "k_proj": self.queries, "v_proj": self.queries + keys}[part]
            return fused.narrow(0, start, self.queries if part == "q_proj" else keys)
        if part in ("gate_proj", "up_proj"):
            fused = self.checkpoint[f"{module}.gate_up_proj.{leaf}"]
            return fused.narrow(0, 0 if part == "gate_proj" else self.ffn, self.ffn)
        return self.checkpoint[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint)

    def __len__(self) -> int:
        return len(self.checkpoint)
