"""The engine on the Triton kernels, interpreted: the same tokens as on XLA's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxserve import LLM, SamplingParams

LIMITS: dict[str, Any] = {
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "decode_buckets": (2,),
    "token_buckets": (16,),
    "max_model_len": 64,
}
"""One program of each kind: the interpreter's compile slowly."""
MESH = "cp=2,tp=2"


def test_same_tokens(tiny_model: Path, make_llm: Callable[..., LLM]) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = [[5] * 30 + [7], [9, 8, 7], [3]]
    found = [
        [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
        for llm in (
            make_llm(tiny_model, mesh=MESH, **LIMITS),
            make_llm(tiny_model, mesh=MESH, attention_backend="triton_interpreted", **LIMITS),
        )
    ]
    assert found[0] == found[1]
    assert len(set(map(tuple, found[0]))) == 3
