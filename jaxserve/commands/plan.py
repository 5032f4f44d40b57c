"""``jaxserve plan``: which mesh to choose for a model and a number of GPUs, and what it would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.cli.command import epilog
from jaxserve.cli.options import CheckpointFlags, Json
from jaxserve.cli.output import bytes_text, count_text, print_json, print_pairs, print_table, seconds_text

if TYPE_CHECKING:
    from jaxserve.dry_run import Comparison
    from jaxserve.models.config import DecoderConfig
    from sharding.hardware import Cluster
    from sharding.mesh import MeshConfig
    from sharding.model_shape import ModelShape
    from sharding.planner import Limits, Objective, Plan, Ranking, Rejection, Workload

MOST_REASONS = 3
"""Of each cause; --json has all."""
SHOWN_PADDING = 0.005


@epilog(
    "jaxserve plan --model llama-3.1-70b --gpus 8xh200",
    "jaxserve plan --model llama-3.1-405b --gpus 8xh100 --hosts 2 --objective latency",
    "jaxserve plan --model llama-3.1-8b --gpus 2xh100 --objective latency --verify",
    "jaxserve plan --model path/to/checkpoint --gpus 4xl40s --workload 2000,300,2.5 --json",
)
def plan(
    *,
    model: CheckpointFlags,
    gpus: Annotated[str, typer.Option("--gpus", metavar="GPUS", help='Of one host, like "8xh200" or "h200:8".')],
    hosts: Annotated[
        int | None, typer.Option(help="Hosts with so many GPUs each; none = as many as they need.")
    ] = None,
    objective: Annotated[str, typer.Option(metavar="OBJECTIVE", help="latency or throughput.")] = "throughput",
    workload: Annotated[
        str, typer.Option(metavar="IN,OUT[,RATE]", help="Prompt and output tokens, and requests per second.")
    ] = "1024,256",
    concurrency: Annotated[
        int | None, typer.Option(help="Requests at once, instead of a rate; none = 1 for latency, else all that fit.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest sequence that the cache must hold; none = the workload's.")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Sequences per step and replica.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per step and replica.")] = None,
    mesh: Annotated[
        str | None, typer.Option(metavar="MESH", help='Only this one: "pp=2,tp=8", or a TOML file, whose links count.')
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Plans to show.")] = 5,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compile the best plan's steps and compare memory and bytes sent.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Rank the meshes for a model on GPUs that need not be there, and say why the others cannot be.

    Only config.json is read, and nothing is measured: the figures follow from data sheets (docs/planning.md). --model
    also takes the shape of a well-known model, such as llama-3.1-70b. Exit code 1 if no mesh fits, or if --verify finds
    a prediction that is more than 5 % off.
    """
    asked = _Asked.of(model, gpus, hosts, objective, parse_workload(workload, concurrency))
    limits = _limits(max_model_len, max_num_seqs, max_num_batched_tokens)
    asked.check(limits)
    from sharding.planner import rank

    only = None if mesh is None else [_only(mesh, asked.cluster)]
    ranking = rank(asked.shape, asked.cluster, asked.workload, asked.objective, limits, only)
    if not as_json:
        _print(asked, limits, ranking, top)
    verified = _verify(asked, model, limits, ranking.plans[0]) if verify and ranking.plans else []
    if as_json:
        print_json(_report(asked, limits, ranking) | {"verified": [_comparison_report(c) for c in verified]})
    elif verified:
        _print_comparisons(ranking.plans[0], verified)
    if not ranking.plans or not all(c.holds for c in verified):
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Asked:
    name: str
    decoder: DecoderConfig
    shape: ModelShape
    cluster: Cluster
    objective: Objective
    workload: Workload

    @classmethod
    def of(cls, flags: CheckpointFlags, gpus: str, hosts: int | None, objective: str, workload: Workload) -> _Asked:
        from sharding.hardware import Cluster
        from sharding.planner import OBJECTIVES

        if objective not in OBJECTIVES:
            raise ValueError(f"--objective {objective!r}: it is one of {', '.join(OBJECTIVES)}")
        cluster = Cluster.parse(gpus, hosts)
        from jaxserve.build import ModelFiles, resolve_dtype, resolve_kv_dtype
        from jaxserve.models.shape import model_shape

        args = flags.engine_args()
        files = ModelFiles.find(args)
        dtype = resolve_dtype(args.dtype, files.hf)
        kv_dtype = resolve_kv_dtype(args.kv_cache_dtype, dtype)
        shape = model_shape(files.decoder, str(dtype), str(kv_dtype))
        return cls(files.name, files.decoder, shape, cluster, next(o for o in OBJECTIVES if o == objective), workload)

    def check(self, limits: Limits) -> None:
        longest, most = limits.max_model_len or self.workload.length, self.decoder.max_position
        if longest > most:
            raise ValueError(f"sequences of {longest} tokens: this model's are at most {most} long")


