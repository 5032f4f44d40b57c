"""The audit reads programs right, agrees with the cost model about the engine's, and notices planted faults."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_models import LLAMA, SMALL

import sharding
from jaxserve.batch import BatchLayout
from jaxserve.build import ModelFiles, abstract_runner, open_mesh, resolve_mesh
from jaxserve.dry_run import DryRun
from jaxserve.engine_args import EngineArgs
from jaxserve.models.shape import model_shape
from jaxserve.runner import ModelRunner
from sharding import aot, build_mesh
from sharding.audit import Audit, Budget, audit, audit_text
from sharding.cost_model import Group, Step, payload_bytes
from sharding.hardware import GPUS, Cluster
from sharding.launches import OPTION, launches_of, read_launches
from sharding.mesh import MeshConfig

# -- reading text ------------------------------------------------------------------------------------------------------

AXES = {"dp": 2, "pp": 1, "cp": 1, "tp": 4}
LINES = {
    "listed groups": (
        "%r = f32[4,8]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}",
        "all-reduce over tp, 128",
    ),
    "counted groups": (
        "%r = bf16[4,8] all-reduce(%x), replica_groups=[2,4]<=[8]",
        "all-reduce over tp, 64",
    ),
    "transposed groups": (
        "%r = s32[4,8]{1,0} all-reduce(%x), replica_groups=[4,2]<=[2,4]T(1,0)",
        "all-reduce over dp, 128",
    ),
    "everybody": ("%r = f32[] all-reduce(%x), replica_groups={}", "all-reduce over dp,tp, 4"),
    "nobody": (
        "%r = f32[8]{0} all-reduce(%x), replica_groups=[8,1]<=[8]",
        "all-reduce over nothing, 32",
    ),
    "named axes": (
        "%r = f32[8]{0} all-reduce(%x), replica_groups=mesh['dp'=2,'pp'=1,'cp'=1,'tp'=4] {'dp'}",
        "all-reduce over dp, 32",
    ),
    "axes of another mesh": (
        "%r = f32[8]{0} all-gather(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}",
        "all-gather over tp, 32",
    ),
    "its devices in another order": (
        "%r = f32[8]{0} all-gather(%x), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
        "all-gather over dp, 32",
    ),
    "its devices listed": (
        "%r = f32[8]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=(0,4,1,5,2,6,3,7) {'a'}",
        "all-gather over part of tp, 32",
    ),
    "first part of an axis": (
        "%r = f32[8]{0} all-gather(%x), replica_groups=mesh['a'=8] {'a':(1)2}",
        "all-gather over dp, 32",
    ),
    "last part of an axis": (
        "%r = f32[8]{0} all-gather(%x), replica_groups=mesh['a'=8] {'a':(4)2}",
        "all-gather over part of tp, 32",
    ),
    "several arrays": (
        "%r = (f32[8]{0}, s8[6,1]{1,0}) all-reduce(%x, %y), replica_groups=[2,4]<=[8]",
        "all-reduce over tp, 38",
    ),
    "of four bits": (
        "%r = s4[6,2]{1,0} all-gather(%x), replica_groups=[2,4]<=[8]",
        "all-gather over tp, 6",
    ),
    "reduce-scatter": (
        "%r = f32[8]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8]",
        "reduce-scatter over tp, 128",
    ),
    "all-to-all": (
        "%r = (f32[8]{0}, f32[8]{0}) all-to-all(%x, %y), replica_groups=[4,2]<=[2,4]T(1,0)",
        "all-to-all over dp, 64",
    ),
    "permute": (
        "%r = f32[8]{0} collective-permute(%x), source_target_pairs={{0,4},{4,0},{1,5},{5,1}}",
        "collective-permute over dp, 32",
    ),
    "all-reduce-start, plain": (
        "%r = f32[8]{0} all-reduce-start(%x), replica_groups=[2,4]<=[8]\n  %d = f32[8]{0} all-reduce-done(%r)",
        "all-reduce over tp, 32",
    ),
    "all-reduce-start, with its operands": (
        "%r = ((bf16[8]{0}), bf16[8]{0}) all-reduce-start(%x), replica_groups=[2,4]<=[8]\n"
        "  %d = bf16[8]{0} all-reduce-done(%r)",
        "all-reduce over tp, 16",
    ),
    "all-gather-start": (
        "%r = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8]\n"
        "  %d = f32[8]{0} all-gather-done(%r)",
        "all-gather over tp, 32",
    ),
    "permute-start": (
        "%r = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}\n"
        "  %d = f32[8]{0} collective-permute-done(%r)",
        "collective-permute over tp, 32",
    ),
    "send": (
        "%r = (f32[8]{0}, u32[], token[]) send(%x, %t), channel_id=1, is_host_transfer=false, "
        'frontend_attributes={_xla_send_recv_source_target_pairs="{{0,4}}"}',
        "send over dp, 32",
    ),
}


def read(body: str, before: str = "", header: str = "", axes: dict[str, int] = AXES) -> Audit:
    entry = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  {body}\n}}\n"
    return audit_text(f"HloModule test{header}\n\n{before}\n{entry}", axes)


@pytest.mark.parametrize("line", LINES)
def test_collectives_of_every_form(line: str) -> None:
    text, expected = LINES[line]
    (found,) = read(text).collectives
    assert str(found) == expected.replace(", ", " in elsewhere, ") + " bytes"


def test_unreadable_groups_are_an_error() -> None:
    with pytest.raises(ValueError, match="no replica groups"):
        read("%r = f32[8]{0} all-reduce(%x), to_apply=%sum")


SUM = "all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%sum"
NESTED = f"""
%body (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} {SUM}, metadata={{op_name="jit(f)/layer_1/mlp/dot"}}
}}
%test (p: f32[8]) -> pred[] {{
  ROOT %p = pred[] parameter(0)
}}
%yes (p: f32[8]) -> f32[8] {{
  ROOT %r = f32[8]{{0}} {SUM}
}}
%no (p: f32[8]) -> f32[8] {{
  ROOT %r = f32[8]{{0}} call(%p), to_apply=%called
}}
%called (p: f32[8]) -> f32[8] {{
  ROOT %r = f32[8]{{0}} {SUM}
}}
%wrapped (p: f32[8]) -> f32[8] {{
  ROOT %r = f32[2]{{0}} reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%sum
}}
"""


def test_loops_branches_and_calls() -> None:
    found = read(
        """%w = f32[8]{0} while(%x), condition=%test, body=%body
  %c = f32[8]{0} conditional(%i, %w, %w), branch_computations={%yes, %no}, metadata={op_name="jit(f)/sample/cond"}
  %a = f32[8]{0} call(%c), to_apply=%called, metadata={op_name="jit(f)/embed/call"}
  %b = f32[8]{0} call(%a), to_apply=%called
  %s = ((f32[8]), f32[2], u32[]) async-start(%b), calls=%wrapped
  %d = f32[2]{0} async-done(%s)""",
        NESTED,
    )
    seen = sorted((c.op, c.where, c.in_loop, c.in_branch, c.num_bytes) for c in found.collectives)
    assert seen == [
        ("all-reduce", "elsewhere", False, False, 32),
        ("all-reduce", "embed", False, False, 32),
        ("all-reduce", "layer_1/mlp", True, False, 32),
        ("all-reduce", "sample", False, True, 32),
        ("all-reduce", "sample", False, True, 32),
        ("reduce-scatter", "elsewhere", False, False, 32),
    ]
    assert found.per_layer("all-reduce", "tp") == {1: 1}
    assert found.total_bytes("all-reduce") == 5 * 32
    assert found.total_bytes(axis="dp") == 0
    assert found.total_bytes(where="sample") == 64


def test_a_collective_without_a_name_is_what_it_feeds() -> None:
    found = read(
        """%w = f32[2]{0} parameter(0), metadata={op_name="params[3]"}
  %g = f32[8]{0} all-gather(%w), replica_groups=[2,4]<=[8], dimensions={0}
  %t = f32[8]{0} bitcast(%g)
  %f = f32[8]{0} fusion(%t), kind=kLoop, calls=%dot, metadata={op_name="jit(f)/layer_7/mlp/dot_general"}"""
    )
    assert found.collectives[0].where == "layer_7/mlp"


ALIAS = ", input_output_alias={ {0}: (0, {}, may-alias), {1, 0}: (2, {}, must-alias) }, entry_computation_layout={}"
STATE = """%k = f32[1,4,8,2]{3,2,1,0} parameter(0), metadata={op_name="state.keys[0]"}
  %b = f32[4,8]{1,0} parameter(1), metadata={op_name="state.sampler.bias"}
  %v = f32[1,4,2,8]{3,2,1,0} parameter(2), metadata={op_name="state.values[0]"}
