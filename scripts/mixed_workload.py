"""What does a long prompt do to those who decode beside it, and what does chunked prefill do about that?

Short requests decode while long prompts come in between. A step takes as long as all that is in it: with whole prompts
in one step, nobody gets a token until the long one is through (head-of-line blocking). Chunked prefill cuts prompts, so
that no step holds more than its token budget. The same arrivals run under each setting, with one set of compiled
programs. What must hold is counted, not timed: tokens of each step, and prompt tokens between two tokens of a short
request.

    python scripts/mixed_workload.py --out report
    python scripts/mixed_workload.py --setting whole --setting chunked:512 --setting chunked:32 --long-prompt 900
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import typer
from bench_workload import Machine

from jaxserve.cli.command import epilog, run_script
from jaxserve.cli.options import EngineFlags
from jaxserve.cli.output import seconds_text
from jaxserve.config import SchedulerConfig
from jaxserve.evaluation.clients import Answer, Call, Load
from jaxserve.evaluation.command import begin, engine_options, finish
from jaxserve.evaluation.engines import mesh_of, open_llm, reserve_devices
from jaxserve.evaluation.flags import PredictionFlags, ReportFlags
from jaxserve.evaluation.lanes import draw_lanes, lanes_key
from jaxserve.evaluation.latencies import draw_latencies, latencies, latency_figures
from jaxserve.evaluation.mixed_load import (
    CLASSES,
    LONG,
    SHORT,
    SHORT_ALONE,
    STALL,
    Measured,
    Mix,
    Setting,
    measure,
    room_for,
)
from jaxserve.evaluation.plots import Plot, Theme
from jaxserve.evaluation.predictions import HOW, Forecast
from jaxserve.evaluation.result import Check, Figure, Result, Table
from jaxserve.evaluation.same_tokens import token_check
from jaxserve.evaluation.statistics import statistic
from sharding.cost_model import Step

QUESTION = "What does a long prompt do to those who decode beside it, and what does chunked prefill do about that?"
COUNTED = "counted from the scheduler's decisions, of the replica that computes most"
WORST = ("median", "max")
"""Of each request's worst gap."""
SETTINGS = ("whole", "chunked:256", "chunked:64", "chunked:128/64")


@dataclass(frozen=True, kw_only=True)
class WorkloadFlags:
    """Who asks for what."""

    shorts: Annotated[int, typer.Option(min=1, help="Short requests of each run.")] = 16
    short_prompt: Annotated[int, typer.Option(min=1, help="Tokens.")] = 16
    short_answer: Annotated[int, typer.Option(min=2, help="Tokens.")] = 64
    longs: Annotated[int, typer.Option(min=1, help="Long requests of each run.")] = 4
    long_prompt: Annotated[int, typer.Option(min=1, help="Tokens.")] = 768
    long_answer: Annotated[int, typer.Option(min=1, help="Tokens.")] = 8

    def mix(self) -> Mix:
        return Mix(**asdict(self))


@epilog(
    "python scripts/mixed_workload.py",
    "python scripts/mixed_workload.py --setting whole --setting chunked:512 --setting chunked:32 -tp 2",
    "python scripts/mixed_workload.py --setting chunked:2048 --long-prompt 8000 --most-slowdown 5 -m DIR",
)
def mixed_workload(
    engine: EngineFlags,
    workload: WorkloadFlags,
    predictions: PredictionFlags,
    report: ReportFlags,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="whole (chunked prefill off), chunked:TOKENS of one step, or chunked:TOKENS/PROMPT with at most so "
            f"many of one prompt while others decode. May be repeated; none = {', '.join(SETTINGS)}.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each setting, each with other arrivals.")] = 5,
    most_slowdown: Annotated[
        float | None,
        typer.Option(
            help="Fails a chunked setting whose p99 between tokens of short requests is more than so many times what "
            "they have alone; none = not judged."
        ),
    ] = None,
) -> None:
    """Short requests beside long prompts, with whole prompts in a step and with chunks of several budgets.

    Exit code 1 if a setting changes tokens, a step holds more than its budget, or a whole prompt is split.
    """
    _refuse_what_settings_say(engine)
    mix = workload.mix()
    options = engine_options(engine, max_num_seqs=16, max_model_len=mix.longest) | {"skip_tokenizer_init": True}
    settings = _settings(setting or SETTINGS, options, mix)
    options |= room_for(settings)
    mesh = mesh_of(options)
    reserve_devices(mesh.num_devices)
    asked = asdict(workload) | {"setting": ", ".join(s.name for s in settings), "repeats": repeats}
    result = begin("mixed_workload", QUESTION, options | asked, engine.seed, mesh.sizes)
    llm, machine = open_llm(options).llm, Machine()
    calls = mix.calls(llm.engine.runner.decoder.vocab_size, engine.seed)
    found = measure(llm, calls, settings, repeats, engine.seed)
    _fill(result, found, most_slowdown)
    _predict(result, found, options, predictions.gpu)
    result.samples = {
        "other_cores": machine.other_cores(),
        "differences": [asdict(d) for d in found.differences],
        SHORT_ALONE: [load.to_json() for load in found.alone],
        "runs": {s.name: [r.load.to_json() | r.timeline.to_json() for r in runs] for s, runs in found.runs.items()},
    }
    finish(result, _plots(found, result), report)


