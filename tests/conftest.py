"""What all tests share: jax on simulated devices, strict about types and ranks, and tiny models to serve."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import HealthCheck, settings
from tiny_models import SMALL, Oracle, write_llama
from tiny_tokenizers import byte_level_tokenizer

from jaxserve import LLM, build

REPOSITORY = Path(__file__).parent.parent
GIB = 1 << 30
NUM_DEVICES = 8
MOST_MAPS = 25_000
"""Of memory, with which a process goes on to the next file as it is."""
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options of XLA with which engines on a CPU are compiled in two thirds of the time, to slower code of the same
program. ``jax_disable_most_optimizations`` does so with all other programs, and would with those for absent GPUs, which
are to be what users get. JAXSERVE_TEST_OPTIMIZED=1 leaves both out."""
FEW_COLLECTIONS = (50_000, 10, 10)
"""Thresholds of Python's garbage collector, which takes a twentieth of the time otherwise: it looks through what jax
traces, and finds it alive."""


def pytest_configure(config: pytest.Config) -> None:
    platform = os.environ.get("JAXSERVE_TEST_PLATFORM", "cpu")
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda,cpu"}[platform])
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".cache" / "xla-tests"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # With a limit, jax locks the cache's files; without one, parallel test runs read half-written programs.
    jax.config.update("jax_compilation_cache_max_size", 4 * GIB)
    # A test run that was killed may leave such a file behind. It is compiled again, with this warning.
    config.addinivalue_line("filterwarnings", "default:Error (reading|writing) persistent compilation cache")
    assert len(jax.devices("cpu")) == NUM_DEVICES  # made now, while their number can still be chosen
    if quickly():
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of processes that tests start
        options = build.compiler_options
        build.compiler_options = lambda mesh, platform, version: (
            options(mesh, platform, version) | (QUICKLY if platform == "cpu" else {})
        )

    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    settings.register_profile("tests", derandomize=True, deadline=None, max_examples=60, suppress_health_check=slow)
    settings.load_profile("tests")
    gc.set_threshold(*FEW_COLLECTIONS)


def pytest_collection_finish() -> None:
    gc.freeze()  # modules stay as they are


def quickly() -> bool:
    """Whether programs for the CPU are to be compiled in little time."""
    on_cpu = os.environ.get("JAXSERVE_TEST_PLATFORM", "cpu") == "cpu"
    return on_cpu and not os.environ.get("JAXSERVE_TEST_OPTIMIZED")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture compiles."""
    compiles_for_gpus = item.path.parent.name == "kernels" or "optimized" in getattr(item, "fixturenames", ())
    jax.config.update("jax_disable_most_optimizations", quickly() and not compiles_for_gpus)


@pytest.fixture(scope="session")
def optimized() -> None:
    """For tests that compile for GPUs: ``pytest_runtest_setup`` looks for this name."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay in one process, because they share engines; parity tests share nothing."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, _, _ = nodeid.partition("::")
            return nodeid if path.endswith("test_parity.py") else path

    return ByFile(config, log)


@pytest.fixture(scope="session")
def shared_llms() -> Iterator[dict[Any, LLM]]:
    """Engines, by what they were made of."""
    llms: dict[Any, LLM] = {}
    yield llms
    forget(llms)


def forget(llms: dict[Any, LLM]) -> None:
    for llm in llms.values():
        assert not llm.engine.has_unfinished
        llm.engine.scheduler.check_integrity()
    llms.clear()


@pytest.fixture(scope="module", autouse=True)
def few_programs(shared_llms: dict[Any, LLM]) -> Iterator[None]:
    """Every program that XLA:CPU compiles maps memory several times, and Linux allows a process 65,530 maps: beyond
    that, compiling crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        forget(shared_llms)
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def make_llm(shared_llms: dict[Any, LLM]) -> Callable[..., LLM]:
    """(model directory, **options besides those of SMALL) -> LLM; the same one for the same arguments, because
    compiling takes seconds."""

    def make(directory: Path, **options: Any) -> LLM:
        key = (directory, tuple(sorted(options.items())))
        if key not in shared_llms:
            no_tokenizer = not (directory / "tokenizer.json").exists()
            shared_llms[key] = LLM(
                directory, use_tqdm_on_load=False, skip_tokenizer_init=no_tokenizer, **(SMALL | options)
            )
        return shared_llms[key]

    return make


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a byte-level tokenizer; its vocabulary is the tokenizer's."""
    tokenizer = byte_level_tokenizer()
    directory = tmp_path_factory.mktemp("tiny")
    tokenizer.save_pretrained(directory)
    return write_llama(directory, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)


@pytest.fixture(scope="session")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama without a tokenizer, with a vocabulary that no mesh divides and fewer KV heads than four ranks."""
    return write_llama(tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="session")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of five layers, which no number of stages but five divides."""
    return write_llama(tmp_path_factory.mktemp("deep"), num_hidden_layers=5)


@pytest.fixture(scope="session")
def tiny_llm(make_llm: Callable[..., LLM], tiny_model: Path) -> LLM:
    return make_llm(tiny_model)


@pytest.fixture(scope="session")
def tiny_oracle(tiny_llm: LLM) -> Oracle:
    return Oracle(tiny_llm)
