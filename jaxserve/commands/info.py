"""``jaxserve info``: what a model is, and what of it each device of a mesh would hold."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from typing import TYPE_CHECKING, Any

from jaxserve.cli.command import epilog
from jaxserve.cli.options import Json, ModelFlags
from jaxserve.cli.output import bytes_text, count_text, print_json, print_pairs, print_table

if TYPE_CHECKING:
    import jax

    from jaxserve.build import ModelFiles
    from jaxserve.models.config import DecoderConfig
    from sharding import MeshConfig


@epilog(
    "jaxserve info",
    "jaxserve info --model path/to/checkpoint -tp 4 -dp 2",
    "jaxserve info --model path/to/checkpoint --mesh mesh.toml --dtype bfloat16 --json",
)
def info(engine: ModelFlags, as_json: Json = False) -> None:
    """Show a model's configuration and the bytes that each device of a mesh would hold.

    Only config.json is read. Devices that are not there are simulated; a mesh that the model does not fit is an error.
    """
    plan = _Plan.of(engine)
    report = {"model": plan.model(), "mesh": plan.mesh(), "environment": _environment()}
    if as_json:
        print_json(report)
        return
    _print_model(report["model"])
    _print_mesh(report["mesh"])
    _print_environment(report["environment"])


@dataclass(frozen=True)
class _Plan:
    """A model laid over a mesh, none of it loaded."""

    files: ModelFiles
    mesh_config: MeshConfig
    decoder: DecoderConfig
    dtype: Any
    kv_dtype: Any

    @classmethod
    def of(cls, flags: ModelFlags) -> _Plan:
        from jaxserve.build import (
            ModelFiles,
            check_context,
            fit,
            open_mesh,
            resolve_dtype,
            resolve_kv_dtype,
            resolve_mesh,
        )
        from sharding import MeshConfig

        args = flags.engine_args()
        mesh_config = resolve_mesh(args)
        files = ModelFiles.find(args)
        decoder = fit(files.decoder, mesh_config)
        check_context(decoder, mesh_config, decoder.max_position)
        _simulate(mesh_config.num_devices)
        open_mesh(MeshConfig())
        dtype = resolve_dtype(args.dtype, files.hf)
        kv_dtype = resolve_kv_dtype(args.kv_cache_dtype, dtype)
        return cls(files, mesh_config, decoder, dtype, kv_dtype)

    def model(self) -> dict[str, Any]:
        config = self.files.decoder
        parameters = self._parameters(config)
        return {
            "directory": str(self.files.directory),
            "architecture": (self.files.hf.architectures or ["?"])[0],
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "max_position": config.max_position,
            "tied_embeddings": config.tied_embeddings,
            "sliding_windows": sorted({layer.window for layer in config.layers if layer.window is not None}),
            "eos_token_ids": list(self.files.eos_token_ids),
            "num_parameters": parameters,
            "dtype": str(self.dtype),
            "weight_bytes": parameters * self.dtype.itemsize,
            "kv_cache_dtype": str(self.kv_dtype),
            "kv_bytes_per_token": self._kv_bytes(config, 1),
        }

    def mesh(self) -> dict[str, Any]:
        """The bytes of every device, summed over the part of each parameter that its sharding gives it."""
        import jax

        from jaxserve.weights.loader import abstract_params, param_shardings
        from sharding import MESH_AXES, build_mesh

        mesh = build_mesh(self.mesh_config, jax.devices("cpu"))
        _, params = abstract_params(self.decoder, self.dtype)
        held = dict.fromkeys(mesh.devices.flat, 0)
        for name, sharding in param_shardings(params, mesh, self.mesh_config.sharding_rules).items():
            shape = params[name].get_value().shape
            for device, index in sharding.devices_indices_map(shape).items():
                held[device] += _size(index, shape) * self.dtype.itemsize
        kv = self._kv_bytes(self.decoder, self.mesh_config.tp) // self.mesh_config.cp
        devices = [
            {
                "device": i,
                **dict(zip(MESH_AXES, coordinates, strict=True)),
                "weight_bytes": held[mesh.devices[coordinates]],
                "kv_bytes_per_token": kv,
            }
            for i, coordinates in enumerate(_coordinates(mesh))
        ]
        return {
            "axes": {axis: getattr(self.mesh_config, axis) for axis in MESH_AXES},
            "device_order": self.mesh_config.device_order,
            "links": dict(self.mesh_config.links),
            "rules": dict(self.mesh_config.rules),
            "xla_flags": dict(self.mesh_config.xla_flags),
            "num_devices": self.mesh_config.num_devices,
            "devices": devices,
            "balanced": len({d["weight_bytes"] for d in devices}) == 1,
            **self._fit(),
        }

    def _fit(self) -> dict[str, Any]:
        """What was copied and filled up so that the model divides, and what that adds to its weights and KV cache."""
        stored, fitted = self.files.decoder, self.decoder
        places, kv_heads = fitted.layers_per_stage * fitted.num_stages, fitted.num_kv_heads
        return {
            "kv_head_copies": fitted.kv_copies,
            "kv_head_padding": fitted.kv_head_padding,
            "head_padding": fitted.head_padding,
            "intermediate_padding": fitted.intermediate_size - stored.intermediate_size,
            "vocab_padding": fitted.vocab_padding,
            "idle_layers": places - fitted.num_layers,
            "added_weight_percent": round(100 * (self._parameters(fitted) / self._parameters(stored) - 1), 2),
            "added_kv_percent": round(100 * (kv_heads * places / (stored.num_kv_heads * stored.num_layers) - 1), 2),
        }

    def _parameters(self, config: DecoderConfig) -> int:
        from jaxserve.weights.loader import abstract_params

        return sum(p.get_value().size for p in abstract_params(config, self.dtype)[1].values())

    def _kv_bytes(self, config: DecoderConfig, tp: int) -> int:
        from jaxserve.device_state import kv_bytes_per_block

        return kv_bytes_per_block(config, config.layers_per_stage, 1, self.kv_dtype.itemsize, tp)


def _simulate(count: int) -> None:
    """As many CPU devices as the mesh has, beside whatever else the machine has."""
    import contextlib

    import jax

    with contextlib.suppress(RuntimeError):  # jax has its devices already: build_mesh says if they are too few
        jax.config.update("jax_num_cpu_devices", count)


def _coordinates(mesh: jax.sharding.Mesh) -> list[tuple[int, ...]]:
    import numpy as np

    return [tuple(map(int, c)) for c in np.ndindex(mesh.devices.shape)]


def _size(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> int:
    return prod(len(range(*s.indices(n))) for s, n in zip(index or (), shape, strict=True))


def _environment() -> dict[str, Any]:
    import jax
    import psutil

    devices = jax.devices()
    real = 1 if devices[0].platform == "cpu" else len(devices)
    versions = {name: version(name) for name in ("jaxserve", "jax", "flax")}
    memory = psutil.virtual_memory().total
    limits = devices[0].memory_stats() or {} if devices[0].platform != "cpu" else {"bytes_limit": memory}
    return versions | {
        "python": platform.python_version(),
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "num_devices": real,
        "device_memory_bytes": limits.get("bytes_limit"),
    }


def _print_environment(environment: dict[str, Any]) -> None:
    memory = environment["device_memory_bytes"]
    versions = [f"{name} {environment[name]}" for name in ("jaxserve", "jax", "flax", "python")]
    devices = f"{environment['num_devices']} × {environment['device_kind']}"
    pairs = {"versions": ", ".join(versions), "devices": devices + (f", {bytes_text(memory)}" if memory else "")}
    print_pairs("environment", pairs)


def _print_model(model: dict[str, Any]) -> None:
    windows = ", ".join(map(str, model["sliding_windows"]))
    print_pairs(
        f"{model['architecture']}  {model['directory']}",
        {
            "parameters": f"{count_text(model['num_parameters'])} ({model['num_parameters']:,})",
            "weights": f"{bytes_text(model['weight_bytes'])} in {model['dtype']}",
            "layers": f"{model['num_layers']}" + (f", sliding window {windows}" if windows else ""),
            "hidden size": f"{model['hidden_size']}, feed-forward {model['intermediate_size']}",
            "heads": f"{model['num_heads']} query, {model['num_kv_heads']} KV, of {model['head_dim']}",
            "vocabulary": f"{model['vocab_size']}" + (", tied" if model["tied_embeddings"] else ""),
            "context": f"{model['max_position']} tokens",
            "KV cache": f"{bytes_text(model['kv_bytes_per_token'])} per token in {model['kv_cache_dtype']}",
        },
    )


def _print_mesh(mesh: dict[str, Any]) -> None:
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh["axes"].items() if size > 1) or "one device"
    pairs = {}
    if mesh["num_devices"] > 1:
        pairs["balance"] = f"{'every' if mesh['balanced'] else 'NOT every'} device holds the same"
    if order := mesh["device_order"]:
        pairs["device order"] = ", ".join(map(str, order))
    if mesh["links"]:
        pairs["links"] = ", ".join(f"{axis} over {link}" for axis, link in mesh["links"].items())
    if mesh["rules"]:
        pairs["rules"] = ", ".join(f"{name} over {','.join(axes) or 'none'}" for name, axes in mesh["rules"].items())
    if mesh["xla_flags"]:
        pairs["XLA flags"] = "; ".join(f"jax {key}: {' '.join(flags)}" for key, flags in mesh["xla_flags"].items())
    if notes := _fit_notes(mesh):
        weights, kv = mesh["added_weight_percent"], mesh["added_kv_percent"]
        pairs["fit"] = f"{', '.join(notes)}: {weights:.1f} % more weight memory, {kv:.0f} % more KV cache"
    print_pairs(f"mesh {axes}", pairs)
    names = [axis for axis, size in mesh["axes"].items() if size > 1]
    rows = [
        [
            str(d["device"]),
            *(str(d[name]) for name in names),
            f"{bytes_text(d['weight_bytes'])} ({d['weight_bytes']:,})",
            bytes_text(d["kv_bytes_per_token"]),
        ]
        for d in mesh["devices"]
    ]
    print_table(["device", *names, "weights", "KV per token"], rows)


def _fit_notes(mesh: dict[str, Any]) -> list[str]:
    names = {
        "head_padding": "query heads",
        "kv_head_padding": "KV heads",
        "intermediate_padding": "feed-forward",
        "vocab_padding": "vocabulary",
        "idle_layers": "places without a layer",
    }
    copies = mesh["kv_head_copies"]
    copied = [f"each KV head held {copies} times"] if copies > 1 else []
    return copied + [f"{name} +{mesh[key]}" for key, name in names.items() if mesh[key]]
