"""Orbax checkpoints: what was saved comes back on any mesh, as if it had been read from safetensors there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tokens_of

from jaxserve import LLM, SamplingParams
from jaxserve.build import ModelFiles
from jaxserve.engine_args import EngineArgs
from jaxserve.models.config import DecoderConfig
from jaxserve.models.registry import family_of
from jaxserve.weights.checkpoint import Checkpoint
from jaxserve.weights.loader import load_params, random_params
from jaxserve.weights.orbax import Chunked, is_orbax, save, tensors
from jaxserve.weights.source import Box
from sharding import MeshConfig, ShardingRules, build_mesh

FIXTURES = Path(__file__).parent / "parity" / "fixtures"
RULES = ShardingRules()


def files_of(directory: Path, **overrides: object) -> ModelFiles:
    return ModelFiles.find(EngineArgs(model=directory, hf_overrides=overrides))


def from_safetensors(directory: Path, decoder: DecoderConfig, mesh: jax.sharding.Mesh, dtype: str = "float32"):
    family = family_of(files_of(directory).hf.architectures)
    stored = files_of(directory).decoder
    weights = family.weights(stored, Checkpoint(directory, getattr(family, "PREFIXES", ("model.",))))
    return load_params(stored, decoder, jnp.dtype(dtype), weights, mesh, RULES)


def restore(directory: Path, stored: DecoderConfig, decoder: DecoderConfig, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    return load_params(stored, decoder, jnp.dtype("float32"), tensors(directory), mesh, RULES)


def leaves(params: object) -> list[jax.Array]:
    return jax.tree.leaves(params)


def assert_same(ours: object, theirs: object) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def convert(directory: Path, destination: Path, dtype: str = "float32") -> None:
    decoder = files_of(directory).decoder
    _, params = from_safetensors(directory, decoder, build_mesh(MeshConfig()), dtype)
    save(destination, directory, params)


@pytest.mark.parametrize("name", ["llama", "olmo2", "qwen2", "gpt2", "opt"])
@pytest.mark.parametrize("mesh", ["tp=1", "tp=2", "dp=2", "tp=3", "tp=4"])
def test_every_family_comes_back_on_every_mesh(name: str, mesh: str, tmp_path: Path) -> None:
    directory = FIXTURES / name
    convert(directory, tmp_path)
    files, target = files_of(tmp_path), build_mesh(MeshConfig.parse(mesh))
    assert is_orbax(tmp_path)
    assert not is_orbax(directory)
    decoder = files.decoder.fit_to(target.shape["tp"])
    graph, params = restore(tmp_path, files.decoder, decoder, target)
    expected_graph, expected = from_safetensors(directory, decoder, target)
    assert graph == expected_graph
    assert_same(params, expected)


@pytest.mark.parametrize("saved_on", ["tp=1", "tp=2", "dp=2"])
@pytest.mark.parametrize("mesh", ["tp=4", "dp=2,tp=4", "tp=2", "tp=3", "tp=5", "tp=6", "tp=8"])
def test_fewer_kv_heads_than_ranks_and_an_odd_vocabulary(
    saved_on: str, mesh: str, odd_model: Path, tmp_path: Path
) -> None:
    stored = files_of(odd_model).decoder
    source = build_mesh(MeshConfig.parse(saved_on))
    rules = replace(RULES, vocab=None)  # an odd vocabulary without padding stays whole
    weights = family_of(["LlamaForCausalLM"]).weights(stored, Checkpoint(odd_model))
    _, params = load_params(stored, stored, jnp.dtype("float32"), weights, source, rules)
    save(tmp_path, odd_model, params)
    target = build_mesh(MeshConfig.parse(mesh))
    decoder = stored.fit_to(target.shape["tp"])
    _, restored = restore(tmp_path, stored, decoder, target)
    assert_same(restored, from_safetensors(odd_model, decoder, target)[1])


@pytest.mark.parametrize(("qk_norm", "bias"), [("full", True), ("head", False)])
def test_norms_and_biases_of_repeated_heads(qk_norm: str, bias: bool, odd_model: Path, tmp_path: Path) -> None:
    stored = files_of(odd_model).decoder
    stored = replace(stored, layers=stored.layers[:1], qk_norm=qk_norm, qkv_bias=bias, out_bias=bias)
    _, params = random_params(stored, stored, jnp.dtype("float32"), build_mesh(MeshConfig()), RULES, seed=5)
    save(tmp_path, odd_model, params)
    decoder = stored.fit_to(4)
    _, restored = restore(tmp_path, stored, decoder, build_mesh(MeshConfig(tp=4)))
    group = stored.group_size
    for one, four in zip(params["layers"].values(), restored["layers"].values(), strict=True):
        one, four = one["attn"], four["attn"]
        np.testing.assert_array_equal(np.asarray(four["o"][...]).ravel(), np.asarray(one["o"][...]).ravel())
        if qk_norm == "full":
            q, k = (np.asarray(four[name]["weight"][...]) for name in ("q_norm", "k_norm"))
            np.testing.assert_array_equal(q.ravel(), np.asarray(one["q_norm"]["weight"][...]).ravel())
            np.testing.assert_array_equal(k, np.repeat(np.asarray(one["k_norm"]["weight"][...]), 2, axis=0))
        if bias:
            old, new = np.asarray(one["qkv_bias"][...]), np.asarray(four["qkv_bias"][...])
            np.testing.assert_array_equal(new[:, :-2].ravel(), old[:, :group].ravel())
            np.testing.assert_array_equal(new[:, -2:], np.repeat(old[:, group:], 2, axis=0))


def test_a_device_holds_only_its_shard(odd_model: Path, tmp_path: Path) -> None:
    convert(odd_model, tmp_path)
    stored = files_of(tmp_path).decoder
    mesh = build_mesh(MeshConfig(tp=4))
    _, params = restore(tmp_path, stored, stored.fit_to(4), mesh)
    qkv = params["layers"][0]["attn"]["qkv"][...]
    assert {s.data.shape for s in qkv.addressable_shards} == {(64, 1, 4, 8)}


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 5, 8])
def test_a_device_reads_only_its_heads(
    tp: int, odd_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two KV heads."""
    convert(odd_model, tmp_path)
    read: set[tuple[int, ...]] = set()
    real = Chunked.read

    def record(self: Chunked, box: Box) -> np.ndarray:
        read.add(tuple(s.stop - s.start for s in box))
        return real(self, box)

    monkeypatch.setattr(Chunked, "read", record)
    stored = files_of(tmp_path).decoder
    restore(tmp_path, stored, stored.fit_to(tp), build_mesh(MeshConfig(tp=tp)))
    heads = {shape[1] if shape[0] == 64 else shape[0] for shape in read if len(shape) == 4}
    assert max(heads) == (2 if tp == 1 else 1)