def _refuse_what_settings_say(engine: EngineFlags) -> None:
    for name in ("max_num_batched_tokens", "no_enable_chunked_prefill", "long_prefill_token_threshold"):
        if getattr(engine, name):
            raise ValueError(f"--{name.replace('_', '-')}: say it with --setting, of which there may be several")
    if engine.record is not None:
        raise ValueError("--record: each setting has a scheduler of its own; result.json has what they decided")


def _settings(texts: Sequence[str], options: dict[str, Any], mix: Mix) -> list[Setting]:
    """ValueError for what no scheduler takes, before anything is loaded."""
    length, seqs = options["max_model_len"], options["max_num_seqs"]
    if mix.longest > length:
        raise ValueError(f"requests are up to {mix.longest} tokens, the longest sequence is {length}")
    settings = [Setting.parse(text, length + seqs) for text in dict.fromkeys(texts)]
    for setting in settings:
        SchedulerConfig(
            max_model_len=length,
            max_num_seqs=seqs,
            block_size=options["block_size"],
            num_blocks=2,
            policy=options["scheduling_policy"],
            **setting.limits,
        )
    return settings


# -- figures -----------------------------------------------------------------------------------------------------------


def _throughput(setting: str) -> str:
    return f"{setting}: throughput"


def _gap_name(name: str) -> str:
    return f"{name}: between tokens, p99"


def _fill(result: Result, found: Measured, most_slowdown: float | None) -> None:
    compared = len(found.alone_answers) + sum(len(runs) * len(found.calls) for runs in found.runs.values())
    result.checks.append(token_check(found.differences, compared, _throughput("{load}")))
    bounds = {setting: _bounds(found, setting) for setting in found.runs}
    for setting, of in bounds.items():
        result.figures += [*_timed_figures(found, setting, result.simulated), *(bound.figure for bound in of)]
        result.checks += [bound.check for bound in of if bound.most is not None]
        if most_slowdown is not None and setting.chunked:
            result.checks.append(_slowdown_check(found, setting, most_slowdown))
    alone, shorts = found.alone_answers, [found.calls[i] for i in found.of(SHORT)]
    result.figures.append(_rate_figure(SHORT_ALONE, found.alone, shorts, result.simulated))
    result.figures += latency_figures(SHORT_ALONE, alone, ("median", "p99"), len(found.alone), result.simulated)
    result.tables += [_short_table(found), _long_table(found), _step_table(found, bounds)]


def _rate_figure(name: str, loads: Sequence[Load], calls: Sequence[Call], simulated: bool) -> Figure:
    total = sum(len(call.prompt) + call.num_tokens for call in calls)
    how = f"prompt and output tokens from the first call to the last token; median of {len(loads)} runs"
    rate = [[total / load.seconds] for load in loads]
    return Figure.of(_throughput(name), rate, "median", "tok/s", how, better="higher", simulated=simulated)


def _timed_figures(found: Measured, setting: Setting, simulated: bool) -> list[Figure]:
    runs = found.runs[setting]
    figures = [_rate_figure(setting.name, [run.load for run in runs], found.calls, simulated)]
    for size in CLASSES:
        answers = found.answers(setting, size)
        figures += latency_figures(f"{setting.name}, {size}", answers, ("median", "p99"), len(runs), simulated)
    if worst := found.worst_gaps(setting):
        how = f"of {len(worst)} short requests, each one's longest gap between tokens while a long prompt was computed"
        figures += [
            Figure.of(
                f"{setting.name}, {SHORT}: worst gap beside a long prompt, {of}",
                worst,
                of,
                "s",
                how,
                better="lower",
                simulated=simulated,
            )
            for of in WORST
        ]
    return figures


@dataclass(frozen=True)
class Bound:
    """Something that is counted, and how much of it there may be."""

    figure: Figure
    what: str
    most: int | None
    """None where nothing is promised."""

    @property
    def is_broken(self) -> bool:
        return self.most is not None and self.figure.value > self.most

    @property
    def check(self) -> Check:
        detail = f"seen: {self.figure.value:.0f}, allowed: {self.most}"
        return Check(self.what, not self.is_broken, detail, (self.figure.name,))


