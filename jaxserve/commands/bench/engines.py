"""Engines to measure: one at a time, and whether their speed means anything."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxserve.cli.options import EngineFlags
from jaxserve.cli.output import watched
from jaxserve.evaluation.sweep import Setting

if TYPE_CHECKING:
    from jaxserve import LLM

SIMULATED = "simulated on the cores of one machine: times and rates say nothing about real devices"


class Engines:
    """The engine of one setting after the other: kept while its options stay the same, gone before the next. Files that
    the second one writes get a 1 behind their names, and so on."""

    def __init__(self, cases: Sequence[Setting]) -> None:
        self.options: dict[str, Any] | None = None
        self.llm: LLM | None = None
        self._num_opened = 0
        self._reserve(cases)

    @staticmethod
    def _reserve(cases: Sequence[Setting]) -> None:
        """The number of simulated devices is fixed when jax starts, so that the largest mesh sets it."""
        from jaxserve.evaluation.engines import mesh_of, reserve_devices

        sizes = {mesh_of(engine_options(case.groups["engine"])).num_devices for case in cases}
        if len(sizes) > 1:
            reserve_devices(max(sizes))

    def open(self, engine: EngineFlags) -> LLM:
        """Without a tokenizer: prompts are token ids."""
        from jaxserve.evaluation.engines import open_llm, own_files

        options = engine_options(engine)
        if self.llm is None or options != self.options:
            self.llm = None
            gc.collect()
            named = own_files(options, str(self._num_opened)) if self._num_opened else options
            self.options, self.llm = options, open_llm(named).llm
            self._num_opened += 1
        return self.llm


def engine_options(engine: EngineFlags) -> dict[str, Any]:
    return engine.engine_options() | {"skip_tokenizer_init": True, "use_tqdm_on_load": watched()}


def is_simulated(llm: LLM) -> bool:
    """Whether several devices share the cores of this machine."""
    mesh = llm.engine.runner.mesh
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"


def devices(llm: LLM) -> dict[str, str]:
    return {"devices": f"{llm.engine.runner.mesh.size}, {SIMULATED}"} if is_simulated(llm) else {}