@pytest.mark.parametrize("tp", [3, 4, 5, 8])
def test_every_device_holds_the_same(tp: int, odd_model: Path, tmp_path: Path) -> None:
    convert(odd_model, tmp_path)
    stored, mesh = files_of(tmp_path).decoder, build_mesh(MeshConfig(tp=tp))
    _, params = restore(tmp_path, stored, stored.fit_to(tp), mesh)
    held = Counter[int]()
    for shard in (s for x in leaves(params) for s in x.addressable_shards):
        held[shard.device.id] += shard.data.nbytes
    assert len(held) == tp and len(set(held.values())) == 1


def test_the_dtype_is_the_checkpoints_unless_another_is_asked_for(tmp_path: Path) -> None:
    convert(FIXTURES / "llama", tmp_path, dtype="bfloat16")
    files = files_of(tmp_path)
    assert str(files.hf.dtype).removeprefix("torch.") == "bfloat16"
    mesh = build_mesh(MeshConfig())
    _, params = restore(tmp_path, files.decoder, files.decoder, mesh)
    assert {x.dtype for x in leaves(params)} == {np.dtype("float32")}


def test_tokens_are_those_of_the_checkpoint_it_came_from(
    odd_model: Path, tmp_path: Path, make_llm: Callable[..., LLM]
) -> None:
    convert(odd_model, tmp_path)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    prompts = [[5, 6, 7, 8, 9], [40, 3]]
    answers = [
        tokens_of(make_llm(model, mesh=mesh, num_gpu_blocks_override=21).generate(prompts, params, use_tqdm=False))
        for model, mesh in ((odd_model, None), (tmp_path, "dp=2,tp=4"), (tmp_path, "pp=2,tp=3"))
    ]
    assert answers[0] == answers[1] == answers[2]


def test_a_directory_without_params_is_refused() -> None:
    stored = files_of(FIXTURES / "llama").decoder
    with pytest.raises(FileNotFoundError, match="no Orbax checkpoint"):
        restore(FIXTURES / "llama", stored, stored, build_mesh(MeshConfig()))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"intermediate_size": 80}, "mlp.* the config asks for"), ({"num_hidden_layers": 3}, "missing")],
)
def test_config_and_params_must_belong_together(overrides: dict[str, int], message: str, tmp_path: Path) -> None:
    convert(FIXTURES / "llama", tmp_path)
    stored = files_of(tmp_path, **overrides).decoder
    with pytest.raises(ValueError, match=message):
        restore(tmp_path, stored, stored, build_mesh(MeshConfig()))