def _only(text: str, cluster: Cluster) -> MeshConfig:
    from sharding.mesh import MeshConfig

    mesh = MeshConfig.resolve(text)
    if mesh.rules:
        raise ValueError(f"--mesh {text}: plans know the usual rules only; leave [rules] out")
    if mesh.num_devices != cluster.num_gpus:
        raise ValueError(f"--mesh {mesh}: it has {mesh.num_devices} devices, the cluster {cluster.num_gpus} GPUs")
    return mesh


def _verify(asked: _Asked, flags: CheckpointFlags, limits: Limits, plan: Plan) -> list[Comparison]:
    """Compile the steps of a plan, and compare."""
    from jaxserve.cli.output import progress
    from jaxserve.dry_run import DryRun
    from jaxserve.engine_args import EngineArgs

    args = EngineArgs(
        **flags.engine_options(),
        mesh=plan.mesh,
        max_model_len=limits.max_model_len or asked.workload.length,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
    )
    run = DryRun.of(args, asked.cluster)
    programs = [run.program(layout) for layout in progress("compiling", run.layouts())]
    return run.compare(plan.memory, programs)


def parse_workload(text: str, concurrency: int | None) -> Workload:
    """ "1024,256" or "1024,256,2.5"."""
    from sharding.planner import Workload

    try:
        input_len, output_len, *rest = text.split(",")
        (rate,) = rest or [None]
        lengths = int(input_len), int(output_len)
        return Workload(*lengths, rate=None if rate is None else float(rate), concurrency=concurrency)
    except ValueError as error:
        if str(error).startswith("workload"):
            raise
        raise ValueError(
            f"--workload {text!r}: prompt tokens, output tokens and perhaps requests per second, like 1024,256,2.5"
        ) from None


def _limits(max_model_len: int | None, max_num_seqs: int | None, max_num_batched_tokens: int | None) -> Limits:
    from sharding.planner import Limits

    defaults = Limits()
    return Limits(
        max_num_seqs or defaults.max_num_seqs,
        max_num_batched_tokens or defaults.max_num_batched_tokens,
        max_model_len,
    )


# -- output ------------------------------------------------------------------------------------------------------------


def _report(asked: _Asked, limits: Limits, ranking: Ranking) -> dict[str, Any]:
    return {
        "model": {"name": asked.name, "num_params": asked.shape.num_params, **asdict(asked.shape)},
        "cluster": {
            "gpu": asked.cluster.gpu.name,
            "gpus_per_host": asked.cluster.gpus_per_host,
            "hosts": asked.cluster.hosts,
            "memory_bytes": asked.cluster.gpu.memory_bytes,
        },
        "objective": asked.objective,
        "workload": asked.workload,
        "limits": limits,
        "assumptions": _assumptions(),
        "plans": [_plan_report(i, p) for i, p in enumerate(ranking.plans, 1)],
        "rejected": [{"mesh": r.mesh.sizes, "cause": r.cause, "reason": r.reason} for r in ranking.rejected],
    }


def _plan_report(position: int, plan: Plan) -> dict[str, Any]:
    memory = asdict(plan.memory) | {"total": plan.memory.total}
    return {"rank": position, **asdict(plan), "mesh": plan.mesh.sizes, "memory": memory}


def _comparison_report(comparison: Comparison) -> dict[str, Any]:
    return asdict(comparison) | {"error": comparison.error, "holds": comparison.holds}


def _assumptions() -> dict[str, float]:
    from sharding import cost_model, hardware

    names = ("COMPUTE_FRACTION", "MEMORY_FRACTION", "LINK_FRACTION", "COLLECTIVE_SECONDS")
    model = ("KERNEL_SECONDS", "KERNELS_PER_LAYER", "OVERLAP", "IMBALANCE", "MEMORY_UTILIZATION", "RESERVE_BYTES")
    found = {n: getattr(hardware, n) for n in names} | {n: getattr(cost_model, n) for n in model}
    return {name.lower(): value for name, value in found.items()}


