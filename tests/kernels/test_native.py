"""How kernels in C++ are built, and what attention in C++ promises besides being right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, native
from pallas_kernels.paged_attention import Ragged, Scoring, Setting, Shape
from pallas_kernels.paged_attention.native import IMPLEMENTATION, SOURCE

CPU = Setting("cpu", None, "bfloat16", "float32", 64, 4, 16)
needs_native = pytest.mark.skipif(native.refusal() is not None, reason=str(native.refusal()))


# -- building ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"CXX": "no-such-compiler"}, "CXX=no-such-compiler is not a program"),
        ({"PATH": "/nowhere"}, "it needs a C++ compiler: one of c++, g++, clang++"),
    ],
)
def test_without_a_compiler_xla_does_it(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str) -> None:
    monkeypatch.delenv("CXX", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert words in str(IMPLEMENTATION.refuses(CPU))
    assert dispatch.paged_attention(CPU).name == "cpu"
    with pytest.raises(ValueError, match="native: "):
        dispatch.paged_attention(CPU, "native")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"platform": "gpu"}, "for CPUs"),
        ({"dtype": "float16"}, "not queries of float16"),
        ({"kv_dtype": "int8"}, "not a KV cache of int8"),
    ],
)
def test_what_is_refused(change: dict[str, str], words: str) -> None:
    assert words in str(IMPLEMENTATION.refuses(CPU._replace(**change)))


@needs_native
def test_what_does_not_compile_is_an_error_with_the_compilers_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cc"
    source.write_text("int f() { return nonsense; }\n")
    with pytest.raises(RuntimeError, match=r"nonsense[\s\S]*attention_backend='cpu'"):
        native.register(source, "f")
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob("*.tmp"))


TWICE = """
import sys
from pathlib import Path
from pallas_kernels import native
native.register(Path(sys.argv[1]), "answer")
"""


@needs_native
def test_a_library_is_built_once_for_all_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    source = tmp_path / "kernel.cc"
    source.write_text('extern "C" int answer() { return 42; }\n')

    def built() -> dict[Path, int]:
        subprocess.run([sys.executable, "-c", TWICE, str(source)], check=True, timeout=120)
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.so")}

    first = built()
    assert len(first) == 1 and built() == first
    source.write_text('extern "C" int answer() { return 43; }\n')
    assert len(built()) == 2


# -- attention ---------------------------------------------------------------------------------------------------------


def problem(
    kv_lens: list[int], q_lens: list[int], dtype: str = "float32"
) -> tuple[jax.Array, jax.Array, jax.Array, Ragged]:
    """q [T, 2, 3, 16], caches of blocks of 16, and where the tokens of the sequences are."""
    rng = np.random.default_rng(sum(kv_lens))
    width = -(-max(kv_lens) // 16)
    blocks = 1 + width * len(kv_lens)
    k_shape, v_shape = IMPLEMENTATION.cache_shapes(blocks, 16, 2, 16)
    tables = rng.permutation(np.arange(1, blocks, dtype=np.int32)).reshape(len(kv_lens), width)
    visible = np.concatenate([np.arange(k - q, k) + 1 for k, q in zip(kv_lens, q_lens, strict=True)])
    starts = np.concatenate([[0], np.cumsum(q_lens)])
    ragged = Ragged(*(jnp.asarray(x, jnp.int32) for x in ([], starts, kv_lens, tables, visible)))
    shapes = (sum(q_lens), 2, 3, 16), k_shape, v_shape
    q, k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return 2 * q, k, v, ragged


def attend(name: str, q: jax.Array, k: jax.Array, v: jax.Array, ragged: Ragged) -> tuple[jax.Array, jax.Array]:
    implementation, shape, scoring = dispatch.PAGED_ATTENTION[name], Shape(16), Scoring(0.25)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, ragged: Ragged) -> tuple[jax.Array, jax.Array]:
        return implementation.attend(q, k, v, implementation.plan(ragged, q.shape[0], shape), shape, scoring)

    return jax.jit(run)(q, k, v, ragged)


@needs_native
@pytest.mark.parametrize("kv_lens", [[2047], [2048], [2049], [9000, 5, 4097, 1]], ids=str)
def test_one_long_sequence_is_cut_into_runs_that_merge(kv_lens: list[int]) -> None:
    """A run has 2048 keys; several threads take the runs in any order."""
    arrays = problem(kv_lens, [1] * len(kv_lens))
    found, expected = (attend(name, *arrays) for name in ("native", "cpu"))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequence_is_the_same_alone_and_in_a_crowd(dtype: str) -> None:
    """Bit by bit."""
    kv_lens, q_lens = [700, 4100, 33, 90], [1, 1, 20, 77]
    q, k, v, ragged = problem(kv_lens, q_lens, dtype)
    together, _ = attend("native", q, k, v, ragged)
    starts = np.concatenate([[0], np.cumsum(q_lens)])
    for s, count in enumerate(q_lens):
        rows = slice(starts[s], starts[s + 1])
        own = Ragged(
            ragged.slot_mapping,
            jnp.array([0, count], jnp.int32),
            ragged.kv_lens[s : s + 1],
            ragged.block_tables[s : s + 1],
            ragged.visible[rows],
        )
        np.testing.assert_array_equal(attend("native", q[rows], k, v, own)[0], together[rows])


@needs_native
def test_sources_are_in_the_package() -> None:
    assert SOURCE.exists() and list(native.HEADERS.glob("*.h"))