"""


def test_aliases_and_copies() -> None:
    found = read(
        STATE
        + """  %c = f32[1,4,8,2]{3,2,1,0} copy(%k)
  %f = f32[4,2,8]{2,1,0} fusion(%v), kind=kLoop, calls=%wrapped_copy
  %n = f32[4,8]{1,0} copy(%b)
  %o = bf16[1,4,8,2]{3,2,1,0} copy(%z)""",
        "%wrapped_copy (p: f32[4,2,8]) -> f32[4,2,8] {\n  %p = f32[4,2,8]{2,1,0} parameter(0)\n"
        "  ROOT %r = f32[4,2,8]{2,1,0} copy(%p)\n}",
        ALIAS,
    )
    assert [(p.name, p.aliased) for p in found.parameters] == [
        ("state.keys[0]", True),
        ("state.sampler.bias", False),
        ("state.values[0]", True),
    ]
    assert [(c.name, c.num_bytes) for c in found.copies] == [("c", 256), ("f", 256)]
    broken = found.check(Budget(1))
    assert broken[0] == "state.sampler.bias, 128 bytes, is not updated in place"
    assert [line.split(" in ")[0] for line in broken[1:]] == ["copy of KV blocks: c", "copy of KV blocks: f"]


def test_launches() -> None:
    text = """001: kCustomKernel  [source       | next=002 (1)] a
