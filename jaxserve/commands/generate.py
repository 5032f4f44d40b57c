"""``jaxserve generate``: complete prompts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.cli.command import epilog, read_text
from jaxserve.cli.options import EngineFlags, Json, SamplingFlags
from jaxserve.cli.output import count_text, print_json, seconds_text, watched

if TYPE_CHECKING:
    from jaxserve.outputs import CompletionOutput, Logprob, RequestOutput


@epilog(
    'jaxserve generate "Once upon a time" --max-tokens 100',
    'jaxserve generate --model path/to/checkpoint -tp 2 "The capital of France is" --temperature 0',
    "jaxserve generate --prompts-file prompts.jsonl --json > answers.json",
    "cat prompts.txt | jaxserve generate -n 2 --seed 7",
)
def generate(
    sampling: SamplingFlags,
    engine: EngineFlags,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Texts to continue. None: --prompts-file, or lines of stdin.")
    ] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(help='One prompt per line, or JSONL with "prompt" or "prompt_token_ids"; - = stdin.'),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Completions per prompt.")] = 1,
    logprobs: Annotated[int | None, typer.Option(help="Report log-probabilities of this many likely tokens.")] = None,
    prompt_logprobs: Annotated[int | None, typer.Option(help="The same for the tokens of the prompt.")] = None,
    as_json: Json = False,
) -> None:
    """Complete prompts: from arguments, a file, or stdin."""
    wanted = [] if engine.follows else read_prompts(prompts or [], prompts_file)
    if engine.skip_tokenizer_init and any(isinstance(p, str) or "prompt" in p for p in wanted):
        raise ValueError('--skip-tokenizer-init: prompts are token ids then, given as JSONL {"prompt_token_ids": [1]}')
    likely = {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
    params = sampling.sampling_params(n=n, **likely, detokenize=not engine.skip_tokenizer_init)
    from jaxserve.llm import LLM

    llm = LLM(**engine.engine_options(), use_tqdm_on_load=watched())
    start = time.perf_counter()
    outputs = llm.generate(wanted, params, use_tqdm=watched())
    seconds = time.perf_counter() - start
    if as_json:
        print_json(outputs)
    else:
        for i, output in enumerate(outputs):
            _print_output(output, f"{i + 1}/{len(outputs)}", as_text=params.detokenize)
    typer.echo(summary(outputs, seconds), err=True)


def read_prompts(arguments: Sequence[str], file: str | None) -> list[Any]:
    """The prompts of one source; ValueError if there is none, or two."""
    if arguments and file is not None:
        raise ValueError("prompts are given as arguments and in --prompts-file: use one of them")
    if arguments:
        return list(arguments)
    if file is None and sys.stdin.isatty():
        raise ValueError("no prompt: give one as an argument, in --prompts-file, or on stdin")
    file = None if file == "-" else file
    name, text = file or "stdin", read_text(file)
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{name}: no prompts")
    is_jsonl = name.endswith(".jsonl") or lines[0][1].lstrip().startswith('{"')
    return [_json_prompt(f"{name}, line {number}", line) if is_jsonl else line for number, line in lines]


def _json_prompt(where: str, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict) or not {"prompt", "prompt_token_ids"} & set(value):
        raise ValueError(f'{where}: {line.strip()[:60]!r} is no object with "prompt" or "prompt_token_ids"')
    return value


def summary(outputs: Sequence[RequestOutput], seconds: float) -> str:
    """2 requests, 12 prompt tokens (40 tok/s), 128 output tokens (430 tok/s), 0.30 s."""
    read = sum(len(o.prompt_token_ids) for o in outputs)
    written = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    requests = f"{len(outputs)} request" + "s" * (len(outputs) != 1)
    return (
        f"{requests}, {read} prompt tokens ({count_text(read / seconds)} tok/s), "
        f"{written} output tokens ({count_text(written / seconds)} tok/s), {seconds_text(seconds)}"
    )


def _print_output(output: RequestOutput, number: str, as_text: bool) -> None:
    """The prompt, dimmed, and under it each completion with how it ended."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"━━ prompt {number}", style="bold"))
    console.print(Text(str(output.prompt_token_ids) if output.prompt is None else output.prompt, style="dim"))
    for token, entry in zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False):
        if entry is not None:  # the first token follows nothing
            console.print(Text("   " + _logprob_line(token, entry), style="dim"))
    for completion in output.outputs:
        which = f" {completion.index + 1}/{len(output.outputs)}" if len(output.outputs) > 1 else ""
        ending = f" ({_ending(completion)}, {len(completion.token_ids)} tokens)"
        console.print(Text.assemble((f"━━ completion{which}", "bold green"), (ending, "dim")))
        console.print(Text(completion.text if as_text else str(completion.token_ids)))
        for position, entry in zip(completion.token_ids, completion.logprobs or [], strict=False):
            console.print(Text("   " + _logprob_line(position, entry), style="dim"))
    console.print()


def _ending(completion: CompletionOutput) -> str:
    reason = completion.finish_reason or "abort"
    return reason if completion.stop_reason is None else f"{reason}: {completion.stop_reason!r}"


def _logprob_line(token_id: int, entry: dict[int, Logprob]) -> str:
    def show(token: int, logprob: Logprob) -> str:
        return f"{token if logprob.decoded_token is None else repr(logprob.decoded_token)} {logprob.logprob:.3f}"

    chosen = entry[token_id]
    others = sorted((e for e in entry.items() if e[1].rank <= len(entry)), key=lambda e: e[1].rank)
    likely = ", ".join(show(token, logprob) for token, logprob in others if token != token_id)
    return f"{show(token_id, chosen)}  rank {chosen.rank}" + (f"  | {likely}" if likely else "")
