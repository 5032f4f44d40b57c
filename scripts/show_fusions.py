"""What XLA makes of a layer's work between the products: kernels, and the bytes that they move.

Compiles everything of a layer but attention itself for a GPU that need not be there (jax's CUDA plug-in and ptxas must
be: ``pip install -e '.[aot]'``), and reads the optimised program. Bytes are those of arrays, as if nothing stayed in a
cache: what a kernel reads of a slice is the slice, what it writes of a KV cache the tokens' rows. ``docs/fusions.md``
discusses what comes out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jaxserve.cli.command import epilog, run_script
from jaxserve.cli.options import Json
from jaxserve.cli.output import bytes_text, print_json, print_table, progress
from sharding.hlo import Instruction, Module, arrays, bytes_of

if TYPE_CHECKING:
    from jax import Array

    from pallas_kernels.kv_write import KvWrite

PRODUCT, RESIDUAL, NORM, ACTIVATION, KV_WRITE = OPS = ("product", "residual", "norm", "activation", "kv_write")
"""The scopes that a layer is traced in."""
SCOPE = re.compile(rf"/({'|'.join(OPS)})(?=/)")
STRUCTURE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
"""Instructions that no kernel runs for."""
BF16, FLOAT32, INT32 = 2, 4, 4
BLOCK_SIZE, NUM_BLOCKS = 16, 4096
"""Of the KV caches: larger than a step writes, so that a copy of one would show."""

STEPS = (64, 2048)
"""Tokens: of a step that decodes, and of one with prompts."""

Activation = Literal["silu", "gelu_tanh"]
Write = Literal["reference", "triton"]


@dataclass(frozen=True)
class LayerShape:
    """T tokens, model width D, feed-forward width F, K kv heads of G query heads, head dim H. All bfloat16."""

    tokens: int
    hidden: int
    ffn: int
    kv_heads: int
    group: int
    head_dim: int
    activation: Activation

    @property
    def qkv(self) -> tuple[int, ...]:
        return self.tokens, self.kv_heads, self.group + 2, self.head_dim

    def least(self, ops: tuple[str, ...], qk_norm: bool = False) -> int:
        """Bytes that one kernel would move that does these ops once: their arguments in, their results out."""
        rows, weight = self.tokens * self.hidden * BF16, self.hidden * BF16
        angles, head_weights = self.tokens * self.head_dim * FLOAT32, 2 * self.head_dim * BF16
        return {
            (RESIDUAL,): 3 * rows,
            (NORM,): 2 * rows + weight,
            (RESIDUAL, NORM): 4 * rows + weight,
            (ACTIVATION,): 3 * self.tokens * self.ffn * BF16,
            (KV_WRITE,): 2 * prod(self.qkv) * BF16 + angles + self.tokens * INT32 + head_weights * qk_norm,
        }[ops]


@dataclass(frozen=True)
class Variant:
    """A way to normalise, turn and write K and V."""

    write: Write
    qk_norm: bool

    def __str__(self) -> str:
        how = "kernel" if self.write == "triton" else "XLA"
        return f"{'QK-norm too' if self.qk_norm else 'KV write'}: {how}"


VARIANTS = tuple(Variant(write, qk_norm) for qk_norm in (False, True) for write in ("reference", "triton"))


# -- the program -------------------------------------------------------------------------------------------------------


def compiled_text(shape: LayerShape, variant: Variant, target: str) -> str:
    """The optimised program of a layer from behind its attention to before that of the next."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from sharding import aot, build_mesh
    from sharding.hardware import Cluster
    from sharding.mesh import MeshConfig

    mesh = build_mesh(MeshConfig(), aot.devices(Cluster.parse(f"{target}:1")))
    sharding = NamedSharding(mesh, PartitionSpec())

    def array(dims: tuple[int, ...], dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jax.numpy.dtype(dtype), sharding=sharding)

    t, d, f, h = shape.tokens, shape.hidden, shape.ffn, shape.head_dim
    q_size, half = shape.kv_heads * shape.group * h, h // 2
    cache = array((NUM_BLOCKS, shape.kv_heads, BLOCK_SIZE, h))
    weights = {
        "o": array((q_size, d)),
        "mlp_norm": array((d,)),
        "gate_up": array((d, 2, f)),
        "down": array((f, d)),
        "attn_norm": array((d,)),
        "qkv": array((d, *shape.qkv[1:])),
        "qk_norm": (array((h,)), array((h,))) if variant.qk_norm else None,
    }
    step = {
        "attention": array((t, q_size)),
        "rope": (array((t, half), "float32"), array((t, half), "float32")),
        "slot_mapping": array((t,), "int32"),
    }
    with jax.set_mesh(mesh), aot.not_cached():
        program = jax.jit(_layer(shape, variant), donate_argnums=0)
        lowered = program.lower((cache, cache), array((t, d)), weights, step)
        return lowered.compile(aot.COMPILER_OPTIONS).as_text() or ""