000: kCommandBuffer [prev=008 (2) | next=018 (1)]
    010: kCustomKernel [source       | next=011 (1)] b
    011: kAsyncStart   [source | sink]
        012: kCopy [source | sink] kCopy
018: kWhile         [prev=000 (1) | next=037 (1)]
condition:
    019: kCustomKernel [source | sink] c
  body:
    000: kCommandBuffer [source | sink]
        020: kGemm [source | sink] d
040: kAllReduce     [prev=039 (1) | next=000 (1)] kAllReduce
041: kAllReduce     [prev=039 (1) | next=000 (1)] kAllReduce"""
    found = launches_of(text)
    assert (found.graphs, found.inside, found.outside) == (2, 3, {"CustomKernel": 2, "AllReduce": 2})
    assert str(found) == "2 CUDA graphs hold 3 of 7 operations; not in one: 2 CustomKernel, 2 AllReduce"


# -- the engine's programs ---------------------------------------------------------------------------------------------

MODEL = LLAMA | {"num_key_value_heads": 8, "num_attention_heads": 16, "head_dim": 4, "vocab_size": 104}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing but a config; several KV heads on every device of the meshes below."""
    directory = tmp_path_factory.mktemp("shape")
    (directory / "config.json").write_text(json.dumps(MODEL))
    return directory


class Engine:
    """A runner without weights, and what the cost model expects of it."""

    def __init__(self, model: Path, mesh: str, target: str | None = None, **options: Any) -> None:
        self.args = EngineArgs(model=str(model), mesh=mesh, **(SMALL | options))
        self.config = resolve_mesh(self.args)
        self.files = ModelFiles.find(self.args)
        devices = None if target is None else aot.devices(Cluster.parse(target))
        self.mesh = open_mesh(self.config) if devices is None else build_mesh(self.config, devices)
        self.runner: ModelRunner = abstract_runner(self.args, self.files, self.mesh)[0]

    def layout(self, decode: bool) -> BatchLayout:
        config = self.runner.config
        return config.layout(config.decode_buckets[-1] if decode else config.token_buckets[-1], decode)

    def step(self, layout: BatchLayout) -> Step:
        rows, seqs = layout.num_tokens, layout.num_seqs
        chunk = (Group(1, rows - seqs + 1),) if rows > seqs else ()
        return Step((*chunk, Group(seqs - len(chunk), 1)))

    def shape(self) -> Any:
        dtype = str(self.runner.params[0].dtype)
        return model_shape(self.files.decoder, dtype, str(self.runner.config.kv_dtype)).fit_to(self.config)

    def budget(self, layout: BatchLayout) -> Budget:
        return Budget.of_step(self.shape(), self.step(layout), self.config)

    def audit(self, layout: BatchLayout) -> Audit:
        return audit(self.runner.step_program(layout, (40,)), self.mesh)


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
@pytest.mark.parametrize("mesh", ["tp=4", "tp=8", "dp=2", "dp=2,tp=2", "pp=2", "cp=2", "dp=2,pp=2,tp=2"])
def test_collectives_are_those_of_the_cost_model(mesh: str, decode: bool, model: Path) -> None:
    engine = Engine(model, mesh)
    layout = engine.layout(decode)
    found, step = engine.audit(layout), engine.step(layout)
    assert found.check(engine.budget(layout)) == []
    expected = payload_bytes(engine.shape(), step, engine.config)
    vocabulary = tuple(axis for axis in ("pp", "tp") if getattr(engine.config, axis) > 1)
    expected[vocabulary] -= 2 * step.num_seqs * 8  # sampling, which has branches that the model does not count
    for axes, num_bytes in expected.items():
        assert sum(c.num_bytes for c in found.collectives if c.axes == axes and c.where != "sample") == max(
            0, num_bytes
        )
    if engine.config.tp > 1:
        assert found.per_layer("all-reduce", "tp") == dict.fromkeys(range(engine.runner.decoder.layers_per_stage), 2)
    assert found.matching(axis="dp") == []


