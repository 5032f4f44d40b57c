"""Is what a mesh serves what the checkpoint says? The engine as it would be deployed, against a plain forward.

Prompts are answered by the engine (scheduler, paged cache, kernels, mesh), with log-probabilities. The same sequences
then go through the same checkpoint as a plain float32 forward on one CPU device. Compared are every log-probability,
every greedy token, and figures of every layer's output, which name the layer where a difference begins.

    python scripts/verify.py --mesh tp=2 --out report
    python scripts/verify.py --model path/to/checkpoint -tp 8 --prompts-file prompts.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import typer

from jaxserve.cli.command import epilog, run_script
from jaxserve.cli.options import EngineFlags
from jaxserve.cli.output import progress
from jaxserve.commands.generate import read_prompts
from jaxserve.evaluation.agreement import (
    LayerErrors,
    Logprobs,
    compare_layers,
    compare_logprobs,
    forwards,
    other_choices,
    sequence_of,
    serve,
)
from jaxserve.evaluation.agreement_report import (
    SMALLEST_SHOWN,
    agreement_checks,
    agreement_figures,
    choice_table,
    logprob_plot,
)
from jaxserve.evaluation.command import begin, engine_options, finish
from jaxserve.evaluation.engines import mesh_of, open_llm, random_prompts, reserve_devices
from jaxserve.evaluation.flags import ReportFlags
from jaxserve.evaluation.plots import Plot, Theme, limit_line
from jaxserve.evaluation.reference import PlainModel
from jaxserve.evaluation.result import Check, Figure, Table
from jaxserve.inputs import read_prompt
from jaxserve.llm import LLM

QUESTION = "Does this mesh compute what the checkpoint says?"
PROMPTS = Path(__file__).parent / "demo_prompts.jsonl"
RANDOM_LENGTHS = (5, 33, 70, 100)
"""Beside the texts: shorter and longer than a KV block, and long enough for several chunks."""
WORST = "worst layer error"
MOST_NAMES = 14
"""Of layers, beside each other in a plot."""


@epilog(
    "python scripts/verify.py",
    "python scripts/verify.py -tp 2 -pp 2 --out report",
    "python scripts/verify.py -tp 8 -m DIR",
)
def verify(
    engine: EngineFlags,
    report: ReportFlags,
    prompts_file: Annotated[
        str | None, typer.Option(help="Besides random tokens: one prompt per line, or JSONL; none = a few of our own.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 12,
) -> None:
    """Compare what a mesh serves with a plain float32 forward of the same checkpoint on one CPU device.

    Exit code 1 if log-probabilities, greedy tokens or a layer are off by more than rounding explains.
    """
    options = engine_options(engine, max_num_seqs=8, max_num_batched_tokens=128)
    mesh = mesh_of(options)
    reserve_devices(mesh.num_devices)
    result = begin("verify", QUESTION, options, engine.seed, mesh.sizes)
    llm = open_llm(options).llm
    outputs = serve(llm, _prompts(llm, prompts_file, max_tokens, engine.seed), max_tokens)
    length = max(len(sequence_of(o)) for o in outputs)
    plain = PlainModel.load(llm.args, length)
    exact, rounded = (
        forwards(model, outputs)
        for model in progress("plain forwards", [plain, plain.rounded(llm.engine.runner.params[0].dtype)])
    )
    logprobs, choices = compare_logprobs(outputs, exact, rounded), other_choices(outputs, exact)
    layers = _layers(llm, plain, max((sequence_of(o) for o in outputs), key=len))
    result.figures += [*agreement_figures(logprobs, choices), _layer_figure(layers)]
    result.checks += [*agreement_checks(logprobs, choices), _layer_check(layers)]
    result.tables += [_layer_table(layers), *choice_table(choices)]
    result.samples = {"logprobs": logprobs.to_json(), "layers": vars(layers), "other_choices": [*map(vars, choices)]}
    finish(result, _plots(logprobs, layers), report)


def _prompts(llm: LLM, file: str | None, max_tokens: int, seed: int) -> list[list[int]]:
    """Token ids; random ones as long as the engine has room for."""
    room = llm.engine.scheduler.config.max_model_len - max_tokens
    if room < 1:
        raise ValueError(f"max_tokens={max_tokens}: leaves no room for a prompt in {room + max_tokens} tokens")
    lengths = sorted({min(length, room) for length in RANDOM_LENGTHS})
    prompts = random_prompts(llm.engine.runner.decoder.vocab_size, lengths, seed)
    if llm.engine.tokenizer is not None or file is not None:
        for prompt in read_prompts((), str(PROMPTS) if file is None else file):
            prompts.append(read_prompt(prompt, llm.engine.tokenizer)["prompt_token_ids"])
    return prompts


def _layers(llm: LLM, plain: PlainModel, sequence: list[int]) -> LayerErrors:
    """On one sequence, as a prompt."""
    dtype = llm.engine.runner.params[0].dtype
    exact, off = (model.forward(sequence, len(sequence)).digests for model in (plain, plain.rounded(dtype)))
    return compare_layers(llm.layer_digests(sequence), exact, off, float(jnp.finfo(dtype).eps))


def _layer_figure(layers: LayerErrors) -> Figure:
    how = f"{layers.name(layers.worst)}: its output's mean, rms or largest value on the longest sequence, relative"
    return Figure(WORST, layers.error[layers.worst], "", how, better="lower")


def _layer_check(layers: LayerErrors) -> Check:
    bad, place = layers.first_bad, layers.worst
    error = f"{layers.error[place]:.2g} in {layers.name(place)}, {layers.tolerance:.2g} allowed"
    begins = "" if bad is None else f"; it begins in {layers.name(bad)}"
    return Check("every layer is right", bad is None, f"off by up to {error}{begins}", (WORST,))


def _layer_table(layers: LayerErrors) -> Table:
    rows = [
        (layers.name(i), f"{layers.error[i]:.2e}", f"{layers.rounded[i]:.2e}", f"{layers.tolerance:.2e}")
        for i in range(len(layers.layer))
    ]
    bad = [i for i, error in enumerate(layers.error) if not error <= layers.tolerance]
    return Table("Layers", ("layer", "served", "rounding alone", "allowed"), rows, bad)


# -- plots -------------------------------------------------------------------------------------------------------------


def _plots(logprobs: Logprobs, layers: LayerErrors) -> list[Plot]:
    def draw_layers(axes: Sequence[Any], theme: Theme) -> None:
        (panel,) = axes
        error = np.maximum(layers.error, SMALLEST_SHOWN)
        colours = [theme.series(0) if e <= layers.tolerance else theme.bad for e in layers.error]
        names = [_short(layer, len(layers.layer) - 2) for layer in layers.layer]
        panel.bar(range(len(names)), error, color=colours, width=0.7)
        panel.plot(
            range(len(names)),
            np.maximum(layers.rounded, SMALLEST_SHOWN),
            "_",
            color=theme.ink,
            ms=14,
            mew=2,
            label="rounding alone",
        )
        limit_line(panel, theme, layers.tolerance, "allowed")
        panel.set(yscale="log", xlabel="output of", ylabel="relative difference")
        every = 1 + len(names) // MOST_NAMES
        panel.set_xticks(range(0, len(names), every), names[::every])
        panel.grid(axis="x", visible=False)
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    return [
        logprob_plot(logprobs),
        Plot(
            "layers",
            "Layers, served against plain",
            "Of each layer's output on the longest sequence: the difference of mean and rms (over the rms) or of the "
            "largest value (over itself), whichever is most. A wrong weight shows from its layer on.",
            draw_layers,
        ),
    ]


def _short(layer: int, num_layers: int) -> str:
    return {-1: "embed", num_layers: "norm"}.get(layer, str(layer))


def main() -> None:
    run_script(verify)


if __name__ == "__main__":
    main()
