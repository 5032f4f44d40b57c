"""Weights are read lazily, rightly and once; what does not belong together is refused in one line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_models import LLAMA, SMALL, Counting, InMemory, llama_tensors, write_llama

from jaxserve import LLM
from jaxserve.models import hf, llama
from jaxserve.models.registry import FAMILIES, decoder_config, family_of, load_hf_config
from jaxserve.weights import loader
from jaxserve.weights.checkpoint import Checkpoint, weight_names
from jaxserve.weights.loader import (
    LayOut,
    abstract_params,
    abstract_weights,
    load_params,
    param_shardings,
    random_params,
    summed_axes,
)
from jaxserve.weights.source import COMPARED_ENTRIES, Box, Source, concat, same, stack
from pallas_kernels.dispatch import MATMUL
from pallas_kernels.matmul import Panels
from sharding import MeshConfig, ShardingRules, build_mesh

# -- sources -----------------------------------------------------------------------------------------------------------


Pair = tuple[Source, np.ndarray]
"""A source, and the array that it must be."""


def transposed(draw: st.DrawFn, source: Source, array: np.ndarray) -> Pair:
    order = draw(st.permutations(range(array.ndim)))
    return source.transpose(*order), array.transpose(order)


def split(draw: st.DrawFn, source: Source, array: np.ndarray) -> Pair:
    axis = draw(st.integers(0, array.ndim - 1))
    size = array.shape[axis]
    first = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    second = draw(st.sampled_from([n for n in range(1, size // first + 1) if size // first % n == 0]))
    sizes = draw(st.sampled_from([(first, size // first), (first, second, size // first // second)]))
    return source.split(axis, sizes), array.reshape(*array.shape[:axis], *sizes, *array.shape[axis + 1 :])


def merged(draw: st.DrawFn, source: Source, array: np.ndarray) -> Pair:
    axis = draw(st.integers(0, array.ndim - 1))
    count = draw(st.integers(1, array.ndim - axis))
    shape = (*array.shape[:axis], math.prod(array.shape[axis : axis + count]), *array.shape[axis + count :])
    return source.merge(axis, count), array.reshape(shape)


def narrowed(draw: st.DrawFn, source: Source, array: np.ndarray) -> Pair:
    axis = draw(st.integers(0, array.ndim - 1))
    start = draw(st.integers(0, array.shape[axis] - 1))
    size = draw(st.integers(1, array.shape[axis] - start))
    return source.narrow(axis, start, size), array.take(range(start, start + size), axis)


def repeated(draw: st.DrawFn, source: Source, array: np.ndarray) -> Pair:
    axis, times = draw(st.integers(0, array.ndim - 1)), draw(st.integers(1, 3))
    return source.repeat(axis, times), array.repeat(times, axis)


def padded(draw: st.DrawFn, source: Source, array: np.ndarray) -> Pair:
    axis, more = draw(st.integers(0, array.ndim - 1)), draw(st.integers(0, 3))
    widths = [(0, more if i == axis else 0) for i in range(array.ndim)]
    return source.pad(axis, array.shape[axis] + more), np.pad(array, widths)


def joined(draw: st.DrawFn, source: Source, array: np.ndarray) -> Pair:
    axis = draw(st.integers(0, array.ndim - 1))
    if draw(st.booleans()):
        return stack([source, source], axis), np.stack([array, array], axis)
    part, values = narrowed(draw, source.transpose(*range(array.ndim)), array)
    if values.shape[:axis] + values.shape[axis + 1 :] != array.shape[:axis] + array.shape[axis + 1 :]:
        part, values = source, array
    return concat([source, part, source], axis), np.concatenate([array, values, array], axis)


MOVES = (transposed, split, merged, narrowed, repeated, padded, joined)


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    array = np.arange(1, 1 + math.prod(shape), dtype=np.float32).reshape(shape)
    pair: Pair = (InMemory(array), array)
    for move in draw(st.lists(st.sampled_from(MOVES), max_size=6)):
        if pair[1].size < 2000 and pair[1].ndim < 6:
            pair = move(draw, *pair)
    return pair


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    starts = [draw(st.integers(0, n - 1)) for n in shape]
    return tuple(slice(start, draw(st.integers(start + 1, n))) for start, n in zip(starts, shape, strict=True))


@settings(max_examples=300)
@given(st.data(), pairs())
def test_any_box_of_any_chain_of_sources(data: st.DataObject, pair: Pair) -> None:
    source, array = pair
    assert source.shape == array.shape
    np.testing.assert_array_equal(source.read_all(), array)
    for _ in range(3):
        box = data.draw(boxes(array.shape))
        np.testing.assert_array_equal(source.read(box), array[box])


def test_sources_that_do_not_fit_are_refused() -> None:
    source = InMemory(np.zeros((4, 6), np.float32))
    bad: list[tuple[Callable[[], Source], str]] = [
        (lambda: source.transpose(0, 0), r"\(0, 0\)"),
        (lambda: source.split(1, (4, 2)), r"\(4, 2\)"),
        (lambda: source.narrow(0, 2, 3), r"2\.\.5"),
        (lambda: concat([source, InMemory(np.zeros((4, 5), np.float32))], 0), r"\(4, 5\)"),
    ]
    for make, said in bad:
        with pytest.raises(ValueError, match=said):
            make()


def test_parts_of_several_dtypes_become_float32() -> None:
    """float16 and bfloat16 have no dtype in common that numpy knows."""
    values = np.linspace(-3, 3, 8).astype(np.float32).reshape(2, 4)
    parts = [InMemory(values.astype(dtype)) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32)]
    fused = concat(parts, 0)
    expected = np.concatenate([part.array.astype(np.float32) for part in parts])
    for source, array in ((fused, expected), (fused.split(0, (2, 3)).merge(0, 2), expected)):
        assert source.read_all().dtype == np.float32
        np.testing.assert_array_equal(source.read_all(), array)
    rows = fused.merge(0, 2).read((slice(6, 12),))  # the end of one part and the beginning of the next
    np.testing.assert_array_equal(rows, expected.reshape(-1)[6:12])
    assert fused.read((slice(0, 2), slice(0, 4))).dtype == np.float16


def test_tensors_are_compared_some_rows_at_a_time() -> None:
    rows = np.broadcast_to(np.float32(1), (5, COMPARED_ENTRIES // 2))
    left, right = Counting(InMemory(rows)), Counting(InMemory(rows.astype(ml_dtypes.bfloat16)))
    assert same(left, right) and left.num_read == right.num_read == rows.size
    other = rows.copy()
    other[1, 7] = 2
    left = Counting(InMemory(rows))
    assert not same(left, InMemory(other)) and left.num_read == COMPARED_ENTRIES
    left = Counting(InMemory(rows))
    assert not same(left, InMemory(rows[:4])) and left.num_read == 0


def test_a_shard_reads_only_itself() -> None:
    """Of the fused query, key and value weight, each of two ranks reads its heads and nothing else."""
    config = decoder_config(load_config())
    d, h = config.hidden_size, config.head_dim
    parts = [Counting(InMemory(np.zeros((n * h, d), np.float32))) for n in (8, 2, 2)]
    fused = hf.fuse_qkv(config, *parts)
    assert fused.shape == (d, 2, 4 + 2, h)
    fused.read((slice(0, d), slice(1, 2), slice(0, 6), slice(0, h)))
    assert [p.num_read for p in parts] == [4 * h * d, h * d, h * d]


def load_config(**overrides: Any) -> Any:
    from transformers import AutoConfig

    entries = LLAMA | overrides
    return AutoConfig.for_model(entries.pop("model_type"), **entries)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_reads_what_was_saved(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dtypes = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f64": np.float64}
    tensors = {name: rng.standard_normal((3, 4)).astype(dtype) for name, dtype in dtypes.items()}
    tensors |= {"mask": np.ones((2, 2), np.bool_), "scalar": np.array(2.0, np.float32), "empty": np.zeros((0, 3), "f4")}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert sorted(checkpoint) == sorted(set(tensors) - {"mask"})
    for name, source in checkpoint.items():
        np.testing.assert_array_equal(source.read_all(), tensors[name])
        assert source.read_all().dtype == tensors[name].dtype
    np.testing.assert_array_equal(checkpoint["f16"].read((slice(1, 3), slice(0, 2))), tensors["f16"][1:3, :2])
    assert checkpoint.num_bytes == 12 * (4 + 2 + 2 + 8) + 4


def test_names_with_and_without_a_prefix(tmp_path: Path) -> None:
    save_file({"h.0.w": np.zeros(2, np.float32), "model.w": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, ("model.",))
    assert "model.h.0.w" in checkpoint and "w" in checkpoint and "h.0.w" in checkpoint
    assert "other" not in checkpoint
    with pytest.raises(KeyError, match="other"):
        checkpoint["other"]


def raw_safetensors(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n"
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "short": (b"\x10\0\0\0\0\0\0\0{", "not a safetensors file"),
    "no JSON": (b"\x08\0\0\0\0\0\0\0notjson!", "not a safetensors file"),
    "a Git LFS pointer": (LFS_POINTER, "not a safetensors file"),
    "a header that is no table": (raw_safetensors([1]), "not a safetensors file"),  # pyright: ignore[reportArgumentType]
    "dtype": (raw_safetensors({"x": F32 | {"dtype": "F8_E4M3"}}, b"\0" * 8), "F8_E4M3.*F32"),
    "data cut off": (raw_safetensors({"x": F32}, b"\0" * 4), "model.safetensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    data, said = BROKEN[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=said) as error:
        Checkpoint(tmp_path)
    assert "model.safetensors" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        Checkpoint(tmp_path)
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / names["a"])
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors is missing"):
        Checkpoint(tmp_path)
    save_file({"b": np.ones(1, np.float32)}, tmp_path / names["b"])
    assert [Checkpoint(tmp_path)[name].read_all()[0] for name in "ab"] == [0, 1]
    save_file({"a": np.full(1, 5, np.float32)}, tmp_path / "model.safetensors")
    assert weight_names(tmp_path) == ["model.safetensors"]  # as in transformers: the index is what is left over
    assert {name: source.read_all()[0] for name, source in Checkpoint(tmp_path).items()} == {"a": 5}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "training_args.bin").touch()
    (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=rf"{name} is not read.*save_pretrained") as error:
        Checkpoint(tmp_path)
    assert "\n" not in str(error.value)


# -- models that do not belong together --------------------------------------------------------------------------------


def assert_refused(directory: Path, *words: str) -> None:
    with pytest.raises((ValueError, NotImplementedError)) as error:
        LLM(directory, skip_tokenizer_init=True, use_tqdm_on_load=False, **SMALL)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("vocab_size", 104, "config.json"),
        ("vocab_size", 102, "config.json"),
        ("intermediate_size", 92, "config.json"),
        ("hidden_size", 60, "config.json"),
        ("head_dim", 16, "config.json"),
        ("num_key_value_heads", 1, "config.json"),
        ("num_key_value_heads", 4, "config.json"),
        ("num_attention_heads", 4, "config.json"),
        ("num_hidden_layers", 3, "model.layers.2."),
        ("attention_bias", True, "q_proj.bias"),
    ],
)
def test_config_and_weights_that_disagree(tmp_path: Path, entry: str, value: Any, said: str) -> None:
    write_llama(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {entry: value}))
    assert_refused(tmp_path, said)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ["MambaForCausalLM", *FAMILIES]),
        ({"architectures": None}, ["None", *FAMILIES]),
        ({"model_type": None}, ["model_type"]),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}, ["spiral", *hf.ROPE_KINDS]),
        ({"hidden_act": "tanhshrink"}, ["tanhshrink", *hf.ACTIVATIONS]),
        ({"num_key_value_heads": 3}, ["8 query heads", "3 KV heads"]),
        ({"is_causal": False}, ["is_causal=False"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5", "llama"]),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_models_that_are_not_supported(tmp_path: Path, entries: dict[str, Any], words: list[str]) -> None:
    config = {name: value for name, value in (LLAMA | entries).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_refused(tmp_path, *words)


@pytest.mark.parametrize("stored", ["equal", "the other only", "different"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tied_embeddings_that_are_stored_in_other_ways(tmp_path: Path, family: str, stored: str) -> None:
    """Both, if they are equal, or the unembedding alone, as transformers reads them; both with different values are not
    tied there."""
    name, embed = {"llama": ("llama_tied", "model.embed_tokens.weight"), "gpt2": ("gpt2", "transformer.wte.weight")}[
        family
    ]
    fixture = Path(__file__).parent / "parity" / "fixtures" / name
    config = decoder_config(hf_config := load_hf_config(fixture))
    tensors = load_file(fixture / "model.safetensors")
    expected = tensors[embed].astype(np.float32)
    head = tensors.pop(embed) if stored == "the other only" else tensors[embed].copy()
    if stored == "different":
        head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    weights = family_of(hf_config.architectures).weights(config, Checkpoint(tmp_path))
    if stored == "different":
        with pytest.raises(ValueError, match=rf"lm_head\.weight is stored and differs from {embed}.*hf_overrides"):
            dict(weights)
        return
    sources = dict(weights)
    assert "embedding.weight" not in sources
    np.testing.assert_array_equal(sources["unembedding.weight"].read_all().T, expected)


def test_embeddings_that_are_said_to_be_tied_and_differ(tmp_path: Path) -> None:
    write_llama(tmp_path, tie_word_embeddings=True)
    assert_refused(tmp_path, "tie_word_embeddings", "lm_head.weight", "hf_overrides")
    overrides = {"tie_word_embeddings": False}
    LLM(tmp_path, skip_tokenizer_init=True, use_tqdm_on_load=False, hf_overrides=overrides, **SMALL)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("mistral", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"attention_bias": False, "mlp_bias": True}),
        ("qwen3", {"mlp_bias": True}),
        ("phi3_window", {"attention_bias": True, "mlp_bias": True, "layer_types": ["full_attention"] * 2}),
    ],
)
def test_entries_that_the_family_does_not_read(name: str, entries: dict[str, Any], tmp_path: Path) -> None:
    """In transformers; in a checkpoint's config they change nothing here either."""
    fixture = Path(__file__).parent / "parity" / "fixtures" / name
    config = json.loads((fixture / "config.json").read_text()) | entries
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert decoder_config(load_hf_config(tmp_path)) == decoder_config(load_hf_config(fixture))


