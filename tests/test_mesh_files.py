"""Mesh files: what they may say, that it is honoured, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from tiny_models import SMALL, run, tokens_of

from jaxserve import LLM, SamplingParams
from sharding import MeshConfig, ShardingRules, build_mesh
from sharding.xla_flags import compiler_options

EVERYTHING = """
[axes]
pp = 2
tp = 2
[devices]
order = [3, 2, 1, 0]
[links]
tp = "nvlink"
pp = "infiniband"
[rules]
vocab = "tp"
mlp = ""
[xla_flags]
"0.11" = ["--xla_gpu_a=1"]
"0.11.2" = ["--xla_gpu_b=2", "--xla_gpu_c=3"]
"0.1" = ["--xla_gpu_d=4"]
"""

REORDERED = """
[axes]
tp = 2
[devices]
order = [1, 0]
[rules]
mlp = ""
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "mesh.toml"
    path.write_text(text)
    return path


def test_everything(tmp_path: Path) -> None:
    config = MeshConfig.from_file(write(tmp_path, EVERYTHING))
    assert (config.shape, config.num_devices, str(config)) == ((1, 2, 1, 2), 4, "dp=1,pp=2,cp=1,tp=2")
    assert dict(config.links) == {"tp": "nvlink", "pp": "infiniband"}
    assert config.sharding_rules == ShardingRules(vocab="tp", mlp=None)
    assert [d.id for d in build_mesh(config).devices.flat] == [3, 2, 1, 0]
    assert config.flags_for("0.11.2") == ("--xla_gpu_b=2", "--xla_gpu_c=3")
    assert config.flags_for("0.11.20") == config.flags_for("0.11.3") == ("--xla_gpu_a=1",)
    assert config.flags_for("0.12.0") == ()


def test_what_a_file_says_changes_the_layout_and_not_the_tokens(
    make_llm: Callable[..., LLM], odd_model: Path, tmp_path: Path
) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    plain, laid_out = (make_llm(odd_model, mesh=mesh) for mesh in (None, write(tmp_path, REORDERED)))
    (down,) = jax.tree.leaves(laid_out.engine.runner.named_params["layers.0.mlp.down"])
    assert down.sharding.is_fully_replicated
    assert laid_out.engine.runner.mesh.devices.flat[0].id == 1
    prompts = [[1, 2, 3], list(range(40))]
    assert tokens_of(run(laid_out, prompts, params)) == tokens_of(run(plain, prompts, params))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[axes]\ntp = 0", ["tp=0"]),
        ("[axes]\nep = 2", ["'ep'", "dp, pp, cp, tp"]),
        ("[shape]\ntp = 2", ["'shape'", "[axes]", "[rules]"]),
        ("tp = 2", ["'tp'"]),
        ("[axes]\ntp = 2\n[devices]\norder = [0, 0]", ["devices.order=[0, 0]", "0 to 1"]),
        ("[axes]\ntp = 2\n[links]\ntp = 'wifi'", ["links.tp='wifi'", "nvlink, pcie, infiniband"]),
        ("[axes]\ntp = 2\n[rules]\nmlp = 'ep'", ["rules.mlp", "'ep'"]),
        ("[axes\ntp = 2", ["mesh.toml"]),
        ("[axes]\ntp = 2\n[devices]\nordr = [1, 0]", ["'ordr'", "order"]),
        ("[axes]\ntp = 2\n[devices]\norder = 5", ["devices.order=5", "list of whole numbers"]),
        ("links = 'x'\n[axes]\ntp = 2", ["links='x'", "[links]"]),
        ("[axes]\ntp = 2\n[links]\ntp = 3", ["links.tp=3"]),
        ("[axes]\ntp = 2\n[rules]\nmlp = 3", ["rules.mlp=3"]),
        ("[axes]\ntp = 2\n[rules]\nmlp = ['tp', 'tp']", ["rules.mlp", "twice"]),
        ("[axes]\ndp = 2\n[rules]\nreplica = ''", ["rules.replica", "fixed"]),
        ("[axes]\ntp = 2\n[rules]\nheads = 'tp'", ["rules.heads", "kv_heads"]),
        ('[axes]\ntp = 2\n[xla_flags]\n"0.11" = "--x"', ["xla_flags.0.11='--x'", "list of texts"]),
        ('[axes]\ntp = 2\n[xla_flags]\n"0.11" = [1]', ["xla_flags.0.11=[1]"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        MeshConfig.from_file(write(tmp_path, text))
    assert all(word in str(error.value) for word in ["mesh.toml", *words])


def test_flags_are_options_of_the_compiler() -> None:
    mesh = MeshConfig(xla_flags=(("0.11", ("--xla_gpu_a=5", "--xla_b", "--xla_c=False")),))
    assert compiler_options(mesh, "cpu", "0.11.2") == {"xla_gpu_a": "5", "xla_b": True, "xla_c": False}
    on_gpu = compiler_options(mesh, "gpu", "0.11.2")
    assert on_gpu["xla_gpu_a"] == "5" and "COLLECTIVES" in on_gpu["xla_gpu_enable_command_buffer"]
    assert compiler_options(mesh, "gpu", "0.13.0") == {}


def test_flags_of_a_file_reach_the_step(tiny_model: Path, tmp_path: Path) -> None:
    text = f'[axes]\ntp = 2\n[xla_flags]\n"{jax.__version__}" = ["--xla_cpu_is_pink=true"]\n'
    with pytest.raises(ValueError, match=r"xla_flags.*xla_cpu_is_pink"):
        LLM(tiny_model, mesh=write(tmp_path, text), use_tqdm_on_load=False, **SMALL)
