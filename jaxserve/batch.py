"""The door between the halves: a step's integer arrays going down, its sampled tokens coming up.

All arrays of a batch are views of one int32 buffer [dp, words], so that a step costs one transfer; the device half
cuts the same buffer by the same layout. Floats travel as their bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxserve.logit_edits import edits_logits, has_penalties
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduled, SchedulerOutput

FLOAT_FIELDS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


@dataclass(frozen=True)
class BatchLayout:
    """Where each array lies in the buffer, for a step of T tokens and S sequences with tables of B blocks.

    Per token [T]: token_ids, positions, rope_lens (length of the sequence when the token was first computed),
    slot_mapping. Per sequence [S]: kv_lens, logits_indices (row of its last token), samples (1 if the step ends
    with its last token), slots (row of its device state), seed_high and seed_low, and the sampling parameters,
    temperature 0 meaning greedy. cu_q_lens [S+1], block_tables [S, B].
    """

    num_tokens: int
    num_seqs: int
    num_blocks: int
    one_token_each: bool = False
    """Every sequence has one token (T = S): the step of a batch that only decodes."""

    @cached_property
    def fields(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """name -> (first word, shape)."""
        t, s = (self.num_tokens,), (self.num_seqs,)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("token_ids", "positions", "rope_lens", "slot_mapping"), t)
        shapes |= {"cu_q_lens": (self.num_seqs + 1,), "block_tables": (self.num_seqs, self.num_blocks)}
        per_seq = ("kv_lens", "logits_indices", "samples", "slots", "seed_high", "seed_low", "top_k", *FLOAT_FIELDS)
        shapes |= dict.fromkeys(per_seq, s)
        starts, word = {}, 0
        for name, shape in shapes.items():
            starts[name] = (word, shape)
            word += math.prod(shape)
        return starts

    @cached_property
    def num_words(self) -> int:
        start, shape = list(self.fields.values())[-1]
        return start + math.prod(shape)


@dataclass(frozen=True)
class Features:
    """What any row of a batch asks of the sampler; what nobody asks for is not computed."""

    sampling: bool = False
    """A temperature above 0."""
    truncation: bool = False
    """top_k, top_p or min_p."""
    penalties: bool = False
    logit_bias: bool = False
    """A row of its own to add to the logits: logit_bias, allowed_token_ids, bad_words, min_tokens."""

    @classmethod
    def of(cls, params: SamplingParams) -> Features:
        sampling = params.temperature > 0
        return cls(
            sampling=sampling,
            truncation=sampling and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0),
            penalties=has_penalties(params),
            logit_bias=edits_logits(params),
        )

    def as_array(self) -> np.ndarray:
        """int32 [4], in the order of the fields."""
        return np.array([self.sampling, self.truncation, self.penalties, self.logit_bias], np.int32)


@dataclass(frozen=True)
class Batch:
    """One step's work, padded to ``layout``; ``buffer`` is int32 [dp, words]."""

    layout: BatchLayout
    buffer: np.ndarray
    features: Features

    def array(self, name: str) -> np.ndarray:
        """A view [dp, *shape] of one array."""
        return view(self.buffer, self.layout, name)


@dataclass(frozen=True)
class StepOutput:
    """What a step hands up: token_ids int32 [dp, S], one per scheduled sequence (garbage where none was sampled)."""

    token_ids: np.ndarray


def view(buffer: np.ndarray, layout: BatchLayout, name: str) -> np.ndarray:
    start, shape = layout.fields[name]
    words = buffer[:, start : start + math.prod(shape)].reshape(buffer.shape[0], *shape)
    return words.view(np.float32) if name in FLOAT_FIELDS else words


def build_batch(output: SchedulerOutput, layout: BatchLayout, block_size: int) -> Batch:
    """Lay a schedule out as arrays. Rows keep the scheduler's order; padding is zero (block 0, no tokens)."""
    buffer = np.zeros((len(output.replicas), layout.num_words), np.int32)
    features = [Features.of(s.request.params) for rows in output.replicas for s in rows]
    for replica, rows in enumerate(output.replicas):
        arrays = {name: view(buffer[replica : replica + 1], layout, name)[0] for name in layout.fields}
        _fill(arrays, rows, block_size)
    merged = np.any([f.as_array() for f in features], axis=0) if features else np.zeros(4, bool)
    return Batch(layout, buffer, Features(*map(bool, merged)))


def _fill(arrays: dict[str, np.ndarray], rows: list[Scheduled], block_size: int) -> None:
    at = 0
    arrays["repetition_penalty"][:] = 1.0
    for row, scheduled in enumerate(rows):
        start, count = scheduled.start, scheduled.count
        _fill_tokens({k: v[at : at + count] for k, v in arrays.items() if k in TOKEN_FIELDS}, scheduled, block_size)
        at += count
        arrays["block_tables"][row, : len(scheduled.blocks)] = scheduled.blocks
        arrays["cu_q_lens"][row + 1] = at
        arrays["kv_lens"][row] = start + count
        arrays["logits_indices"][row] = at - 1
        arrays["samples"][row] = scheduled.samples
        arrays["slots"][row] = scheduled.slot
        _fill_sampling(arrays, row, scheduled)
    arrays["cu_q_lens"][len(rows) + 1 :] = at


TOKEN_FIELDS = frozenset(("token_ids", "positions", "rope_lens", "slot_mapping"))


def _fill_tokens(arrays: dict[str, np.ndarray], scheduled: Scheduled, block_size: int) -> None:
    """The tokens of one sequence; the arrays are cut to its rows."""
    request, start, count = scheduled.request, scheduled.start, scheduled.count
    prompt = request.num_prompt_tokens
    if count == 1:  # most rows of most steps: no arrays for one number
        arrays["token_ids"][0] = request.tokens(start, start + 1)[0]
        arrays["positions"][0] = start
        arrays["rope_lens"][0] = max(start + 1, prompt)
        arrays["slot_mapping"][0] = scheduled.blocks[start // block_size] * block_size + start % block_size
        return
    positions = np.arange(start, start + count, dtype=np.int32)
    arrays["token_ids"][:] = request.tokens(start, start + count)
    arrays["positions"][:] = positions
    arrays["rope_lens"][:] = np.maximum(positions + 1, prompt)
    blocks = np.asarray(scheduled.blocks, np.int32)
    arrays["slot_mapping"][:] = blocks[positions // block_size] * block_size + positions % block_size


def _fill_sampling(arrays: dict[str, np.ndarray], row: int, scheduled: Scheduled) -> None:
    params, seed = scheduled.request.params, scheduled.request.seed
    for name in FLOAT_FIELDS:
        arrays[name][row] = getattr(params, name)
    arrays["top_k"][row] = max(params.top_k, 0)
    arrays["seed_high"][row] = np.uint32(seed >> 32 & 0xFFFFFFFF).view(np.int32)
    arrays["seed_low"][row] = np.uint32(seed & 0xFFFFFFFF).view(np.int32)
