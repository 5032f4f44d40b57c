"""``jaxserve convert``: a Hugging Face checkpoint as an Orbax checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from jaxserve.cli.command import epilog
from jaxserve.cli.options import Json
from jaxserve.cli.output import bytes_text, count_text, print_json, seconds_text, watched


@epilog(
    "jaxserve convert path/to/checkpoint path/to/new_directory",
    "jaxserve convert demo demo_float32 --dtype float32",
    "jaxserve generate --model path/to/new_directory -tp 4 Hello",
)
def convert(
    source: Annotated[str, typer.Argument(help='A checkpoint directory, a hub name, or "demo".')],
    destination: Annotated[Path, typer.Argument(help="A directory that does not exist yet, or is empty.")],
    dtype: Annotated[
        str,
        typer.Option(metavar="DTYPE", help="auto (the checkpoint's), float32, bfloat16 or float16."),
    ] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    as_json: Json = False,
) -> None:
    """Write an Orbax checkpoint, which loads onto any mesh, each device reading its own part.

    The whole model passes through the memory of the CPU.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists and is not an empty directory: give a new one")
    import jax

    from jaxserve.build import ModelFiles, load_model
    from jaxserve.engine_args import EngineArgs
    from jaxserve.weights.orbax import save
    from sharding import MeshConfig, ShardingRules, build_mesh
    from sharding.platform import use_cpu

    use_cpu()
    start = time.perf_counter()
    args = EngineArgs(model=source, revision=revision, dtype=dtype, use_tqdm_on_load=watched())
    files = ModelFiles.find(args)
    mesh = build_mesh(MeshConfig(), jax.devices("cpu"))
    _, params = load_model(files, args, files.decoder, mesh, ShardingRules())
    save(destination, files.directory, params)
    arrays = jax.tree.leaves(params)
    report = {
        "source": str(files.directory),
        "destination": str(destination),
        "dtype": str(arrays[0].dtype),
        "num_parameters": sum(x.size for x in arrays),
        "weight_bytes": sum(x.nbytes for x in arrays),
        "seconds": time.perf_counter() - start,
    }
    if as_json:
        print_json(report)
        return
    typer.echo(
        f"{destination}: {count_text(report['num_parameters'])} parameters, {bytes_text(report['weight_bytes'])} "
        f"in {report['dtype']}, {seconds_text(report['seconds'])}"
    )
