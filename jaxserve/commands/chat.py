"""``jaxserve chat``: a conversation, streamed."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.cli.command import epilog, no_text, read_text
from jaxserve.cli.options import EngineFlags, Json, SamplingFlags
from jaxserve.cli.output import print_json, watched

if TYPE_CHECKING:
    from jaxserve.llm import LLM
    from jaxserve.outputs import CompletionOutput

HELP = """/reset          forget the conversation
/system [TEXT]  set or clear the system message, and forget the conversation
/exit           leave (or Ctrl-D)
Ctrl-C          stop the answer"""
LONG_ANSWERS = SamplingFlags(max_tokens=512)


@epilog(
    "jaxserve chat",
    'jaxserve chat --model path/to/checkpoint --system "Answer in one sentence." --temperature 0.7',
    "echo 'What is 2 + 2?' | jaxserve chat --temperature 0",
)
def chat(
    engine: EngineFlags,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja file to use instead of the checkpoint's chat template.")
    ] = None,
    as_json: Json = False,
    sampling: SamplingFlags = LONG_ANSWERS,
) -> None:
    """Talk to a model. Piped input is answered line by line, in one conversation.

    In the conversation: /reset, /system TEXT, /help, /exit. Ctrl-C stops an answer, Ctrl-D leaves.
    """
    params = sampling.sampling_params()
    template = None if chat_template is None else read_text(chat_template)
    from jaxserve.llm import LLM
    from jaxserve.sampling_params import RequestOutputKind

    llm = LLM(**engine.engine_options(), use_tqdm_on_load=watched())
    params = sampling.sampling_params(output_kind=RequestOutputKind.DELTA)
    conversation = Conversation(llm, params, template, system)
    conversation.check_template()
    if sys.stdin.isatty() and not as_json:
        _talk(conversation)
    else:
        _answer_lines(conversation, as_json)


@dataclass
class Conversation:
    """The messages so far, and how to get the next one."""

    llm: LLM
    params: Any
    template: str | None = None
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    forgotten: int = 0
    """Messages that were dropped from the beginning, because the context was full."""

    def reset(self) -> None:
        self.turns.clear()
        self.forgotten = 0

    def check_template(self) -> None:
        """Raise ValueError now, rather than at the first question, if there is no usable chat template."""
        self._prompt([{"role": "user", "content": "?"}])

    def ask(self, text: str) -> Generator[CompletionOutput]:
        """Pieces of the answer as they come. What was said until then is kept, however the loop ends."""
        asked = [*self.turns, {"role": "user", "content": text}]
        prompt, num_dropped = self._fitting_prompt(asked)
        answer: list[str] = []
        pieces = self.llm.stream([{"prompt_token_ids": prompt}], self.params)
        try:
            for output in pieces:
                for piece in output.outputs:
                    answer.append(piece.text)
                    yield piece
        finally:
            pieces.close()  # aborts what is unfinished
            if answer:
                self.turns = [*asked[num_dropped:], {"role": "assistant", "content": "".join(answer)}]
                self.forgotten += num_dropped

    def _fitting_prompt(self, messages: list[dict[str, str]]) -> tuple[list[int], int]:
        """The prompt of ``messages`` without as many of the oldest as it takes to leave room for an answer, and how
        many these are."""
        limit = self.llm.engine.scheduler.config.max_model_len
        room = min(self.params.max_tokens, limit // 4)
        num_dropped = 0
        while len(prompt := self._prompt(messages[num_dropped:])) + room > limit and len(messages) > num_dropped + 2:
            num_dropped += 2
        return prompt, num_dropped

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.llm.chat_prompts(system + messages, chat_template=self.template)[0]


def _answer_lines(conversation: Conversation, as_json: bool) -> None:
    """Every line of stdin is a question; answers go to stdout, one after the other."""
    for line in filter(None, map(str.strip, _lines_of_stdin())):
        if line.startswith("/"):
            if _obey(line, conversation):
                return
            continue
        pieces = []
        for piece in conversation.ask(line):
            pieces.append(piece)
            if not as_json:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
        if as_json:
            print_json(
                {
                    "role": "assistant",
                    "content": conversation.turns[-1]["content"],
                    "num_tokens": sum(len(p.token_ids) for p in pieces),
                    "finish_reason": pieces[-1].finish_reason,
                }
            )
        else:
            print(flush=True)


def _lines_of_stdin() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise no_text("stdin", error) from None


def _talk(conversation: Conversation) -> None:
    """The loop at a terminal."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() a history and line editing
    typer.secho("/help shows commands, Ctrl-D leaves", dim=True)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            typer.secho("\n(Ctrl-D or /exit leaves)", dim=True)
            continue
        if line.startswith("/"):
            if _obey(line, conversation):
                return
        elif line:
            _stream(conversation, line)


def _stream(conversation: Conversation, text: str) -> None:
    """Print an answer as it comes; Ctrl-C ends it, a question that does not fit gets an error line."""
    before = conversation.forgotten
    answer = conversation.ask(text)
    try:
        for piece in answer:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
            if piece.finish_reason == "length":
                typer.secho(" … (length limit)", dim=True, nl=False)
    except KeyboardInterrupt:
        typer.secho(" … (stopped)", dim=True, nl=False)
    except ValueError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
    finally:
        answer.close()
    print()
    if conversation.forgotten > before:
        typer.secho(f"(the context is full: {conversation.forgotten - before} old messages forgotten)", dim=True)


def _obey(line: str, conversation: Conversation) -> bool:
    """Carry out a /command; True if it ends the conversation."""
    command, _, rest = line.partition(" ")
    if command in ("/exit", "/quit"):
        return True
    if command == "/reset":
        conversation.reset()
        _note("(conversation forgotten)")
    elif command == "/system":
        conversation.system = rest.strip() or None
        conversation.reset()
        _note("(system message set)" if conversation.system else "(no system message)")
    else:
        _note(HELP if command == "/help" else f"unknown command {command}\n{HELP}")
    return False


def _note(text: str) -> None:
    """A word from the program, not from the model: on stderr, so that answers can be piped."""
    typer.secho(text, dim=True, err=True)
