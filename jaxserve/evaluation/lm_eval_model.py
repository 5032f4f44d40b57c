"""jaxserve as a model of the lm-evaluation-harness, under the name ``jaxserve``.

The harness finds models in a table of its own and asks no entry points for others, so that the name is known where
this module has been imported: then ``lm_eval.simple_evaluate("jaxserve", model_args="pretrained=demo", ...)`` works.
On the command line, ``python -m jaxserve.evaluation.lm_eval`` does that and goes on as ``lm_eval``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import lm_eval.models  # noqa: F401  # pyright: ignore[reportMissingImports]  # fills the table
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from jaxserve import LLM, SamplingParams
from jaxserve.evaluation.scorer import MAX_GEN_TOKS, Pair, Scorer, first_token, sampling_params

UNSAID = {"batch_size": (1, "1"), "device": ("cuda:0",)}
"""What the harness's command hands over where nobody said anything."""

log = logging.getLogger(__name__)


@register_model("jaxserve")
class JaxserveLM(TemplateLM):
    """An engine that the harness asks for likelihoods and texts. Requests of all tasks are batched by the engine."""

    def __init__(
        self,
        pretrained: str | LLM = "demo",
        *,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        """``pretrained`` is the model of ``LLM``, or one that is there already, and ``options`` are those of ``LLM``.

        add_bos_token: whether texts begin with it; None = as the tokenizer does. prefix_token_id: before texts
        without context; None = the tokenizer's token that begins texts, or ends them. The engine makes its own
        batches and has its own devices: other values than the harness's defaults raise ValueError.
        """
        super().__init__()
        _refuse_batches(batch_size, max_batch_size, device)
        if isinstance(pretrained, LLM) and options:
            raise ValueError(f"{next(iter(options))}: the engine that was handed over has its options already")
        self.llm = pretrained if isinstance(pretrained, LLM) else LLM(pretrained, **_named(options))
        self.tokenizer = self.llm.get_tokenizer()
        self.scorer = Scorer(self.llm)
        self.add_bos_token, self.max_gen_toks = add_bos_token, max_gen_toks
        self.num_cut = 0
        """Contexts that lost their beginning to fit into the model."""
        self._prefix = first_token(self.tokenizer, prefix_token_id)

    # -- what the harness asks about the model -------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together."""
        return self.scorer.longest + 1

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of the harness's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation. Without a prompt for an answer its last message is left open, to be continued."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """A text that begins with the first token already, as chat templates write it, does not get it again."""
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            if string.startswith(self.tokenizer.decode([self.prefix_token_id]) or "\0"):
                add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, verbose=False, **special))  # else it warns of long texts

    # -- what it asks of the model -------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        pairs = self._fitting([(context or [self.prefix_token_id], then) for _, context, then in requests])
        answers = []
        for (asked, _, _), answer in zip(requests, self.scorer.likelihoods(pairs), strict=True):
            answers.append(answer)
            self.cache_hook.add_partial("loglikelihood", asked, answer)
        return answers

    def _fitting(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Contexts that are too long lose their beginning, as in the harness's own models."""
        over = [max(0, len(context) + len(then) - self.scorer.longest) for context, then in pairs]
        self._note_cut(sum(map(bool, over)), len(pairs))
        return [(context[cut:], then) for (context, then), cut in zip(pairs, over, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts, in windows."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        scores = self.scorer.likelihoods([pair for pairs in windows for pair in pairs])
        totals = []
        for request, pairs in zip(requests, windows, strict=True):
            totals.append(sum(next(scores)[0] for _ in pairs))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _windows(self, text: str) -> Iterator[Pair]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.scorer.longest - 1,
            context_len=1,
        )
        return map(make_disjoint_window, windows)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string, which is not part of them."""
        params = [self._params(request.args[1]) for request in requests]
        contexts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        room = [self.max_length - (p.max_tokens or 0) for p in params]
        self._note_cut(sum(len(c) > r for c, r in zip(contexts, room, strict=True)), len(contexts))
        cut = [context[-r:] for context, r in zip(contexts, room, strict=True)]
        texts = []
        for request, text in zip(requests, self.scorer.texts(cut, params), strict=True):
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _note_cut(self, count: int, of: int) -> None:
        self.num_cut += count
        if count:
            log.warning("%d of %d contexts lost their beginning to fit into %d tokens", count, of, self.max_length)

    def _params(self, asked: dict[str, Any]) -> SamplingParams:
        params = sampling_params(asked, self.tokenizer.eos_token, self.max_gen_toks)
        if (params.max_tokens or 0) >= self.max_length:
            raise ValueError(
                f"{params.max_tokens} tokens of answer leave no room for a context: the model has {self.max_length} "
                "tokens for both (max_model_len); ask for fewer with max_gen_toks"
            )
        return params


def _refuse_batches(batch_size: int | str | None, max_batch_size: int | None, device: str | None) -> None:
    if batch_size not in (None, *UNSAID["batch_size"], "auto"):
        raise ValueError(f"batch_size={batch_size!r}: the engine batches by itself, up to max_num_seqs in model_args")
    if max_batch_size is not None:
        raise ValueError(f"max_batch_size={max_batch_size!r}: the engine batches by itself, up to max_num_seqs")
    if device not in (None, *UNSAID["device"]):
        raise ValueError(f"device={device!r}: jax chooses (JAX_PLATFORMS), and the mesh says how many")


def _named(options: dict[str, Any]) -> dict[str, Any]:
    """``max_length`` is what other models of the harness call it."""
    if "max_length" in options:
        options = options | {"max_model_len": options["max_length"]}
        del options["max_length"]
    return {"use_tqdm_on_load": False} | options
