"""The device half: one jitted step per shape bucket, and the few programs around it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.batch import FLOAT_FIELDS, Batch, BatchLayout, StepOutput
from jaxserve.device_state import KV_AXES, SLOT_AXES, DeviceState, abstract_state, allocate
from jaxserve.models.config import DecoderConfig
from jaxserve.models.decoder import Decoder
from jaxserve.sampler import SamplerState, SamplingRows, Wanted, count_tokens, sample
from pallas_kernels.paged_attention import PagedAttention, Ragged, Scoring, Shape
from sharding import ShardingRules

Q_AXES = ("replica", None, "kv_heads", None, None)
HEAD_AXES = ("replica", None, "kv_heads", None)
SCORE_ROWS = (8, 64)
"""Numbers of rows that log-probabilities are computed for at once."""
TOP_LOGPROBS = 20
"""Most likely tokens that come back with log-probabilities; more are taken from the whole vocabulary's."""


class CompileRecord(NamedTuple):
    """One program that was compiled: its name and shape, when (seconds after the runner was made) and how long it
    took."""

    program: str
    started: float
    seconds: float


class Scores(NamedTuple):
    """Log-probabilities of chosen tokens. target [rows], rank [rows] (1 = most likely), and the most likely
    tokens: top_logprobs and top_ids [rows, k], in order."""

    target: np.ndarray
    rank: np.ndarray
    top_logprobs: np.ndarray
    top_ids: np.ndarray


@dataclass(frozen=True)
class RunnerConfig:
    """Shapes that the programs are compiled for, per replica."""

    decode_buckets: tuple[int, ...]
    """Of steps in which every sequence has one token."""
    token_buckets: tuple[int, ...]
    """Of all other steps."""
    max_num_seqs: int
    blocks_per_sequence: int
    block_size: int
    kv_dtype: jnp.dtype
    min_rows: int = 1
    """Fewest rows of a product (one-row bfloat16 products have no fast path on a CPU)."""

    def layout(self, num_tokens: int, one_token_each: bool) -> BatchLayout:
        """The smallest layout with room for ``num_tokens``."""
        buckets = self.decode_buckets if one_token_each else self.token_buckets
        return self._layout(next(b for b in buckets if b >= num_tokens), one_token_each)

    def _layout(self, bucket: int, one_token_each: bool) -> BatchLayout:
        seqs = bucket if one_token_each else max(min(bucket, self.max_num_seqs), self.min_rows)
        return BatchLayout(bucket, seqs, self.blocks_per_sequence, one_token_each)

    @property
    def layouts(self) -> list[BatchLayout]:
        """Every step that is compiled, the largest last."""
        decode = [self._layout(b, True) for b in self.decode_buckets]
        return decode + [self._layout(b, False) for b in self.token_buckets]


