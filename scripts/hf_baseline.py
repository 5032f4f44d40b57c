"""Hugging Face transformers at the points of ``bench_gpu``: random weights of the same shape, bfloat16, on a GPU.

To be run before jax starts: jax takes most of a GPU's memory, and keeps it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.cli.command import one_line


@dataclass(frozen=True)
class Baseline:
    """At one point: tokens per second, or why there are none."""

    static: float | str
    """``generate`` on one batch, with a static cache and so with torch.compile."""
    continuous: float | str
    """``generate_batch``."""


def missing() -> str | None:
    """Why it cannot run here, if so."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "torch is not installed"
    return None if torch.cuda.is_available() else "torch sees no GPU"


class Model:
    """On the GPU, until it is closed."""

    def __init__(self, directory: Path) -> None:
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import AutoConfig, AutoModelForCausalLM

        self.torch: Any = torch
        config = AutoConfig.from_pretrained(directory)
        with torch.device("cuda"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.model, self.vocab = model.eval(), config.vocab_size

    def close(self) -> None:
        """Give the memory back, for jax to take."""
        del self.model
        gc.collect()
        self.torch.cuda.empty_cache()

    def decode(self, batch: int, context: int, steps: int) -> Baseline:
        """Generated tokens per second behind the first one: what more steps take longer."""
        ids = self.torch.randint(0, self.vocab, (batch, context), device="cuda")
        return Baseline(*(_rate(lambda run=run: self._per_step(run, ids, steps)) for run in self._runs()))

    def prefill(self, batch: int, length: int) -> Baseline:
        """Prompt tokens per second."""
        ids = self.torch.randint(0, self.vocab, (batch, length), device="cuda")
        return Baseline(*(_rate(lambda run=run: ids.numel() / self._seconds(run, ids, 1)) for run in self._runs()))

    def _runs(self) -> Sequence[Callable[[Any, int], Any]]:
        return self._static, self._continuous

    def _per_step(self, run: Callable[[Any, int], Any], ids: Any, steps: int) -> float:
        more = self._seconds(run, ids, 1 + steps) - self._seconds(run, ids, 1)
        return ids.shape[0] * steps / more

    def _seconds(self, run: Callable[[Any, int], Any], ids: Any, new: int) -> float:
        """Of the second call: the first compiles."""
        seconds = 0.0
        for _ in range(2):
            self.torch.cuda.synchronize()
            start = time.perf_counter()
            run(ids, new)
            self.torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        return seconds

    def _static(self, ids: Any, new: int) -> None:
        lengths = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        mask = self.torch.ones_like(ids)
        self.model.generate(input_ids=ids, attention_mask=mask, cache_implementation="static", **lengths)

    def _continuous(self, ids: Any, new: int) -> None:
        from transformers import GenerationConfig

        if not hasattr(self.model, "generate_batch"):
            raise NotImplementedError("this version of transformers has no generate_batch")
        config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        found = self.model.generate_batch(inputs=ids.tolist(), generation_config=config)
        written = [len(output.generated_tokens) for output in found.values()]
        if written != [new] * len(ids):
            raise ValueError(f"generate_batch wrote {sum(written)} tokens instead of {new * len(ids)}")


def _rate(measure: Callable[[], float]) -> float | str:
    """Or why there is none: what does not fit the memory is a finding."""
    try:
        return measure()
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error)}"
