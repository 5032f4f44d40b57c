"""The door between the halves: a step's integer arrays going down, its sampled tokens coming up.

All arrays of a batch are views of one int32 buffer [dp, words], so that a step costs one transfer; the device half
cuts the same buffer by the same layout. Floats travel as their bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxserve.config import SchedulerConfig
from jaxserve.logit_edits import edits_logits, has_penalties
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduled, SchedulerOutput

FLOAT_FIELDS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
SAMPLING_FIELDS = ("seed_high", "seed_low", "top_k", *FLOAT_FIELDS)
"""Of a sequence, the same in every step."""


@dataclass(frozen=True)
class BatchLayout:
    """Where each array lies in the buffer, for a step of T tokens and S sequences with tables of B blocks in each of
    G groups of layers.

    Per token [T]: token_ids (-1 - slot: the token that was sampled last in that slot, which only the device knows),
    positions, rope_lens (length of the sequence when the token was first computed); slot_mapping [G, T].
    Per sequence [S]: kv_lens, logits_indices (row of its last token), samples (how many tokens the step samples for
    it), slots (row of its device state), and the sampling parameters, temperature 0 meaning greedy. cu_q_lens [S+1],
    block_tables [G, S, B].
    """

    num_tokens: int
    num_seqs: int
    num_blocks: int
    one_token_each: bool = False
    """Every sequence has one token (T = S): the step of a batch that only decodes."""
    num_groups: int = 1
    num_steps: int = 1
    """Decode steps in one."""

    @cached_property
    def fields(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """name -> (first word, shape)."""
        t, s, g = (self.num_tokens,), (self.num_seqs,), self.num_groups
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("token_ids", "positions", "rope_lens"), t)
        shapes |= {"slot_mapping": (g, *t), "cu_q_lens": (self.num_seqs + 1,), "block_tables": (g, *s, self.num_blocks)}
        shapes |= dict.fromkeys(("kv_lens", "logits_indices", "samples", "slots", *SAMPLING_FIELDS), s)
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

    def emptied(self) -> Batch:
        """The same layout with nothing in it."""
        return Batch(self.layout, np.zeros_like(self.buffer), Features())


@dataclass(frozen=True)
class StepOutput:
    """What a step hands up: token_ids int32 [dp, num_steps, S], of each scheduled sequence the tokens sampled one
    after the other (garbage where none was)."""

    token_ids: np.ndarray

    def rows(self, output: SchedulerOutput) -> list[list[list[int]]]:
        """The tokens of each replica's rows."""
        return [self.token_ids[i, :, : len(rows)].T.tolist() for i, rows in enumerate(output.replicas)]


def view(buffer: np.ndarray, layout: BatchLayout, name: str) -> np.ndarray:
    start, shape = layout.fields[name]
    words = buffer[:, start : start + math.prod(shape)].reshape(buffer.shape[0], *shape)
    return words.view(np.float32) if name in FLOAT_FIELDS else words


def relaid(batch: Batch, layout: BatchLayout) -> Batch:
    """The same work in another layout that has room for it."""
    if batch.layout == layout:
        return batch
    buffer = np.zeros((batch.buffer.shape[0], layout.num_words), np.int32)
    view(buffer, layout, "repetition_penalty")[:] = 1.0
    for name in layout.fields:
        old, new = batch.array(name), view(buffer, layout, name)
        common = tuple(slice(min(a, b)) for a, b in zip(old.shape, new.shape, strict=True))
        new[common] = old[common]
    ends, known = view(buffer, layout, "cu_q_lens"), min(batch.layout.num_seqs, layout.num_seqs) + 1
    ends[:, known:] = ends[:, known - 1 : known]
    return Batch(layout, buffer, batch.features)


