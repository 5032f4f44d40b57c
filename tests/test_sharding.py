"""Meshes and rules refuse what does not fit; the compiled programs communicate and copy no more than they must."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from jax.sharding import Mesh, PartitionSpec
from tiny_models import write_llama

from jaxserve import LLM
from sharding import MESH_AXES, MeshConfig, ShardingRules, build_mesh, shard_shape, shardings_for
from sharding.audit import Audit, audit

MakeLLM = Callable[..., LLM]

# -- meshes and rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("", (1, 1, 1, 1)), ("tp=4", (1, 1, 1, 4)), (" dp=2, tp=3 ,", (2, 1, 1, 3)), ("pp=2", (1, 2, 1, 1))],
)
def test_parse(text: str, sizes: tuple[int, ...]) -> None:
    config = MeshConfig.parse(text)
    assert config.shape == sizes
    assert MeshConfig.parse(str(config)) == config


@pytest.mark.parametrize("text", ["tp", "tp=", "tp=x", "tp=-1", "tp=0", "ep=2", "tp=2,tp=2", "tp=2;dp=2", "tp=1.5"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="mesh"):
        MeshConfig.parse(text)


@pytest.mark.parametrize("size", [0, -1, 1.0, True, "2"])
def test_sizes_are_whole_numbers(size: object) -> None:
    with pytest.raises(ValueError, match="tp="):
        MeshConfig(tp=size)  # pyright: ignore[reportArgumentType]


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "mesh.toml"
    path.write_text("[axes]\ndp = 2\ntp = 4\n")
    assert MeshConfig.from_file(path) == MeshConfig(dp=2, tp=4)
    assert MeshConfig.resolve(path, tp=4) == MeshConfig.resolve(str(path)) == MeshConfig(dp=2, tp=4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[axes]\nep = 2", "ep"),
        ("[axes]\n[other]\n", "other"),
        ("", "axes"),
        ("[axes", "Expected"),
        ("axes = 3", "axes"),
        ("[axes]\ntp = 'x'", "tp="),
    ],
)
def test_from_file_refuses(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mesh.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        MeshConfig.from_file(path)
    assert "\n" not in str(error.value)


def test_resolve() -> None:
    assert MeshConfig.resolve(None, tp=2, dp=3) == MeshConfig(dp=3, tp=2)
    assert MeshConfig.resolve("tp=2", tp=2, dp=1) == MeshConfig.resolve(MeshConfig(tp=2)) == MeshConfig(tp=2)
    with pytest.raises(ValueError, match=r"tp=2.*says 4"):
        MeshConfig.resolve("tp=2", tp=4)


def test_build_mesh() -> None:
    mesh = build_mesh(MeshConfig(dp=2, tp=4))
    assert mesh.axis_names == MESH_AXES
    assert [d.id for d in mesh.devices.flat] == list(range(8))
    assert [d.id for d in mesh.devices[1].flat] == [4, 5, 6, 7]
    with pytest.raises(ValueError, match=r"16 devices.* 8 .*JAX_NUM_CPU_DEVICES=16"):
        build_mesh(MeshConfig(dp=4, tp=4))


def test_rules() -> None:
    rules = ShardingRules()
    assert rules.spec(("embed", "kv_heads", None)) == PartitionSpec(None, "tp", None)
    with pytest.raises(ValueError, match=r"vocab.*mlp.*twice"):
        rules.spec(("vocab", "mlp"))
    with pytest.raises(ValueError, match=r"'heads'.*known: .*kv_heads"):
        rules.spec(("heads",))
    assert ShardingRules(vocab=None).spec(("vocab", "mlp")) == PartitionSpec(None, "tp")


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return build_mesh(MeshConfig(dp=2, tp=4))


def test_shard_shapes(mesh: Mesh) -> None:
    rules, shapes, axes = ShardingRules(), {"w": (6, 8), "b": (12,)}, {"w": ("embed", "mlp"), "b": ("vocab",)}
    assert shard_shape("w", shapes["w"], axes["w"], mesh, rules) == (6, 2)
    for name, sharding in shardings_for(shapes, axes, mesh, rules).items():
        assert sharding.shard_shape(shapes[name]) == shard_shape(name, shapes[name], axes[name], mesh, rules)
    with pytest.raises(ValueError, match=r"w: axis 'mlp' has size 10, which tp=4 does not divide.*: 1, 2, 5, 10"):
        shardings_for({"w": (6, 10)}, {"w": ("embed", "mlp")}, mesh, rules)
    with pytest.raises(ValueError, match=r"w: .*2 axes"):
        shard_shape("w", (6, 8), ("embed",), mesh, rules)


# -- what the compiled programs do -------------------------------------------------------------------------------------

MESHES = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (3, 1)]
SIX_HEADS_MESHES = [(4, 1), (5, 1)]


@pytest.fixture(scope="module")
def six_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three query heads to each of two KV heads, and feed-forward columns that nothing divides."""
    sizes = {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 97}
    return write_llama(tmp_path_factory.mktemp("six"), **sizes)