def _bounds(found: Measured, setting: Setting) -> list[Bound]:
    """The fullest step, prompt tokens between two tokens, and what else the setting says."""
    name, budget = setting.name, setting.budget
    bounds = [Bound(_fullest(found, setting), f"{name}: no step computes more than {budget} tokens", budget)]
    what = f"{name}: short requests wait for at most {budget} prompt tokens from one token to the next"
    bounds.append(Bound(_between(found, setting), what, budget if found.every_step else None))
    if setting.threshold:
        what = f"{name}: no step computes more than {setting.threshold} tokens of a prompt while others decode"
        bounds.append(Bound(_largest_piece(found, setting), what, setting.threshold))
    if not setting.chunked:
        how = f"counted from the scheduler's decisions; {len(found.runs[setting]) * len(found.calls)} prompts"
        figure = Figure(f"{name}: prompts split over steps", found.splits(setting), "", how)
        bounds.append(Bound(figure, f"{name}: no prompt is split over steps", 0))
    return bounds


def _fullest(found: Measured, setting: Setting) -> Figure:
    steps = [[float(step.num_tokens) for step in run.timeline.steps] for run in found.runs[setting]]
    how = f"{COUNTED}; {sum(map(len, steps))} steps"
    return Figure.of(f"{setting.name}: tokens of the fullest step", steps, "max", "tokens", how)


def _largest_piece(found: Measured, setting: Setting) -> Figure:
    steps = [[float(step.largest_piece) for step in run.timeline.steps] for run in found.runs[setting]]
    how = "counted from the scheduler's decisions: the largest piece of a prompt in a step in which others decode"
    return Figure.of(f"{setting.name}: most tokens of a prompt beside decodes", steps, "max", "tokens", how)


def _between(found: Measured, setting: Setting) -> Figure:
    gaps = [[float(gap.prompt_tokens) for gap in gaps if not gap.preempted] for gaps in found.gaps(setting)]
    left_out = sum(gap.preempted for gaps in found.gaps(setting) for gap in gaps)
    how = f"the most of others' prompts, {COUNTED}"
    how += f"; {left_out} gaps in which it was preempted are left out" if left_out else ""
    name = f"{setting.name}: prompt tokens between two tokens of a short request"
    return Figure.of(name, [of for of in gaps if of], "max", "tokens", how, better="lower")


def _slowdown_check(found: Measured, setting: Setting, most: float) -> Check:
    """Timed, so only where asked for."""
    p99, alone = (
        statistic("p99", latencies(answers)["between tokens"])
        for answers in (found.answers(setting, SHORT), found.alone_answers)
    )
    what = f"{setting.name}: p99 between tokens of short requests is at most {most:g} times that alone"
    detail = f"{seconds_text(p99)}, {p99 / alone:.3g} times {seconds_text(alone)}"
    return Check(what, p99 <= most * alone, detail, (_gap_name(f"{setting.name}, {SHORT}"),))


def _spread(answers: Sequence[Answer], kind: str) -> str:
    groups = latencies(answers)[kind]
    return " / ".join(seconds_text(statistic(of, groups)) for of in ("median", "p99")) if groups else ""


def _short_table(found: Measured) -> Table:
    kinds = ("first token", "between tokens", "whole answer")
    rows = [(SHORT_ALONE, *(_spread(found.alone_answers, kind) for kind in kinds), "")]
    for setting in found.runs:
        worst = found.worst_gaps(setting)
        seen = [_spread(found.answers(setting, SHORT), kind) for kind in kinds]
        rows.append((setting.name, *seen, " / ".join(seconds_text(statistic(of, worst)) for of in WORST if worst)))
    header = ("setting", *(f"{kind} p50 / p99" for kind in kinds), "worst gap beside a long prompt p50 / max")
    return Table("Short requests", header, rows)


def _long_table(found: Measured) -> Table:
    kinds = ("first token", "whole answer")
    rows = [(s.name, *(_spread(found.answers(s, LONG), kind) for kind in kinds)) for s in found.runs]
    return Table("Long requests", ("setting", *(f"{kind} p50 / p99" for kind in kinds)), rows)


def _step_table(found: Measured, bounds: Mapping[Setting, Sequence[Bound]]) -> Table:
    rows = []
    for setting, runs in found.runs.items():
        fullest, between = (f"{bound.figure.value:.0f}" for bound in bounds[setting][:2])
        steps = float(np.median([len(run.timeline.steps) for run in runs]))
        rows.append((setting.name, str(setting.budget), fullest, between, f"{steps:.0f}"))
    header = ("setting", "budget", "fullest step", "prompt tokens between two tokens, at most", "steps of a run")
    bad = [i for i, of in enumerate(bounds.values()) if any(bound.is_broken for bound in of)]
    return Table("Tokens of steps", header, rows, bad)


