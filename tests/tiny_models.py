"""Random models small enough to compile in seconds, and an oracle that answers for them the slow way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve import LLM, RequestOutput, SamplingParams
from jaxserve.engine import Engine
from jaxserve.layers.attention import dense_causal_attention
from jaxserve.models.decoder import Ops
from jaxserve.outputs import CompletionOutput
from jaxserve.scheduler import Scheduler
from jaxserve.tokenizer import bad_word_token_sequences
from jaxserve.weights.source import Box, Source

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000.0,
    "tie_word_embeddings": False,
    "vocab_size": 103,
    "eos_token_id": 102,
}

SMALL: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "token_buckets": (32,),
    "decode_buckets": (4,),
    "block_size": 4,
    "num_gpu_blocks_override": 130,
}
"""Engine options with which prompts are computed in chunks, blocks fill up fast, and little is compiled."""


PROMPT = [5, 6, 7, 60, 61]


def run(llm: LLM, prompts: Any, params: Any) -> list[RequestOutput]:
    """Generate, and see that nothing is left behind."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert not llm.engine.has_unfinished and not llm.engine.scheduler.has_unfinished
    llm.engine.scheduler.check_integrity()
    return outputs


def one(llm: LLM, prompt: Any = PROMPT, **params: Any) -> CompletionOutput:
    (output,) = run(llm, [prompt], SamplingParams(**params))
    (completion,) = output.outputs
    return completion


def with_blocks(llm: LLM, num_blocks: int) -> LLM:
    """One that has ``num_blocks`` of the KV blocks of ``llm``, and its programs, which need not be compiled again. One
    of the two at a time; what is cached is forgotten."""
    llm.reset_prefix_cache()
    other, engine = copy(llm), llm.engine
    scheduler = Scheduler(replace(engine.scheduler.config, num_blocks=num_blocks))
    other.engine = Engine(scheduler, engine.runner, engine.tokenizer, engine.eos_token_ids)
    return other


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def write_llama(directory: Path, **entries: Any) -> Path:
    """A random float32 Llama checkpoint, with these entries in its config.json."""
    config = LLAMA | entries
    (directory / "config.json").write_text(json.dumps(config))
    save_file(llama_tensors(config), directory / "model.safetensors")
    return directory


def llama_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names; logits spread over several nats, so that few choices are close."""
    rng = np.random.default_rng(seed)
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[f"num_{name}_heads"] * config["head_dim"] for name in ("attention", "key_value"))

    def normal(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * scale * columns**-0.5).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": normal(v, d, d**0.5),
        "lm_head.weight": normal(v, d, 3.0),
        "model.norm.weight": np.ones(d, np.float32),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        tensors |= {
            f"{layer}self_attn.q_proj.weight": normal(q, d, 2.0),
            f"{layer}self_attn.k_proj.weight": normal(kv, d, 2.0),
            f"{layer}self_attn.v_proj.weight": normal(kv, d, 2.0),
            f"{layer}self_attn.o_proj.weight": normal(d, q, 2.0),
            f"{layer}mlp.gate_proj.weight": normal(f, d, 2.0),
            f"{layer}mlp.up_proj.weight": normal(f, d),
            f"{layer}mlp.down_proj.weight": normal(d, f),
            f"{layer}input_layernorm.weight": np.ones(d, np.float32),
            f"{layer}post_attention_layernorm.weight": np.ones(d, np.float32),
        }
    return tensors


class InMemory(Source):
    """An array as a source."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, array.shape

    def read(self, box: Box) -> np.ndarray:
        return self.array[box]


class Counting(Source):
    """Counts the entries that are read."""

    def __init__(self, base: Source) -> None:
        self.base, self.shape, self.num_read = base, base.shape, 0

    def read(self, box: Box) -> np.ndarray:
        values = self.base.read(box)
        self.num_read += values.size
        return values


def scale_weight(llm: LLM, name: str, factor: float) -> None:
    """Plants a fault."""
    runner = llm.engine.runner
    (weight,) = jax.tree.leaves(runner.named_params[name])
    place = next(i for i, x in enumerate(runner.params) if x is weight)
    runner.params[place] = weight * jnp.asarray(factor, weight.dtype)


@contextmanager
def interrupted(llm: LLM, steps: int) -> Iterator[None]:
    """Ctrl-C instead of the step after so many."""
    real, left = llm.engine.runner.step, iter(range(steps))

    def step(batch: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm.engine.runner, "step", step)
        yield


class Oracle:
    """Recomputes whole sequences without cache, batch or scheduler, and samples greedily in plain Python."""

    def __init__(self, llm: LLM) -> None:
        engine = llm.engine
        self.tokenizer, self.eos_token_ids = engine.tokenizer, engine.eos_token_ids
        self.length = engine.scheduler.config.max_model_len
        self.vocab_size = engine.runner.decoder.vocab_size
        model, ops = engine.runner.model(), Ops(matmul=engine.runner.kernels.matmul)
        attend = dense_causal_attention(engine.runner.decoder)
        positions = jnp.arange(self.length)[None]
        self._logits = jax.jit(lambda tokens: model.unembed(model(tokens, positions, attend, ops=ops), ops.matmul)[0])

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [len(tokens), V]: after each token."""
        padded = np.zeros((1, self.length), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.array(self._logits(padded))[: len(tokens)]

    def logprobs(self, tokens: Sequence[int]) -> np.ndarray:
        return log_softmax(self.logits(tokens))

    def edited(self, prompt: Sequence[int], output: Sequence[int], params: SamplingParams) -> np.ndarray:
        """float64 [V]: logits of the next token after everything but temperature and truncation."""
        logits = self.logits([*prompt, *output])[-1].astype(np.float64)
        for token in range(self.vocab_size):
            logits[token] += self._bias(token, output, params)
            count = list(output).count(token)
            if count or token in prompt:
                repetition = params.repetition_penalty
                logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
            logits[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        return logits

    def _bias(self, token: int, output: Sequence[int], params: SamplingParams) -> float:
        banned = params.allowed_token_ids is not None and token not in params.allowed_token_ids
        banned |= len(output) < params.min_tokens and token in self._ending(params)
        if params.bad_words:
            assert self.tokenizer is not None
            for *before, last in bad_word_token_sequences(self.tokenizer, params.bad_words):
                banned |= token == last and [*output][len(output) - len(before) :] == before
        return -np.inf if banned else dict(params.logit_bias).get(token, 0.0)

    def _ending(self, params: SamplingParams) -> set[int]:
        return {*params.stop_token_ids, *(() if params.ignore_eos else self.eos_token_ids)}

    def greedy(self, prompt: Sequence[int], params: SamplingParams) -> list[int]:
        """The tokens that ``params`` with temperature 0 must give."""
        assert params.max_tokens is not None
        output: list[int] = []
        while len(output) < params.max_tokens and len(prompt) + len(output) < self.length:
            output.append(int(np.argmax(self.edited(prompt, output, params))))
            if len(output) > params.min_tokens and output[-1] in self._ending(params):
                break
        return output


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