class ModelRunner:
    """Owns the parameters and the device state; nobody else touches either."""

    def __init__(
        self,
        model: tuple[Any, Any],
        decoder: DecoderConfig,
        attention: PagedAttention,
        config: RunnerConfig,
        mesh: Mesh,
        rules: ShardingRules,
    ) -> None:
        """``model``: graph definition and parameters of a Decoder, as ``nnx.split`` gives them."""
        self.graph, state = model
        # A plain list: flattening nnx variables costs a millisecond a step.
        self.params, self._tree = jax.tree.flatten(state)
        self.decoder, self.attention, self.config = decoder, attention, config
        self.mesh, self.rules = mesh, rules
        self.num_blocks = 0
        self.state: DeviceState | None = None
        self.compiled: list[CompileRecord] = []
        self.warm = False
        self._made = time.perf_counter()
        self._programs: dict[Any, Any] = {}
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._per_replica = NamedSharding(mesh, rules.spec(("replica", None)))

    # -- programs ------------------------------------------------------------------------------------------------

    def _compile(self, name: str, key: Any, lower: Callable[[], Any]) -> Any:
        """Compile once and remember; after warm-up a new program is an error of this engine, not a slow step."""
        if key not in self._programs:
            if self.warm:
                raise RuntimeError(f"program {name} was not compiled at warm-up: please report this as a bug")
            start = time.perf_counter()
            with jax.set_mesh(self.mesh):
                self._programs[key] = lower().compile()
            seconds = time.perf_counter() - start
            self.compiled.append(CompileRecord(name, start - self._made, seconds))
        return self._programs[key]

    def abstract_state(self, num_blocks: int) -> DeviceState:
        c = self.config
        return abstract_state(
            self.decoder, self.attention, c.kv_dtype, num_blocks, c.block_size, c.max_num_seqs, self.mesh, self.rules
        )

    def step_program(self, layout: BatchLayout, num_blocks: int) -> Any:
        """The compiled step for ``layout`` and a cache of ``num_blocks``."""
        key = ("step", layout, num_blocks)
        if key in self._programs:
            return self._programs[key]
        dp = self.mesh.shape["dp"]
        buffer = jax.ShapeDtypeStruct((dp, layout.num_words), jnp.int32, sharding=self._per_replica)
        wanted = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=self._replicated)
        state = self.abstract_state(num_blocks)
        shardings = jax.tree.map(lambda x: x.sharding, state)

        def lower() -> Any:
            step = jax.jit(self._step, static_argnums=4, donate_argnums=1, out_shardings=(None, None, shardings))
            return step.lower(self.params, state, buffer, wanted, layout)

        kind = "decode" if layout.one_token_each else "step"
        name = f"{kind}[tokens={layout.num_tokens}, seqs={layout.num_seqs}]"
        return self._compile(name, key, lower)

    def _score_program(self, rows: int, whole: bool) -> Any:
        dp, d = self.mesh.shape["dp"], self.decoder.hidden_size
        sharding = NamedSharding(self.mesh, self.rules.spec(("replica", None, None)))
        hidden = jax.ShapeDtypeStruct((dp, rows, d), self.params[0].dtype, sharding=sharding)
        targets = jax.ShapeDtypeStruct((dp, rows), jnp.int32, sharding=self._per_replica)
        name = f"score[rows={rows}, {'whole vocabulary' if whole else f'top {TOP_LOGPROBS}'}]"

        def lower() -> Any:
            return jax.jit(self._score, static_argnums=3).lower(self.params, hidden, targets, whole)

        return self._compile(name, ("score", rows, whole), lower)

    def _write_slot_program(self) -> Any:
        assert self.state is not None
        shardings = jax.tree.map(lambda x: x.sharding, self.state.sampler)
        vocab = self.state.sampler.bias.shape[-1]
        row = NamedSharding(self.mesh, self.rules.spec(("vocab",)))
        bias = jax.ShapeDtypeStruct((vocab,), jnp.float32, sharding=row)
        counts = jax.ShapeDtypeStruct((vocab,), jnp.int32, sharding=row)
        at = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=self._replicated)

        def lower() -> Any:
            assert self.state is not None
            write = jax.jit(_write_slot, donate_argnums=0, out_shardings=shardings)
            return write.lower(self.state.sampler, at, bias, counts)

        return self._compile("write_slot", "write_slot", lower)

    def model(self, params: list[Array] | None = None) -> Decoder:
        """The decoder over ``params``: inside a program its arguments, outside of one (None) the runner's own."""
        params = self.params if params is None else params
        return nnx.merge(self.graph, jax.tree.unflatten(self._tree, params))

    @property
    def named_params(self) -> dict[str, Array]:
        """Parameters by name, such as ``layers.0.attn.qkv``."""
        state = nnx.to_flat_state(jax.tree.unflatten(self._tree, self.params))
        return {".".join(map(str, path)): variable.get_value() for path, variable in state}

    def warm_up(self, num_blocks: int, progress: Callable[[Iterable[BatchLayout]], Iterable[BatchLayout]]) -> None:
        """Allocate the cache and compile every program that a request can need."""
        self.num_blocks = num_blocks
        self.state = allocate(self.abstract_state(num_blocks))
        for layout in progress(self.config.layouts):
            self.step_program(layout, num_blocks)
        for rows in SCORE_ROWS:
            for whole in (False, True):
                self._score_program(rows, whole)
        self._write_slot_program()
        self.warm = True

    # -- what the engine calls -------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> tuple[StepOutput, Array]:
        """Run one step. Returns its output and the hidden states [dp, T, D], which stay on the device."""
        program = self.step_program(batch.layout, self.num_blocks)
        tokens, hidden, self.state = program(self.params, self.state, batch.buffer, batch.features.as_array())
        return StepOutput(np.asarray(tokens)), hidden

    def write_slot(self, replica: int, slot: int, bias: np.ndarray, counts: np.ndarray) -> None:
        """Set a slot's row of the sampler state: bias float32 [V], counts int32 [V]."""
        assert self.state is not None
        padding = (0, self.decoder.vocab_padding)
        row = self._write_slot_program()(
            self.state.sampler,
            np.array([replica, slot], np.int32),
            np.pad(bias, padding),
            np.pad(counts, padding),
        )
        self.state = self.state._replace(sampler=row)

    def score(self, hidden: np.ndarray, targets: np.ndarray, num_top: int) -> Scores:
        """Log-probabilities of ``targets`` [N] after hidden states [N, D], and of the ``num_top`` likeliest tokens
        (-1: all). Raw log-softmax, before any sampling parameter."""
        whole = not 0 <= num_top <= TOP_LOGPROBS
        dp = self.mesh.shape["dp"]
        parts, at = [], 0
        while at < len(targets):
            rows = next((r for r in SCORE_ROWS if r * dp >= len(targets) - at), SCORE_ROWS[-1])
            h, t = hidden[at : at + rows * dp], targets[at : at + rows * dp]
            missing = rows * dp - len(t)
            h = np.pad(h, ((0, missing), (0, 0))).reshape(dp, rows, -1)
            t_padded = np.pad(t, (0, missing)).astype(np.int32).reshape(dp, rows)
            outputs = self._score_program(rows, whole)(self.params, h, t_padded)
            flat = [np.asarray(x).reshape(rows * dp, *x.shape[2:])[: len(t)] for x in outputs]
            parts.append(_rank_whole(flat[0], t, num_top, self.decoder.vocab_size) if whole else Scores(*flat))
            at += len(t)
        return Scores(*(np.concatenate(x) for x in zip(*parts, strict=True)))

    # -- traced ----------------------------------------------------------------------------------------------------

    def _step(
        self, params: list[Array], state: DeviceState, buffer: Array, wanted: Array, layout: BatchLayout
    ) -> tuple[Array, Array, DeviceState]:
        """Embed, layers with their KV blocks, logits of every sequence's last token, sampling."""
        model = self.model(params)
        batch = {name: unpack(buffer, layout, name) for name in layout.fields}
        paged = _PagedLayers(self, state, Ragged(**{name: batch[name] for name in Ragged._fields}), layout)
        hidden = model(
            batch["token_ids"], batch["positions"], paged, rope_lens=batch["rope_lens"], constrain=self._constrain
        )
        last = jnp.take_along_axis(hidden, batch["logits_indices"][..., None], axis=1)
        logits = self._constrain(model.unembed(last), ("replica", None, "vocab"))
        rows = SamplingRows(
            positions=batch["kv_lens"],
            **{name: batch[name] for name in SamplingRows._fields if name != "positions"},
        )
        flags = Wanted(*(wanted[i] != 0 for i in range(4)))
        tokens = sample(logits, rows, flags, state.sampler)
        counts = self._count(state.sampler.counts, batch["slots"], tokens, batch["samples"], flags.penalties)
        new = DeviceState(paged.keys, paged.values, SamplerState(state.sampler.bias, counts))
        return tokens, hidden, new

    def _constrain(self, x: Array, axes: tuple[str | None, ...]) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.rules.spec(axes)))

    def _count(self, counts: Array, slots: Array, tokens: Array, samples: Array, penalties: Array) -> Array:
        def one_device(counts: Array, slots: Array, tokens: Array, samples: Array, penalties: Array) -> Array:
            vocab_axis = self.rules.vocab
            shard = 0 if vocab_axis is None else jax.lax.axis_index(vocab_axis)
            local = jnp.where(samples[0] != 0, tokens[0] - shard * counts.shape[-1], -1)
            num_rows = jnp.where(penalties, tokens.shape[1], 0)
            return count_tokens(counts[0], slots[0], local, num_rows)[None]

        table, row = self.rules.spec(SLOT_AXES), self.rules.spec(("replica", None))
        specs = (table, row, row, row, PartitionSpec())
        return jax.shard_map(one_device, mesh=self.mesh, in_specs=specs, out_specs=table, check_vma=False)(
            counts, slots, tokens, samples, penalties
        )

    def _score(self, params: list[Array], hidden: Array, targets: Array, whole: bool) -> tuple[Array, ...]:
        model = self.model(params)
        logprobs = jax.nn.log_softmax(model.unembed(hidden), axis=-1)
        if whole:
            return (logprobs,)
        target = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)
        rank = jnp.sum((logprobs > target).astype(jnp.int32), axis=-1) + 1
        top = jax.lax.top_k(logprobs, min(TOP_LOGPROBS, self.decoder.vocab_size))
        return target[..., 0], rank, *top