# -- predictions -------------------------------------------------------------------------------------------------------


def _predict(result: Result, found: Measured, options: dict[str, Any], gpu: str) -> None:
    """What a token costs on a GPU beside the largest piece of a long prompt that a step may hold: with pipeline
    stages, of one of them."""
    title = f"Predicted for {gpu.upper()}: a token of a short request"
    header = ("setting", "beside nobody's prompt", "beside a long one", "times")
    try:
        forecast = Forecast.of(options, gpu)
    except ValueError as error:
        result.tables.append(Table(title, header, [(f"none: {error}", "", "", "")]))
        return
    short, long = found.calls[0], found.calls[-1]
    decoding = min(-(-len(found.of(SHORT)) // forecast.mesh.dp), options["max_num_seqs"])
    decode = Step.decode(decoding, len(short.prompt) + short.num_tokens // 2)
    usual, rows = forecast.step(decode).seconds, []
    for setting in found.runs:
        chunk = max(1, min(len(long.prompt), setting.budget - decoding, setting.threshold or setting.budget))
        stalled = forecast.step(decode + Step.prefill(chunk, len(long.prompt) - chunk)).seconds
        rows.append((setting.name, seconds_text(usual), seconds_text(stalled), f"{stalled / usual:.1f}"))
        how = f"{HOW}: a step of {decoding} requests that decode and the last {chunk} tokens of a long prompt"
        name = f"{setting.name}: predicted for {forecast.name}: between tokens beside a long prompt"
        result.figures.append(Figure(name, stalled, "s", how))
    how = f"{HOW}: a step of {decoding} requests that decode, and no prompt"
    result.figures.append(Figure(f"predicted for {forecast.name}: between tokens", usual, "s", how))
    result.tables.append(Table(title, header, rows))


# -- plots -------------------------------------------------------------------------------------------------------------


def _plots(found: Measured, result: Result) -> list[Plot]:
    simulated = " (simulated)" if result.simulated else ""
    ranked = sorted(found.runs, key=lambda s: (s.chunked, -s.budget))
    shown = ranked if len(ranked) == 1 else [ranked[0], ranked[-1]]

    def draw_timeline(axes: Sequence[Any], theme: Theme) -> None:
        lanes = [found.lanes(found.runs[setting][0]) for setting in shown]
        end = max(lane.tokens[-1] for of in lanes for lane in of)
        for panel, setting, of in zip(axes, shown, lanes, strict=True):
            draw_lanes(panel, theme, of)
            panel.set(xlim=(0, 1e3 * end * 1.01))
            panel.set_title(f"{setting.name}: at most {setting.budget} tokens in a step")
        lanes_key(axes[0].figure, theme, CLASSES)

    def draw_of(size: str) -> Callable[[Sequence[Any], Theme], None]:
        def draw(axes: Sequence[Any], theme: Theme) -> None:
            answers = {setting.name: found.answers(setting, size) for setting in found.runs}
            draw_latencies(axes, theme, answers | ({SHORT_ALONE: found.alone_answers} if size == SHORT else {}))
            if size == SHORT:
                _show_slowest(axes[1])

        return draw

    caption = (
        "The first run of two settings, the same arrivals. A lane is a request: it waits (thin line), its prompt is "
        "computed (box, one for each step), then each tick is a token. A gap between tokens is a stall if it is over "
        f"{STALL:g} times the usual ({seconds_text(found.typical)}, short requests alone) while somebody's prompt is "
        "computed: everybody who decodes waits for the same step."
    )
    curves = "Share of the {} requests (or gaps between their tokens) that took at most so long, as the clients saw it."
    return [
        Plot("timeline", "Who waits for whom" + simulated, caption, draw_timeline, len(shown), len(found.calls)),
        *(
            Plot(size, f"Latency of {size} requests{simulated}", curves.format(size), draw_of(size), panels=3)
            for size in CLASSES
        ),
    ]


def _show_slowest(axes: Any) -> None:
    """Of curves, the part where stalls are: most gaps are short under any setting."""
    left = min(float(line.get_xdata()[int(0.9 * len(line.get_xdata()))]) for line in axes.lines)
    right = max(float(line.get_xdata()[-1]) for line in axes.lines)
    axes.set(ylim=(0.9, 1.002), xlim=(left / 1.2, right * 1.2))
    axes.set_title("between tokens: the slowest tenth")
    axes.get_legend().remove()


def main() -> None:
    run_script(mixed_workload)


if __name__ == "__main__":
    main()