CASES = [*(("odd_model", *mesh) for mesh in MESHES), *(("six_heads", *mesh) for mesh in SIX_HEADS_MESHES)]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]},tp={c[1]},dp={c[2]}")
def llm(request: pytest.FixtureRequest, make_llm: MakeLLM) -> LLM:
    model, tp, dp = request.param
    directory = request.getfixturevalue(model)
    return make_llm(directory, tensor_parallel_size=tp, data_parallel_size=dp, num_gpu_blocks_override=21)


def tp_of(llm: LLM) -> int:
    return llm.engine.runner.mesh.shape["tp"]


def steps(llm: LLM) -> dict[str, jax.stages.Compiled]:
    """Compiled steps, decoding and mixed."""
    programs = llm.engine.runner._programs
    found = {"decode" if key[1].one_token_each else "mixed": p for key, p in programs.items() if key[0] == "step"}
    assert set(found) == {"decode", "mixed"}
    return found


def audit_of(llm: LLM, program: jax.stages.Compiled) -> Audit:
    return audit(program, llm.engine.runner.mesh)


@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_two_all_reduces_per_layer(llm: LLM, kind: str) -> None:
    found = audit_of(llm, steps(llm)[kind])
    if tp_of(llm) == 1:
        assert not found.collectives
        return
    assert {(c.op, c.axes) for c in found.collectives} == {("all-reduce", ("tp",))}
    inside = Counter(c.where for c in found.matching(where="layer_*"))
    layers = range(llm.engine.runner.decoder.num_layers)
    assert inside == {f"layer_{i}/{part}": 1 for i in layers for part in ("attention", "mlp")}


def test_every_device_holds_the_same_share_of_the_weights(llm: LLM) -> None:
    leaves = jax.tree.leaves(llm.engine.runner.params)
    held = Counter[int]()
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    assert len(held) == llm.engine.runner.mesh.size
    assert max(held.values()) <= 1.02 * min(held.values())
    repeated = sum(leaf.nbytes for leaf in leaves) / tp_of(llm)
    assert max(held.values()) < 1.1 * repeated  # only norms are whole everywhere


def test_the_state_is_updated_in_place(llm: LLM) -> None:
    runner = llm.engine.runner
    for program in steps(llm).values():
        found = audit_of(llm, program)
        assert all(p.aliased for p in found.parameters if p.name.startswith("state"))
        # XLA:CPU copies caches of one KV head: the axis of one entry may lie anywhere, and it moves it about.
        assert not found.copies or runner.decoder.num_kv_heads == tp_of(llm)
        assert found.memory is not None
        assert found.memory.outputs - found.memory.aliased < 20_000  # hidden states and tokens


def test_kv_blocks_and_slots_lie_where_their_replica_is(llm: LLM) -> None:
    runner, state = llm.engine.runner, llm.engine.runner.state
    dp, tp = runner.mesh.shape["dp"], tp_of(llm)
    assert state is not None
    for array in (*state.keys, *state.values, *state.sampler):
        (shape,) = {shard.data.shape for shard in array.addressable_shards}
        assert array.shape[0] == dp * shape[0]
        assert array.size == dp * tp * array.addressable_shards[0].data.size