class _PagedLayers:
    """The ``attend`` of one step: writes each layer's K and V to its blocks and attends through the tables.

    The partitioner cannot see into a kernel, so each call is a ``shard_map`` in which every axis is manual. The
    call of a layer is jitted, so that layers of the same kind are traced once.
    """

    def __init__(self, runner: ModelRunner, state: DeviceState, ragged: Ragged, layout: BatchLayout) -> None:
        self.runner, self.ragged, self.layout = runner, ragged, layout
        self.keys, self.values = list(state.keys), list(state.values)
        self._plans: dict[Shape, Any] = {}
        self._attend = jax.jit(self._write_and_attend, static_argnums=(7, 8))

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        config = self.runner.decoder
        options = config.layers[layer]
        shape = Shape(self.runner.config.block_size, options.window, self.layout.one_token_each)
        scoring = Scoring(config.scale * options.scale, config.attention_softcap)
        if shape not in self._plans:
            self._plans[shape] = self._plan(shape)
        out, self.keys[layer], self.values[layer] = self._attend(
            q, k, v, self.keys[layer], self.values[layer], self.ragged.slot_mapping, self._plans[shape], shape, scoring
        )
        return out

    def _plan(self, shape: Shape) -> Any:
        def one_device(ragged: Ragged) -> Any:
            plan = self.runner.attention.plan(Ragged(*(x[0] for x in ragged)), self.layout.num_tokens, shape)
            return jax.tree.map(lambda x: x[None], plan)

        per_replica = self.runner.rules.spec(("replica",))
        return self._on_each_device(one_device, per_replica, per_replica)(self.ragged)

    def _write_and_attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        keys: Array,
        values: Array,
        slots: Array,
        plan: Any,
        shape: Shape,
        scoring: Scoring,
    ) -> tuple[Array, Array, Array]:
        attention, spec = self.runner.attention, self.runner.rules.spec

        def one_device(*args: Any) -> tuple[Array, ...]:
            q, k, v, keys, values, slots, plan = jax.tree.map(lambda x: x[0], args)
            keys, values = attention.write(keys, values, k, v, slots)
            return tuple(x[None] for x in (attention.attend(q, keys, values, plan, shape, scoring), keys, values))

        kv, heads, replica = spec(KV_AXES), spec(HEAD_AXES), spec(("replica",))
        specs = (spec(Q_AXES), heads, heads, kv, kv, replica, replica)
        return self._on_each_device(one_device, specs, (spec(Q_AXES), kv, kv))(q, k, v, keys, values, slots, plan)

    def _on_each_device(self, f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        return jax.shard_map(f, mesh=self.runner.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def unpack(buffer: Array, layout: BatchLayout, name: str) -> Array:
    """One array of a batch, cut out of the transferred buffer."""
    start, shape = layout.fields[name]
    words = buffer[:, start : start + math.prod(shape)].reshape(buffer.shape[0], *shape)
    return jax.lax.bitcast_convert_type(words, jnp.float32) if name in FLOAT_FIELDS else words


def _write_slot(state: SamplerState, at: Array, bias: Array, counts: Array) -> SamplerState:
    return SamplerState(state.bias.at[at[0], at[1]].set(bias), state.counts.at[at[0], at[1]].set(counts))


def _rank_whole(logprobs: np.ndarray, targets: np.ndarray, num_top: int, vocab: int) -> Scores:
    """Scores from the log-probabilities of the whole vocabulary [N, V]."""
    logprobs = logprobs[:, :vocab]
    top_ids = np.argsort(-logprobs, axis=1, kind="stable")[:, : vocab if num_top < 0 else num_top]
    target = logprobs[np.arange(len(targets)), targets]
    rank = np.sum(logprobs > target[:, None], axis=1) + 1
    return Scores(target, rank, np.take_along_axis(logprobs, top_ids, axis=1), top_ids)