class BatchBuilder:
    """Lays schedules out as arrays, one after the other. What a sequence keeps from step to step (its tables, its
    sampling parameters) is kept by slot and only added to."""

    def __init__(self, config: SchedulerConfig) -> None:
        shape = (config.num_replicas, len(config.windows), config.max_num_seqs)
        self.block_size = config.block_size
        self._tables = np.zeros((*shape, config.blocks_per_sequence), np.int32)
        self._lengths = np.zeros(shape, np.int32).tolist()
        self._sampling = np.zeros((shape[0], len(SAMPLING_FIELDS), shape[2]), np.int32)
        self._features: list[list[Features]] = [[Features()] * shape[2] for _ in range(shape[0])]
        self._templates: dict[BatchLayout, np.ndarray] = {}

    def build(self, output: SchedulerOutput, layout: BatchLayout) -> Batch:
        """Rows keep the scheduler's order; padding is zero (block 0, no tokens)."""
        buffer = self._template(layout, len(output.replicas)).copy()
        features = set[Features]()
        for replica, rows in enumerate(output.replicas):
            if rows:
                for scheduled in rows:
                    self._remember(replica, scheduled)
                    features.add(self._features[replica][scheduled.slot])
                arrays = {name: view(buffer[replica : replica + 1], layout, name)[0] for name in LAID_OUT}
                self._fill(arrays, replica, rows, layout)
                self._fill_sampling(buffer[replica], replica, rows, layout)
        merged = np.any([f.as_array() for f in features], axis=0) if features else np.zeros(4, bool)
        return Batch(layout, buffer, Features(*map(bool, merged)))

    def _template(self, layout: BatchLayout, num_replicas: int) -> np.ndarray:
        if layout not in self._templates:
            buffer = np.zeros((num_replicas, layout.num_words), np.int32)
            view(buffer, layout, "repetition_penalty")[:] = 1.0
            self._templates[layout] = buffer
        return self._templates[layout]

    def _remember(self, replica: int, scheduled: Scheduled) -> None:
        """Take over what is new about a slot."""
        slot = scheduled.slot
        if scheduled.is_new:
            request = scheduled.request
            self._sampling[replica, :, slot] = sampling_words(request.params, request.seed)
            self._features[replica][slot] = Features.of(request.params)
        for group, table in enumerate(scheduled.tables):
            lengths = self._lengths[replica][group]
            known = 0 if scheduled.is_new else lengths[slot]
            if len(table) > known:
                self._tables[replica, group, slot, known : len(table)] = table[known:]
            lengths[slot] = len(table)

    def _fill(self, arrays: dict[str, np.ndarray], replica: int, rows: list[Scheduled], layout: BatchLayout) -> None:
        num_rows, size = len(rows), self.block_size
        slots = np.array([s.slot for s in rows])
        starts = np.array([s.start for s in rows])
        counts = np.array([s.count for s in rows]) if layout.num_steps == 1 else np.ones(num_rows, np.int64)
        prompts = np.array([len(s.request.prompt_token_ids) for s in rows])
        tokens = [token for s in rows for token in _tokens(s, layout.num_steps)]
        ends = np.cumsum(counts)
        row = np.repeat(np.arange(num_rows), counts)  # of each token
        positions = starts[row] + np.arange(len(tokens)) - (ends - counts)[row]
        block, offset = np.divmod(positions, size)
        arrays["token_ids"][: len(tokens)] = tokens
        arrays["positions"][: len(tokens)] = positions
        arrays["rope_lens"][: len(tokens)] = np.maximum(positions + 1, prompts[row])
        for group, tables in enumerate(self._tables[replica]):
            table = tables[slots]
            arrays["block_tables"][group, :num_rows] = table
            arrays["slot_mapping"][group, : len(tokens)] = table[row, block] * size + offset
        arrays["cu_q_lens"][1 : num_rows + 1] = ends
        arrays["cu_q_lens"][num_rows + 1 :] = ends[-1]
        arrays["kv_lens"][:num_rows] = starts + counts
        arrays["logits_indices"][:num_rows] = ends - 1
        arrays["samples"][:num_rows] = [s.samples for s in rows]
        arrays["slots"][:num_rows] = slots

    def _fill_sampling(self, words: np.ndarray, replica: int, rows: list[Scheduled], layout: BatchLayout) -> None:
        first, _ = layout.fields[SAMPLING_FIELDS[0]]
        fields = words[first : first + len(SAMPLING_FIELDS) * layout.num_seqs].reshape(len(SAMPLING_FIELDS), -1)
        fields[:, : len(rows)] = self._sampling[replica][:, [s.slot for s in rows]]


LAID_OUT = (
    *("token_ids", "positions", "rope_lens", "slot_mapping", "cu_q_lens", "block_tables"),
    *("kv_lens", "logits_indices", "samples", "slots"),
)


def _tokens(scheduled: Scheduled, num_steps: int) -> list[int]:
    """Token ids of one row."""
    request, start = scheduled.request, scheduled.start
    if start >= request.num_tokens:
        return [-1 - scheduled.slot]
    return request.tokens(start, start + (scheduled.count if num_steps == 1 else 1))


def sampling_words(params: SamplingParams, seed: int) -> np.ndarray:
    """int32 [len(SAMPLING_FIELDS)]."""
    floats = np.array([getattr(params, name) for name in FLOAT_FIELDS], np.float32).view(np.int32)
    seeds = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32).view(np.int32)
    top_k = min(max(params.top_k, 0), np.iinfo(np.int32).max)  # more than any vocabulary has
    return np.concatenate([seeds, np.array([top_k], np.int32), floats])