def _layer(shape: LayerShape, variant: Variant) -> Any:
    """(caches, x [T, D], weights, step) -> x, q and the caches: as ``jaxserve.models.decoder`` has it, on one row."""
    import jax
    import jax.numpy as jnp

    from jaxserve.models.config import NormConfig
    from pallas_kernels.kv_write import HeadNorm, Inputs
    from pallas_kernels.matmul import ACTIVATIONS
    from pallas_kernels.paged_attention import Scoring

    activation, write = ACTIVATIONS[shape.activation], _implementation(variant.write)

    def layer(caches: tuple[Array, Array], x: Array, weights: dict[str, Any], step: dict[str, Any]) -> Any:
        with jax.named_scope(PRODUCT):
            y = step["attention"] @ weights["o"]
        with jax.named_scope(RESIDUAL):
            x = x + y
        with jax.named_scope(NORM):
            y = _normalized(x, weights["mlp_norm"])
        with jax.named_scope(PRODUCT):
            y = jnp.einsum("td,dzf->tzf", y, weights["gate_up"])
        with jax.named_scope(ACTIVATION):
            y = activation(y[:, 0]) * y[:, 1]
        with jax.named_scope(PRODUCT):
            y = y @ weights["down"]
        with jax.named_scope(RESIDUAL):
            x = x + y
        with jax.named_scope(NORM):
            y = _normalized(x, weights["attn_norm"])
        with jax.named_scope(PRODUCT):
            qkv = jnp.einsum("td,dkgh->tkgh", y, weights["qkv"])
        with jax.named_scope(KV_WRITE):
            inputs = Inputs(qkv, step["slot_mapping"], step["rope"], weights["qk_norm"])
            q, *caches_now = write.write(*caches, inputs, HeadNorm(NormConfig().eps), Scoring(1.0))
        return tuple(caches_now), x, q

    return layer


def _implementation(name: Write) -> KvWrite:
    from pallas_kernels.kv_write import reference, triton

    return {"reference": reference.IMPLEMENTATION, "triton": triton.IMPLEMENTATION}[name]


def _normalized(x: Array, weight: Array) -> Array:
    """x [T, D] through the engine's norm."""
    from flax import nnx

    from jaxserve.layers.norm import Norm
    from jaxserve.models.config import NormConfig

    norm = Norm(weight.shape, NormConfig(), weight.dtype)
    norm.weight = nnx.Param(weight)
    return norm(x)


# -- reading it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One launch, what of the layer it does, and the bytes that it moves."""

    name: str
    ops: tuple[str, ...]
    reads: int
    writes: int


@dataclass(frozen=True)
class Program:
    """A compiled layer. ``written``: bytes of K, and of V, that a step writes."""

    module: Module
    written: int

    @cached_property
    def entry(self) -> Mapping[str, Instruction]:
        return self.module.computations[self.module.entry]

    def kernels(self) -> list[Kernel]:
        instructions = [i for i in self.entry.values() if i.op not in STRUCTURE]
        return [Kernel(i.name, self._ops(i), self._reads(i), self._writes(i)) for i in instructions]

    def _ops(self, instruction: Instruction) -> tuple[str, ...]:
        """In the layer's order. The sum of a split product's parts is not a product: it belongs to what it feeds."""
        inner = [instruction, *self._fused(instruction).values()]
        ops = {found[1] for i in inner if (found := SCOPE.search(i.op_name))}
        if any(i.op == "dot" or "gemm" in i.attributes for i in inner):
            return tuple(op for op in OPS if op in ops | {PRODUCT})
        if ops - {PRODUCT}:
            return tuple(op for op in OPS if op in ops - {PRODUCT})
        return tuple(dict.fromkeys(op for user in self._users(instruction.name) for op in self._ops(user)))

    def _users(self, name: str) -> Iterator[Instruction]:
        """Kernels that take this as it is."""
        for user in self.entry.values():
            if name in user.operands and user.op != "tuple":
                yield from self._users(user.name) if user.op in STRUCTURE else (user,)

    def _fused(self, instruction: Instruction) -> Mapping[str, Instruction]:
        calls = [name for how, name in instruction.called() if how == "calls"]
        return self.module.computations[calls[0]] if calls else {}

    def _reads(self, instruction: Instruction) -> int:
        fused = self._fused(instruction)
        sizes = [self.entry[name].num_bytes for name in instruction.operands]
        if not fused:
            in_place = {operand for operand, _ in _aliases(instruction)}
            return sum(size for i, size in enumerate(sizes) if i not in in_place)
        inner = {int(i.operands[0]): i.name for i in fused.values() if i.op == "parameter"}
        shares = _shares(fused)
        return sum(round(size * shares[inner[i]]) for i, size in enumerate(sizes))

    def _writes(self, instruction: Instruction) -> int:
        roots = [i for i in self._fused(instruction).values() if i.is_root]
        if roots and roots[0].op == "scatter":
            return self.written
        in_place = _aliases(instruction)
        outputs = [array.num_bytes for array in arrays(instruction.shape)]
        return sum(outputs) - sum(outputs[i] for _, i in in_place) + self.written * len(in_place)