def test_a_config_that_is_not_there_or_no_json(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    assert_refused(tmp_path, "config.json")


# -- onto the devices --------------------------------------------------------------------------------------------------


def value(params: Any, *path: str | int) -> jax.Array:
    for part in path:
        params = params[part]
    return params.get_value()


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_same_weights_on_any_mesh(tmp_path: Path, tp: int) -> None:
    """Repeated KV heads and vocabulary padding included."""
    write_llama(tmp_path)
    tensors = llama_tensors(LLAMA)
    stored = decoder_config(load_config())
    config = stored.fit_to(tp)
    mesh = build_mesh(MeshConfig(tp=tp, dp=2))
    weights = llama.weights(stored, Checkpoint(tmp_path))
    _, params = load_params(stored, config, jnp.dtype(jnp.float32), weights, mesh, ShardingRules())
    unembedding = np.asarray(value(params, "unembedding", "weight"))
    assert unembedding.shape == (64, 103 + config.vocab_padding)
    np.testing.assert_array_equal(unembedding[:, :103].T, tensors["lm_head.weight"])
    assert not unembedding[:, 103:].any()
    qkv = np.asarray(value(params, "layers", 1, "attn", "qkv"))
    kv_heads, group = config.num_kv_heads, config.group_size
    assert qkv.shape == (64, kv_heads, group + 2, 8) and kv_heads == max(2, tp)
    q, k, v = (tensors[f"model.layers.1.self_attn.{x}_proj.weight"].T.reshape(64, -1, 8) for x in "qkv")
    np.testing.assert_array_equal(qkv[:, :, :group].reshape(64, 8, 8), q)
    for stored, index in ((k, group), (v, group + 1)):
        np.testing.assert_array_equal(qkv[:, :, index], stored.repeat(kv_heads // 2, axis=1))


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_are_converted_to_the_asked_dtype(tmp_path: Path, stored: Any) -> None:
    write_llama(tmp_path)
    tensors = {name: tensor.astype(stored) for name, tensor in llama_tensors(LLAMA).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config, mesh = decoder_config(load_config()), build_mesh(MeshConfig())
    for dtype in (jnp.float32, jnp.bfloat16):
        weights = llama.weights(config, Checkpoint(tmp_path))
        _, params = load_params(config, config, jnp.dtype(dtype), weights, mesh, ShardingRules())
        embedding = value(params, "embedding", "weight")
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        np.testing.assert_array_equal(np.asarray(embedding), tensors["model.embed_tokens.weight"].astype(dtype))


@pytest.mark.parametrize("source", ["pieces", "whole", "random"])
def test_weights_laid_out_for_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Those that only products read, in pieces or not, as they would be laid out afterwards; and as is promised before
    anything is read."""
    if source == "pieces":
        monkeypatch.setattr(loader, "LAID_OUT_COLUMNS", 64)
        monkeypatch.setattr(loader, "LAID_OUT_BYTES", 0)
    write_llama(tmp_path)
    save_file(llama_tensors(LLAMA), tmp_path / "model.safetensors")
    config, dtype = decoder_config(load_config()), jnp.dtype("float32")
    mesh, rules = build_mesh(MeshConfig()), ShardingRules()
    lay_out = MATMUL["native"].lay_out

    def load(lay_out: LayOut) -> Any:
        if source == "random":
            return random_params(config, config, dtype, mesh, rules, 1, lay_out)[1]
        return load_params(config, config, dtype, llama.weights(config, Checkpoint(tmp_path)), mesh, rules, lay_out)[1]

    found, plain = (dict(nnx.to_flat_state(load(x))) for x in (lay_out, MATMUL["reference"].lay_out))
    _, params = abstract_params(config, dtype)
    promised = abstract_weights(params, param_shardings(params, mesh, rules), lay_out)
    laid_out = 0
    for path, variable in plain.items():
        axes, weight, got = summed_axes(variable), variable.get_value(), found[path].get_value()
        assert jax.tree.map(np.shape, got) == jax.tree.map(np.shape, promised[".".join(map(str, path))])
        expected = weight if axes is None else lay_out(weight, axes)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        laid_out += isinstance(got, Panels)
    assert laid_out == 1 + 4 * config.num_layers and config.vocab_size > 64


MEASURE_LOADING = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 3)
import jaxserve.weights.orbax  # its imports are no weights
from jaxserve.build import ModelFiles, load_model
from jaxserve.engine_args import EngineArgs
from pallas_kernels.dispatch import MATMUL
from sharding import MeshConfig, ShardingRules, build_mesh

def memory(name):
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

args = EngineArgs(model=sys.argv[1], use_tqdm_on_load=False)
files = ModelFiles.find(args)
tp = int(sys.argv[2])
mesh = build_mesh(MeshConfig(tp=tp))
lay_out = MATMUL[sys.argv[3]].lay_out
jax.block_until_ready(jax.jit(lay_out, static_argnums=1)(jax.numpy.zeros((128, 128)) + 1, 1))
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = memory("VmRSS")
_, params = load_model(files, args, files.decoder.fit_to(tp), mesh, ShardingRules(), lay_out)
jax.block_until_ready(jax.tree.leaves(params))
print(memory("VmHWM") - before, sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("tp", "matmul"), [(1, "native"), (1, "reference"), (2, "reference"), (3, "reference")])
def test_loading_holds_the_weights_once(tmp_path: Path, tp: int, matmul: str) -> None:
    """At its peak a loading process has what stays, and a few tensors more; not the checkpoint a second time."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "head_dim": 64, "vocab_size": 1024}
    write_llama(tmp_path, **sizes)
    weights = tmp_path / "model.safetensors"
    try:
        stored = weights.stat().st_size
        assert stored > 180e6
        command = [sys.executable, "-c", MEASURE_LOADING, str(tmp_path), str(tp), matmul]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is gone at once
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    finally:
        weights.unlink()
    peak, held = map(int, done.stdout.split())
    assert held >= 0.99 * stored
    assert peak < 1.2 * held, f"{peak / 1e6:.0f} MB at the peak for {held / 1e6:.0f} MB of weights"