def test_bytes_by_hand(model: Path) -> None:
    engine = Engine(model, "dp=2,tp=2")
    found = engine.audit(engine.layout(decode=False))
    rows, width, float32 = 32, 64, 4
    assert found.total_bytes("all-reduce", "tp", "layer_1/mlp") == rows * width * float32
    assert found.total_bytes("all-reduce", "tp", "layer_*") == 4 * rows * width * float32
    assert found.total_bytes("all-reduce", "tp", "embed") == rows * width * float32
    assert 0 < max(c.num_bytes for c in found.matching(where="sample")) <= 4 * 8
    memory = found.memory
    assert memory is not None
    assert memory.arguments == pytest.approx(sum(p.num_bytes for p in found.parameters), rel=0.01)
    assert memory.total == memory.arguments + memory.outputs + memory.temporaries - memory.aliased
    assert json.loads(json.dumps(found.to_json(2)))["collectives"][0]["op"] == "all-reduce"


def test_a_weight_that_lies_wrong_is_reported(model: Path) -> None:
    engine = Engine(model, "tp=4")
    names = list(engine.runner.named_params)
    at = names.index("layers.1.mlp.down")
    down = engine.runner.params[at]
    whole = NamedSharding(engine.mesh, PartitionSpec(None, "tp"))
    engine.runner.params[at] = jax.ShapeDtypeStruct(down.shape, down.dtype, sharding=whole)
    layout = engine.layout(decode=True)
    broken = engine.audit(layout).check(engine.budget(layout))
    assert any("layer_1/mlp" in line for line in broken)
    assert not any("layer_0" in line or "attention" in line for line in broken)


def test_a_weight_gathered_over_replicas_is_reported(model: Path) -> None:
    engine = Engine(model, "dp=2")
    for i, p in enumerate(engine.runner.params):
        spec = PartitionSpec("dp") if p.ndim > 1 else PartitionSpec()
        engine.runner.params[i] = jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=NamedSharding(engine.mesh, spec))
    layout = engine.layout(decode=True)
    found = engine.audit(layout)
    gathered = found.matching("all-gather", "dp", "layer_0/*")
    assert gathered
    broken = found.check(engine.budget(layout))
    assert any(line.startswith("not expected: ") and "all-gather over dp in layer_0/" in line for line in broken)


def test_state_that_is_not_donated_is_reported(model: Path) -> None:
    engine = Engine(model, "tp=2")
    runner, layout = engine.runner, engine.layout(decode=True)
    state = runner.abstract_state((40,))
    replicated = NamedSharding(engine.mesh, PartitionSpec())
    per_replica = NamedSharding(engine.mesh, PartitionSpec("dp"))
    buffer = jax.ShapeDtypeStruct((1, layout.num_words), jnp.int32, sharding=per_replica)
    wanted = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=replicated)
    step = jax.jit(runner.traced.single, static_argnums=4)
    with jax.set_mesh(engine.mesh):
        compiled = step.lower(runner.params, state, buffer, wanted, layout).compile()
    broken = audit(compiled, engine.mesh).check(engine.budget(layout))
    assert sum("is not updated in place" in line for line in broken) == len(jax.tree.leaves(state))
    assert any(line.startswith("state.keys[1], ") for line in broken)


# -- GPUs that are not there -------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
optimized = pytest.mark.usefixtures("optimized")


@needs_compiler
@optimized
def test_the_h200_program(model: Path, tmp_path: Path) -> None:
    engine = Engine(model, "dp=2,tp=2", "h200:4", dtype="bfloat16")
    layout = engine.layout(decode=True)
    engine.runner.compiler_options |= {OPTION: str(tmp_path)}
    with aot.not_cached():
        found = engine.audit(layout)
    assert found.check(engine.budget(layout)) == []
    assert found.per_layer("all-reduce", "tp") == {0: 2, 1: 2}
    assert {c.op for c in found.collectives} == {"all-reduce"}
    assert all(p.aliased for p in found.parameters if p.name.startswith("state"))
    launches = read_launches(tmp_path)
    assert launches is not None
    assert launches.graphs == 1 and launches.inside > 50 and not launches.outside