def _aliases(instruction: Instruction) -> list[tuple[int, int]]:
    """(operand, output) that lie in the same memory, of a kernel that updates arrays in place."""
    found = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", instruction.attributes)
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", found[1]) if found else []
    return [(int(operand), int(output or 0)) for output, operand in pairs]


View = tuple[str, ...]
"""The slices, outermost first, through which something is looked at; () is all of it."""


def _shares(fused: Mapping[str, Instruction]) -> dict[str, float]:
    """How much of every instruction's result the computation uses: 1 unless only slices of it are. What is written in
    place is not read."""
    views: dict[str, dict[View, float]] = {name: {} for name in fused}
    for instruction in reversed(list(fused.values())):  # users come after what they use
        mine = {(): 1.0} if instruction.is_root else views[instruction.name]
        for i, operand in enumerate(instruction.operands):
            if operand in views and not (instruction.op == "scatter" and i == 0):
                views[operand] |= _through(instruction, fused[operand], mine)
    return {name: min(1.0, sum(seen.values())) for name, seen in views.items()}


def _through(user: Instruction, operand: Instruction, seen: Mapping[View, float]) -> dict[View, float]:
    if user.op != "slice":
        return dict(seen)
    share = bytes_of(user.shape) / bytes_of(operand.shape)
    bounds = re.search(r"slice=\{[^}]*\}", user.attributes)
    return {(bounds[0] if bounds else user.name, *view): share * part for view, part in seen.items()}


# -- output ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Kernels that do the same ops of the layer, and the fewest bytes that it takes to do them."""

    title: str
    kernels: int
    reads: int
    writes: int
    least: int
    in_products: int = 0
    """Products that do one of the ops on their way."""

    @property
    def times_least(self) -> float:
        return (self.reads + self.writes) / self.least

    @classmethod
    def of(cls, title: str, kernels: Iterable[Kernel], least: int, in_products: int = 0) -> Row:
        own = list(kernels)
        return cls(title, len(own), sum(k.reads for k in own), sum(k.writes for k in own), least, in_products)


def rows_of(shape: LayerShape, kernels: Mapping[Variant, list[Kernel]]) -> list[Row]:
    """What all variants share, from the first; then their KV writes."""
    shared = kernels[VARIANTS[0]]
    written = (
        Row.of(str(variant), _doing(found, (KV_WRITE,)), shape.least((KV_WRITE,), variant.qk_norm))
        for variant, found in kernels.items()
    )
    activation = Row.of(
        f"{shape.activation} and mul",
        _doing(shared, (ACTIVATION,)),
        shape.least((ACTIVATION,)),
        _in_products(shared, (ACTIVATION,)),
    )
    return [*_residuals_and_norms(shape, shared), activation, *written]


def _residuals_and_norms(shape: LayerShape, kernels: Sequence[Kernel]) -> Iterator[Row]:
    """Apart, as far as they are, and all of them: a layer has two of each."""
    both = (RESIDUAL, NORM)
    titles = {(RESIDUAL,): "residual add", (NORM,): "RMSNorm", both: "residual add + norm"}
    for ops, title in titles.items():
        if own := [k for k in kernels if k.ops == ops]:
            yield Row.of(title, own, len(own) * shape.least(ops))
    yield Row.of("2 of each, in all", _doing(kernels, both), 2 * shape.least(both), _in_products(kernels, both))


