"""Tuned sizes: what files may say, that kernels use what they say, and on which GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_interpreter import racing

from pallas_kernels import tuning
from pallas_kernels.dequant_matmul import triton as dequant
from pallas_kernels.grouped_matmul import Weights
from pallas_kernels.grouped_matmul import mosaic as grouped_mosaic
from pallas_kernels.grouped_matmul import triton as grouped
from pallas_kernels.kv_write import triton as kv_write
from pallas_kernels.paged_attention import mosaic, triton
from sharding import aot, build_mesh
from sharding.hardware import Cluster
from sharding.mesh import MeshConfig

TUNED: list[tuning.Tunable[Any]] = [
    triton.TUNED,
    mosaic.TUNED,
    kv_write.TUNED,
    grouped.TUNED,
    grouped_mosaic.TUNED,
    dequant.TUNED,
]
GROUPED = "rows=16 depth=32 columns=32 itemsize=4"
SIZES = asdict(replace(grouped.SMALL, columns=32))


def write(directory: Path, kernels: Any, gpu: str = "nvidia_h200") -> Path:
    path = directory / f"{gpu}.json"
    path.write_text(kernels if isinstance(kernels, str) else json.dumps(kernels))
    return path


def read(tunable: tuning.Tunable[Any], directory: Path) -> tuning.Tunable[Any]:
    return tuning.read(tunable.kernel, tunable.kind, tunable.shape, tunable.refuses, directory)


def test_every_kernel_has_its_own_place_and_nothing_is_shipped() -> None:
    """No figures that nobody measured: whoever measures some changes the last line."""
    assert sorted(t.kernel for t in TUNED) == sorted(tuning.KERNELS)
    assert all(not t.entries for t in TUNED)


def test_an_entry_is_found_on_its_gpu_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"grouped_matmul/triton": {GROUPED: {"sizes": SIZES, "seconds": 1e-5}}})
    found = read(grouped.TUNED, tmp_path)
    shape = {"rows": 16, "depth": 32, "columns": 32, "itemsize": 4}
    assert found.get(**shape) is None  # this is a CPU
    monkeypatch.setattr(tuning, "gpu_in_use", lambda: "nvidia_h200")
    assert found.get(**shape) == grouped.Tiles(**SIZES)
    assert found.get(**shape | {"depth": 64}) is None


@pytest.mark.parametrize(
    ("kernels", "said"),
    [
        ("{", "not JSON"),
        ([], "JSON object of kernels"),
        ({"matmul": {}}, "'matmul' has no sizes to tune"),
        ({"grouped_matmul/triton": []}, "JSON object of entries"),
        ({"grouped_matmul/triton": {GROUPED: SIZES}}, "it has sizes"),
        ({"grouped_matmul/triton": {GROUPED: {"sizes": SIZES, "ms": 1}}}, "besides only seconds"),
        ({"grouped_matmul/triton": {"rows=16": {"sizes": SIZES}}}, "'rows=16': its name is made of rows, depth"),
        ({"grouped_matmul/triton": {GROUPED.replace("32", "x"): {"sizes": SIZES | {"rows": 32}}}}, "rows=32"),
        ({"grouped_matmul/triton": {GROUPED.replace("16", "x"): {"sizes": SIZES}}}, "its name: invalid literal"),
        ({"grouped_matmul/triton": {GROUPED: {"sizes": {"rows": 16}}}}, "all of them and no others"),
        ({"grouped_matmul/triton": {GROUPED: {"sizes": SIZES | {"band": 0}}}}, "band=0"),
        ({"grouped_matmul/triton": {GROUPED: {"sizes": SIZES | {"band": True}}}}, "band=True"),
        ({"grouped_matmul/triton": {GROUPED: {"sizes": SIZES | {"columns": 48}}}}, "columns=48: it is a power of two"),
        ({"grouped_matmul/triton": {GROUPED: {"sizes": SIZES | {"depth": 8}}}}, "at least 16"),
        ({"grouped_matmul/triton": {GROUPED: {"sizes": SIZES | {"rows": 64}}}}, "the plan decides"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_file_may_not_say(tmp_path: Path, kernels: Any, said: str) -> None:
    path = write(tmp_path, kernels)
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        read(grouped.TUNED, tmp_path)
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize(
    ("tunable", "name", "sizes", "said"),
    [
        (mosaic.TUNED, "kind=decode head_dim=128", {"keys": 128, "stages": 4}, "bytes of shared memory"),
        (mosaic.TUNED, "kind=train head_dim=128", {"keys": 128, "stages": 1}, "decode or prefill"),
        (mosaic.TUNED, "kind=prefill head_dim=128", {"keys": 96, "stages": 1}, "64 or 128 keys"),
        (grouped_mosaic.TUNED, "rows=64 depth=64 columns=64", asdict(grouped_mosaic.Tiles(64, 64, 32, 2)), "swizzle"),
        (grouped_mosaic.TUNED, "rows=64 depth=64 columns=64", asdict(grouped_mosaic.Tiles(64, 96, 64, 2)), "wgmma"),
        (dequant.TUNED, "rows=8 depth=256 columns=64 group=128", asdict(dequant.Tiles(16, 64, 64, 1, 4, 4)), "whole"),
        (kv_write.TUNED, "tokens=64 kv_heads=8 group=4 head_dim=64", {"tokens": 3, "num_warps": 4}, "power of two"),
        (
            triton.TUNED,
            "tokens=1 head_dim=64 group=4 dtype=bfloat16 kv_dtype=bfloat16",
            {"heads": 4, "keys": 64, "num_warps": 4, "num_stages": 3},
            "at least 16",
        ),
    ],
)
def test_what_kernels_cannot_take(tunable: tuning.Tunable[Any], name: str, sizes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tunable.sizes(name, sizes)


@pytest.mark.parametrize("head_dim", mosaic.HEAD_DIMS)
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_heuristics_could_be_entries(kind: Any, head_dim: int) -> None:
    ahead = mosaic.ahead_for(kind, head_dim)
    assert mosaic.TUNED.sizes(f"kind={kind} head_dim={head_dim}", asdict(ahead)) == ahead and ahead.stages >= 2


@pytest.mark.parametrize("module", [grouped, grouped_mosaic], ids=lambda module: module.__name__)
def test_a_product_takes_what_was_tuned(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is still right; tiles that its own check would refuse show that the entry is what it took."""
    x = np.random.default_rng(0).standard_normal((20, 64)).astype(jnp.bfloat16)
    w = np.random.default_rng(1).standard_normal((2, 64, 128)).astype(jnp.bfloat16)
    plan = grouped.plan_tiles(jnp.array([7, 9], jnp.int32), 20, 64)
    run: Callable[[], Any] = lambda: module.product(x, Weights(jnp.asarray(w)), plan, interpret=INTERPRET[module])  # noqa: E731
    if module is grouped:
        tiles, name = grouped.Tiles(64, 32, 16, 4, 2), "rows=64 depth=64 columns=128 itemsize=2"
    else:
        tiles, name = grouped_mosaic.Tiles(64, 64, 64, 2), "rows=64 depth=64 columns=128"
    write(tmp_path, {module.TUNED.kernel: {name: {"sizes": asdict(tiles)}}}, "here")
    monkeypatch.setattr(tuning, "gpu_in_use", lambda: "here")
    monkeypatch.setattr(module, "TUNED", read(module.TUNED, tmp_path))
    taken: list[Any] = []
    body = "_kernel" if module is grouped else "_body"
    original = getattr(module, body)

    def noted(*refs: Any, tiles: Any) -> Any:
        taken.append(tiles)
        return original(*refs, tiles=tiles)

    monkeypatch.setattr(module, body, noted)
    out = np.asarray(run()).astype(np.float32)
    assert taken and set(taken) == {tiles}
    wanted = np.concatenate([x[:7].astype(np.float32) @ w[0].astype(np.float32), x[7:16].astype(np.float32) @ w[1]])
    assert np.linalg.norm(out[:16] - wanted) < 0.01 * np.linalg.norm(wanted) and not out[16:].any()


INTERPRET = {grouped: True, grouped_mosaic: racing()}


@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_the_gpu_is_that_of_the_mesh(tmp_path: Path) -> None:
    """Also where it is not there, and within a shard_map."""
    mesh = build_mesh(MeshConfig(), aot.devices(Cluster.parse("h200:1")))
    seen: list[str] = []

    def note(x: jax.Array) -> jax.Array:
        seen.append(tuning.gpu_in_use())
        return x

    spec = jax.sharding.PartitionSpec()
    x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        jax.jit(lambda x: jax.shard_map(note, in_specs=spec, out_specs=spec, check_vma=False)(note(x))).lower(x)
    assert seen == ["nvidia_h200"] * 2 and tuning.gpu_in_use() == "cpu"
