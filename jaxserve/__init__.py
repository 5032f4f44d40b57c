"""jaxserve: continuous-batching LLM inference as one SPMD program.

Names are loaded on first use, so that the host half (``jaxserve.scheduler``) can be imported without jax.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.async_llm import AsyncLLM, EngineDeadError
    from jaxserve.beam_search import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
    from jaxserve.llm import LLM
    from jaxserve.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from jaxserve.sampling_params import RequestOutputKind, SamplingParams
    from sharding import MeshConfig

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "EngineDeadError",
    "Logprob",
    "MeshConfig",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
]

_HOME = {
    "LLM": "jaxserve.llm",
    "AsyncLLM": "jaxserve.async_llm",
    "BeamSearchOutput": "jaxserve.beam_search",
    "BeamSearchParams": "jaxserve.beam_search",
    "BeamSearchSequence": "jaxserve.beam_search",
    "EngineDeadError": "jaxserve.async_llm",
    "MeshConfig": "sharding",
    "RequestOutputKind": "jaxserve.sampling_params",
    "SamplingParams": "jaxserve.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "jaxserve.outputs")), name)