@needs_compiler
@optimized
@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_can_be_compiled_for(name: str) -> None:
    target = Cluster.parse(f"{name}:2")
    found = aot.devices(target)
    name = target.gpu.chip.name
    assert [d.device_kind for d in found] == [aot.SAME_CHIP.get(name, name)] * 2
    mesh = build_mesh(MeshConfig(tp=2), found)
    by_rows = NamedSharding(mesh, PartitionSpec("tp"))
    x = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16, sharding=by_rows)
    total = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    with aot.not_cached():
        (sent,) = audit(total.lower(x).compile(), mesh).collectives
    assert (sent.op, sent.axes) == ("all-reduce", ("tp",))


CONFIGS = sorted(Path(sharding.__file__).with_name("configs").glob("*x*.toml"))


@needs_compiler
@optimized
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_meshes_of_launch_files_compile(path: Path, tmp_path: Path) -> None:
    """For as many H200 on as many hosts as the file is named after, and within the budget; a layer for each stage."""
    hosts, gpus = map(int, path.stem.split("-")[0].split("x"))
    layers = max(2, MeshConfig.from_file(path).pp)
    (tmp_path / "config.json").write_text(json.dumps(MODEL | {"num_hidden_layers": layers}))
    args = EngineArgs(model=str(tmp_path), mesh=path, dtype="bfloat16", **SMALL)
    run = DryRun.of(args, Cluster.parse(f"{gpus}xh200", hosts))
    (program,) = [run.program(layout) for layout in run.layouts(decode=True)]
    assert program.broken == ()
    used = [axes for axes in (("tp",), ("pp",), ("pp", "tp")) if all(getattr(run.mesh, a) > 1 for a in axes)]
    assert {c.axes for c in program.audit.collectives if c.axes} == set(used)


@needs_compiler
@optimized
def test_flags_of_a_mesh_file_reach_the_compiler(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "mesh.toml"
    for flag, is_known in (("--xla_gpu_enable_latency_hiding_scheduler=true", True), ("--xla_gpu_is_pink=true", False)):
        path.write_text(f'[axes]\ntp = 2\n[xla_flags]\n"{jax.__version__}" = ["{flag}"]\n')
        args = EngineArgs(model=str(model), mesh=path, dtype="bfloat16", **SMALL)
        run = DryRun.of(args, Cluster.parse("h200:2"))
        (layout,) = run.layouts(decode=True)
        if is_known:
            run.program(layout)
        else:
            with pytest.raises(ValueError, match=r"xla_flags.*xla_gpu_is_pink"):
                run.program(layout)


@needs_compiler
def test_gpus_of_several_hosts() -> None:
    found = aot.devices(Cluster.parse("16xh100"))
    assert [d.process_index for d in found] == [0] * 8 + [1] * 8


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    wanted = f"pip install jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"
    for version, said in ((no_version, "is not installed"), (lambda name: "0.1", "is 0.1")):
        monkeypatch.setattr(aot, "version", version)
        with pytest.raises(NotImplementedError, match=f"jax-cuda13-plugin {said}: {wanted}"):
            aot.devices(Cluster.parse("h200:8"))
    monkeypatch.setattr(aot, "version", lambda name: jax.__version__)
    monkeypatch.setattr(aot, "_ptxas", lambda: False)
    with pytest.raises(NotImplementedError, match="needs ptxas: install the CUDA toolkit"):
        aot.devices(Cluster.parse("h200:8"))


# -- which platform jax looks for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plugins", "nodes", "chosen"),
    [
        ({"cuda"}, False, ["cpu"]),
        ({"cuda"}, True, []),
        (set(), False, []),
        ({"cuda", "tpu"}, False, []),
        ({"metal"}, False, []),
    ],
)
def test_the_cpu_is_chosen_only_where_cuda_would_fail(
    plugins: set[str], nodes: bool, chosen: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sharding import platform

    asked: list[str] = []
    monkeypatch.setattr(platform, "_plugins", lambda: plugins)
    monkeypatch.setattr(platform, "DEVICE_NODES", (str(tmp_path) if nodes else str(tmp_path / "none"),))
    monkeypatch.setattr(platform, "use_cpu", lambda: asked.append("cpu"))
    platform.use_cpu_without_gpus()
    assert asked == chosen
