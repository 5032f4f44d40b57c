"""Pallas kernels, taken out of the programs that call them and compiled for a GPU that is not there.

What XLA makes around an attention kernel (its plan) takes longer to compile than the kernel. Here many kernels are one
program with nothing else in it; Triton, LLVM and ptxas do to each what they would do to it anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn  # pyright: ignore[reportPrivateImportUsage]
from jax.sharding import NamedSharding, PartitionSpec

from sharding import aot, build_mesh
from sharding.hardware import Cluster
from sharding.mesh import MeshConfig

NO_SPILLS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
TRITON_CALL = 'custom_call_target="__gpu$xla.gpu.triton"'
"""How XLA's program calls what Triton has compiled."""


class Kernel(NamedTuple):
    """``name``: what it is of, and the kernel's own; ``call``: of the primitive ``pallas_call``."""

    name: str
    call: JaxprEqn

    @property
    def own_name(self) -> str:
        return self.call.params["name"]

    @property
    def program(self) -> str:
        """All that it is compiled from: kernels that have the same here are one."""
        params = {name: value for name, value in self.call.params.items() if name not in ("debug", "metadata")}
        return str((params, [x.aval for x in self.call.invars]))


def mesh_of(gpu: str) -> Any:
    """Of one GPU, to be set while kernels are traced: their tiles may depend on it."""
    return build_mesh(MeshConfig(), aot.devices(Cluster.parse(f"{gpu}:1")))


def kernels_of(label: str, function: Callable[..., Any], *args: Any) -> list[Kernel]:
    """Those that ``function`` calls, wherever they stand, named by ``label``, place in its order and own name."""
    calls = enumerate(_calls(jax.make_jaxpr(function)(*args).jaxpr), 1)
    return [Kernel(f"{label} {place}, {call.params['name']}", call) for place, call in calls]


def _calls(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
            continue
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                yield from _calls(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)


def failures(gpu: str, kernels: Sequence[Kernel], may_spill: bool = False) -> dict[str, str]:
    """The names of those that do not compile, or spill registers unless they may, and why. They are compiled together,
    and each by itself only if there are such."""
    options = {} if may_spill else NO_SPILLS
    together = _failure(gpu, kernels, options)
    if together is None:
        return {}
    alone = {kernel.name: _failure(gpu, [kernel], options) for kernel in kernels}
    return {name: reason for name, reason in alone.items() if reason} or {"all of them together": together}


def _failure(gpu: str, kernels: Sequence[Kernel], options: dict[str, Any]) -> str | None:
    """Lowering raises many kinds of errors, and all of them count."""
    try:
        text = _compiled(gpu, kernels, options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    found = text.count(TRITON_CALL)
    return None if found == len(kernels) else f"{len(kernels)} kernels are {found} calls in the compiled program"


def _compiled(gpu: str, kernels: Sequence[Kernel], options: dict[str, Any]) -> str:
    mesh = mesh_of(gpu)
    sharding = NamedSharding(mesh, PartitionSpec())

    def operand(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype, sharding=sharding)

    def run(operands: list[list[jax.Array]]) -> list[Any]:
        calls = (kernel.call for kernel in kernels)
        return [call.primitive.bind(*of_call, **call.params) for call, of_call in zip(calls, operands, strict=True)]

    operands = [[operand(x) for x in kernel.call.invars] for kernel in kernels]
    with jax.set_mesh(mesh), aot.not_cached():
        compiled = jax.jit(run).lower(operands).compile(compiler_options=aot.COMPILER_OPTIONS | options)
    return compiled.as_text() or ""