def _print(asked: _Asked, limits: Limits, ranking: Ranking, top: int) -> None:
    from sharding.cost_model import usable_bytes

    shape, gpu, work = asked.shape, asked.cluster.gpu, asked.workload
    weights = bytes_text(shape.num_params * shape.dtype_bytes)
    at_most = f", up to {limits.max_num_seqs} sequences and {limits.max_num_batched_tokens} tokens per step and replica"
    print_pairs(
        f"{asked.name} on {asked.cluster}, for {asked.objective}",
        {
            "model": f"{count_text(shape.num_params)} parameters, {weights} in {shape.dtype}",
            "GPU": f"{bytes_text(usable_bytes(gpu))} usable of {bytes_text(gpu.memory_bytes)}; {_links(asked.cluster)}",
            "workload": f"{work.input_len} tokens in, {work.output_len} out, {_load(work, asked.objective)}{at_most}",
        },
    )
    if ranking.plans:
        _print_plans(ranking.plans[:top])
    _print_rejections(ranking.rejected)
    if all(r.cause == "memory" for r in ranking.rejected) and not ranking.plans:
        _print_hint(asked)
    _print_assumptions()


def _links(cluster: Cluster) -> str:
    return cluster.intra.name + (f", {cluster.inter.name} between hosts" if cluster.hosts > 1 else "")


def _load(work: Workload, objective: str) -> str:
    if work.rate is not None:
        return f"{work.rate:g} requests/s"
    if work.concurrency is not None:
        return f"{work.concurrency} at once"
    return "one at a time" if objective == "latency" else "as many at once as fit"


def _print_plans(plans: Sequence[Plan]) -> None:
    rows = [
        [
            str(i),
            p.mesh.short + (f" (+{p.padding:.0%} padding)" if p.padding > SHOWN_PADDING else ""),
            bytes_text(p.memory.needed),
            count_text(p.kv_tokens),
            seconds_text(p.ttft),
            seconds_text(p.time_per_token),
            f"{p.tokens_per_second:,.0f}",
            f"{p.max_tokens_per_second:,.0f}",
            p.bound_by,
        ]
        for i, p in enumerate(plans, 1)
    ]
    header = ["", "mesh", "memory", "KV tokens", "TTFT", "per token", "tokens/s", "at most", "bound by"]
    print_table(header, rows)


def _print_comparisons(plan: Plan, comparisons: Sequence[Comparison]) -> None:
    typer.echo("")
    typer.echo(f"{plan.mesh.short}, compiled: per device, a loop's body counted once")
    rows = [
        [c.what, bytes_text(c.predicted), bytes_text(c.compiled), f"{c.error:+.1%}", "" if c.holds else "OFF"]
        for c in comparisons
    ]
    print_table(["", "predicted", "compiled", "off by", ""], rows)


def _print_rejections(rejected: Sequence[Rejection]) -> None:
    """The meshes of each reason together; of each cause the three that are likely to be closest."""
    grouped: dict[str, dict[str, list[Rejection]]] = {}
    for rejection in rejected:
        grouped.setdefault(rejection.cause, {}).setdefault(rejection.reason, []).append(rejection)
    for cause, reasons in grouped.items():
        ordered = sorted(reasons.items(), key=lambda item: _how_far(cause, item[1][0].mesh))
        for reason, same in ordered[:MOST_REASONS]:
            meshes = "; ".join(r.mesh.short for r in same[:MOST_REASONS])
            more = f" and {len(same) - MOST_REASONS} more" if len(same) > MOST_REASONS else ""
            typer.echo(f"not {meshes}{more}: {reason}")
        left = sum(len(same) for _, same in ordered[MOST_REASONS:])
        if left:
            typer.echo(f"not {left} more, for the like")


def _how_far(cause: str, mesh: MeshConfig) -> int:
    """Smaller is closer: replicas serve more requests, and shards leave more room."""
    return -mesh.dp if cause == "rate" else -mesh.pp * mesh.tp


def _print_hint(asked: _Asked) -> None:
    from sharding.planner import fewest_gpus

    least = fewest_gpus(asked.shape, asked.cluster)
    typer.echo(f"no mesh fits; the weights alone fill {least} × {asked.cluster.gpu.name}")


def _print_assumptions() -> None:
    a = _assumptions()
    typer.echo(
        f"assumed: {a['compute_fraction']:.0%} of peak FLOP/s, {a['memory_fraction']:.0%} of memory and "
        f"{a['link_fraction']:.0%} of link bandwidth, {a['collective_seconds'] * 1e6:.1f} µs per collective, "
        f"{a['kernel_seconds'] * 1e6:.0f} µs per kernel;"
    )
    typer.echo("requests are alike, and none queues. Nothing is measured: compare plans, do not quote them.")