def _doing(kernels: Sequence[Kernel], ops: tuple[str, ...]) -> Iterator[Kernel]:
    """Those that begin with one of these ops."""
    return (k for k in kernels if k.ops and k.ops[0] in ops)


def _in_products(kernels: Sequence[Kernel], ops: tuple[str, ...]) -> int:
    return sum(any(op in ops for op in k.ops[1:]) for k in _doing(kernels, (PRODUCT,)))


def _print(shape: LayerShape, target: str, kernels: Mapping[Variant, list[Kernel]], every: bool) -> None:
    print(f"{shape.tokens} tokens on {target}, D={shape.hidden}, F={shape.ffn}, {shape.kv_heads} × {shape.group} heads")
    header = ["of a layer", "kernels", "reads", "writes", "least", "× least"]
    print_table(header, [_cells(row) for row in rows_of(shape, kernels)])
    products = list(_doing(kernels[VARIANTS[0]], (PRODUCT,)))
    moved = bytes_text(sum(k.reads + k.writes for k in products))
    print("  KV write: turn q and k, write K and V. (+1): a product does that part on its way.")
    print(f"  {len(products)} products read and write {moved}.\n")
    for variant in VARIANTS if every else ():
        print(f"  {variant}")
        cells = [[k.name, " + ".join(k.ops), bytes_text(k.reads), bytes_text(k.writes)] for k in kernels[variant]]
        print_table(["kernel", "does", "reads", "writes"], cells)


def _cells(row: Row) -> list[str]:
    kernels = f"{row.kernels} (+{row.in_products})" if row.in_products else str(row.kernels)
    times = f"{row.times_least:.2f}" if row.kernels else ""
    return [row.title, kernels, *(bytes_text(n) for n in (row.reads, row.writes, row.least)), times]


@epilog(
    "python scripts/show_fusions.py",
    "python scripts/show_fusions.py --tokens 256 --target a100 --kernels",
    "python scripts/show_fusions.py --hidden 3584 --ffn 18944 --kv-heads 4 --group 7 --json",
)
def show_fusions(
    *,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Of a step; can be repeated. [64 and 2048]")] = None,
    target: Annotated[str, typer.Option(metavar="GPU", help="a100, h100, h200, ...")] = "h200",
    hidden: Annotated[int, typer.Option(min=1, help="D, the model's width.")] = 4096,
    ffn: Annotated[int, typer.Option(min=1, help="F, the feed-forward width.")] = 14336,
    kv_heads: Annotated[int, typer.Option(min=1, help="K.")] = 8,
    group: Annotated[int, typer.Option(min=1, help="G, query heads of a KV head.")] = 4,
    head_dim: Annotated[int, typer.Option(min=2, help="H.")] = 128,
    activation: Annotated[Activation, typer.Option(help="Of the feed-forward's gate.")] = "silu",
    every_kernel: Annotated[bool, typer.Option("--kernels", help="List every kernel, products too.")] = False,
    as_json: Json = False,
) -> None:
    """Compile a layer without its attention and report kernels and bytes of norms, residuals, activation and KV write,
    beside the fewest bytes possible. Nothing runs, and no GPU has to be there."""
    found: list[dict[str, Any]] = []
    for num_tokens in tokens or STEPS:
        shape = LayerShape(num_tokens, hidden, ffn, kv_heads, group, head_dim, activation)
        written = num_tokens * kv_heads * head_dim * BF16
        kernels: dict[Variant, list[Kernel]] = {}
        for variant in progress(f"compiling for {num_tokens} tokens", VARIANTS):
            kernels[variant] = Program(Module.parse(compiled_text(shape, variant, target)), written).kernels()
        if as_json:
            rows = [asdict(row) | {"times_least": row.times_least} for row in rows_of(shape, kernels)]
            programs = [asdict(variant) | {"kernels": kernels[variant]} for variant in VARIANTS]
            found.append({"shape": shape, "rows": rows, "programs": programs})
        else:
            _print(shape, target, kernels, every_kernel)
    if as_json:
        print_json({"target": target, "steps": [s | {"programs": [_plain(p) for p in s["programs"]]} for s in found]})


def _plain(program: dict[str, Any]) -> dict[str, Any]:
    return program | {"kernels": [asdict(kernel) for kernel in program["kernels"]]}


def main() -> None:
    run_script(show_fusions)


if __name__ == "__main__":
    main()
