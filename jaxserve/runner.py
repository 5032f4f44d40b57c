"""The device half: one jitted step per shape bucket, and the few programs around it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.batch import FLOAT_FIELDS, Batch, BatchLayout, Features, StepOutput
from jaxserve.config import SWAP_CHUNK
from jaxserve.device_state import KV_AXES, SLOT_AXES, DeviceState, abstract_state, allocate
from jaxserve.host_blocks import SwappedBlocks
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


Move = tuple[int, int, list[list[int]]]


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
    windows: tuple[int | None, ...] = (None,)
    """Of the groups of layers that share block tables."""
    layer_groups: tuple[int, ...] = ()
    """The group of each layer."""
    num_steps: int = 1
    """Decode steps that one call may run."""
    min_rows: int = 1
    """Fewest rows of a product (one-row bfloat16 products have no fast path on a CPU)."""

    def layout(self, bucket: int, one_token_each: bool, num_steps: int = 1) -> BatchLayout:
        """Of a step with ``bucket`` token rows."""
        seqs = bucket if one_token_each else max(min(bucket, self.max_num_seqs), self.min_rows)
        return BatchLayout(bucket, seqs, self.blocks_per_sequence, one_token_each, len(self.windows), num_steps)

    @property
    def layouts(self) -> list[BatchLayout]:
        """Every step that is compiled, the largest last."""
        steps = sorted({1, self.num_steps}, reverse=True)
        decode = [self.layout(b, True, n) for n in steps for b in self.decode_buckets]
        return decode + [self.layout(b, False) for b in self.token_buckets]


class PendingStep(NamedTuple):
    """A step that was started: tokens [dp, num_steps, S], hidden states [dp, T, D] (None if it is several in one)."""

    tokens: Array
    hidden: Array | None

    def is_ready(self) -> bool:
        """Whether the devices are done with it."""
        return self.tokens.is_ready()  # pyright: ignore[reportAttributeAccessIssue]

    def output(self) -> StepOutput:
        """Wait for the tokens."""
        return StepOutput(np.asarray(self.tokens))


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
        self.num_blocks: tuple[int, ...] = ()
        """KV blocks of each group of layers."""
        self.state: DeviceState | None = None
        self.swapped: SwappedBlocks | None = None
        self.compiled: list[CompileRecord] = []
        self.warm = False
        self._made = time.perf_counter()
        self._programs: dict[Any, Any] = {}
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._per_replica = NamedSharding(mesh, rules.spec(("replica", None)))

    # -- programs ------------------------------------------------------------------------------------------------

    def compile(self, name: str, key: Any, lower: Callable[[], Any]) -> Any:
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

    def abstract_state(self, num_blocks: Sequence[int]) -> DeviceState:
        """``num_blocks``: of each group of layers."""
        c = self.config
        of_layers = [num_blocks[group] for group in c.layer_groups]
        return abstract_state(
            self.decoder, self.attention, c.kv_dtype, of_layers, c.block_size, c.max_num_seqs, self.mesh, self.rules
        )

    def step_program(self, layout: BatchLayout, num_blocks: tuple[int, ...]) -> Any:
        """The compiled step for ``layout`` and caches of ``num_blocks`` (of each group of layers)."""
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
        times = f", steps={layout.num_steps}" if layout.num_steps > 1 else ""
        name = f"{kind}[tokens={layout.num_tokens}, seqs={layout.num_seqs}{times}]"
        return self.compile(name, key, lower)

    def _score_program(self, rows: int, whole: bool) -> Any:
        dp, d = self.mesh.shape["dp"], self.decoder.hidden_size
        sharding = NamedSharding(self.mesh, self.rules.spec(("replica", None, None)))
        hidden = jax.ShapeDtypeStruct((dp, rows, d), self.params[0].dtype, sharding=sharding)
        targets = jax.ShapeDtypeStruct((dp, rows), jnp.int32, sharding=self._per_replica)
        name = f"score[rows={rows}, {'whole vocabulary' if whole else f'top {TOP_LOGPROBS}'}]"

        def lower() -> Any:
            return jax.jit(self._score, static_argnums=3).lower(self.params, hidden, targets, whole)

        return self.compile(name, ("score", rows, whole), lower)

    def _write_slot_program(self) -> Any:
        assert self.state is not None
        shardings = jax.tree.map(lambda x: x.sharding, self.state.sampler)
        vocab = self.state.sampler.bias.shape[-1]
        row = NamedSharding(self.mesh, self.rules.spec(("vocab",)))
        bias = jax.ShapeDtypeStruct((vocab,), jnp.float32, sharding=row)
        counts = jax.ShapeDtypeStruct((vocab,), jnp.int32, sharding=row)
        at = jax.ShapeDtypeStruct((3,), jnp.int32, sharding=self._replicated)

        def lower() -> Any:
            assert self.state is not None
            write = jax.jit(_write_slot, donate_argnums=0, out_shardings=shardings)
            return write.lower(self.state.sampler, at, bias, counts)

        return self.compile("write_slot", "write_slot", lower)

    def model(self, params: list[Array] | None = None) -> Decoder:
        """The decoder over ``params``: inside a program its arguments, outside of one (None) the runner's own."""
        params = self.params if params is None else params
        return nnx.merge(self.graph, jax.tree.unflatten(self._tree, params))

    @property
    def named_params(self) -> dict[str, Array]:
        """Parameters by name, such as ``layers.0.attn.qkv``."""
        state = nnx.to_flat_state(jax.tree.unflatten(self._tree, self.params))
        return {".".join(map(str, path)): variable.get_value() for path, variable in state}

    def warm_up(
        self,
        num_blocks: tuple[int, ...],
        progress: Callable[[Iterable[BatchLayout]], Iterable[BatchLayout]],
        swaps: bool = False,
    ) -> None:
        """Allocate the caches and compile every program that a request can need; ``swaps``: also those that move
        blocks to host memory and back."""
        self.num_blocks = num_blocks
        self.state = allocate(self.abstract_state(num_blocks))
        for layout in progress(self.config.layouts):
            self.step_program(layout, num_blocks)
        for rows in SCORE_ROWS:
            for whole in (False, True):
                self._score_program(rows, whole)
        self._write_slot_program()
        if swaps:
            self.swapped = SwappedBlocks(self.state, self.config.layer_groups, self.rules, self.compile)
        self.warm = True

    def measure_rates(self) -> tuple[float, float]:
        """Tokens per second of the largest step (on padding: attention is not in it), and bytes per second of moving
        blocks to host memory and back. For a warm runner that holds no requests."""
        assert self.swapped is not None and self.state is not None
        layout = self.config.layouts[-1]
        batch = Batch(layout, np.zeros((self.mesh.shape["dp"], layout.num_words), np.int32), Features())
        blocks = [list(range(SWAP_CHUNK)) for _ in self.config.windows]

        def prefill() -> None:
            self.step(batch).output()

        def move() -> None:
            self.move_blocks([(0, 0, blocks)], [(0, 0, blocks)], [])
            jax.block_until_ready(self.state)

        moved = (
            2 * SWAP_CHUNK * sum(x.nbytes // x.shape[0] // x.shape[1] for x in [*self.state.keys, *self.state.values])
        )
        return layout.num_tokens / _seconds(prefill), moved / _seconds(move)

    # -- what the engine calls -------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> PendingStep:
        """Start a step. Its tokens come when they are asked for; the next step may be started before that."""
        program = self.step_program(batch.layout, self.num_blocks)
        tokens, hidden, self.state = program(self.params, self.state, batch.buffer, batch.features.as_array())
        return PendingStep(tokens, hidden)

    def move_blocks(self, outs: Iterable[Move], ins: Iterable[Move], dropped: Iterable[tuple[int, int]]) -> None:
        """Between steps: copy blocks to host memory, then others back, and forget what nobody needs. A move is
        (replica, handle, blocks per group of layers)."""
        for replica, handle, blocks in outs:
            assert self.swapped is not None and self.state is not None
            self.swapped.out(self.state, replica, handle, blocks)
        for replica, handle, blocks in ins:
            assert self.swapped is not None and self.state is not None
            self.state = self.swapped.back(self.state, replica, handle, blocks)
        for replica, handle in dropped:
            assert self.swapped is not None
            self.swapped.forget(replica, handle)

    def write_slot(self, replica: int, slot: int, bias: np.ndarray, counts: np.ndarray | None) -> None:
        """Set a slot's row of the sampler state: bias float32 [V]; counts int32 [V], None to let them be."""
        assert self.state is not None
        padding = (0, self.decoder.vocab_padding)
        row = self._write_slot_program()(
            self.state.sampler,
            np.array([replica, slot, counts is not None], np.int32),
            np.pad(bias, padding),
            np.pad(np.zeros(len(bias), np.int32) if counts is None else counts, padding),
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
    ) -> tuple[Array, Array | None, DeviceState]:
        """Tokens [dp, num_steps, S], hidden states [dp, T, D] (of a single step), the new state."""
        model = self.model(params)
        batch = {name: unpack(buffer, layout, name) for name in layout.fields}
        flags = Wanted(*(wanted[i] != 0 for i in range(4)))
        if layout.num_steps == 1:
            tokens, hidden, state = self._forward(model, state, batch, flags, layout)
            return tokens[:, None], hidden, state

        def one_step(i: Array, carry: tuple[DeviceState, Array]) -> tuple[DeviceState, Array]:
            tokens, _, state = self._forward(model, carry[0], self._decode_batch(batch, i), flags, layout)
            return state, carry[1].at[:, i].set(tokens)

        tokens = jnp.zeros((buffer.shape[0], layout.num_steps, layout.num_seqs), jnp.int32)
        state, tokens = jax.lax.fori_loop(0, jnp.max(batch["samples"]), one_step, (state, tokens))
        return tokens, None, state

    def _decode_batch(self, batch: dict[str, Array], i: Array) -> dict[str, Array]:
        """The batch of the i-th of several decode steps. A sequence that has all its tokens goes on reading its first
        block and writing to the null block."""
        size = self.config.block_size
        active = i < batch["samples"]
        positions = jnp.where(active, batch["positions"] + i, 0)
        index = jnp.broadcast_to((positions // size)[:, None, :, None], (*batch["slot_mapping"].shape, 1))
        blocks = jnp.take_along_axis(batch["block_tables"], index, axis=-1)[..., 0]
        return batch | {
            "token_ids": jnp.where(i == 0, batch["token_ids"], -1 - batch["slots"]),
            "positions": positions,
            "rope_lens": jnp.maximum(batch["rope_lens"], positions + 1),
            "slot_mapping": jnp.where(active[:, None], blocks * size + (positions % size)[:, None], 0),
            "kv_lens": jnp.where(active, batch["kv_lens"] + i, 1),
            "samples": active.astype(jnp.int32),
        }

    def _forward(
        self, model: Decoder, state: DeviceState, batch: dict[str, Array], flags: Wanted, layout: BatchLayout
    ) -> tuple[Array, Array, DeviceState]:
        """Embed, layers with their KV blocks, logits of every sequence's last token, sampling."""
        paged = _PagedLayers(self, state, Ragged(**{name: batch[name] for name in Ragged._fields}), layout)
        token_ids = _known_tokens(batch["token_ids"], state.last_tokens)
        hidden = model(token_ids, batch["positions"], paged, rope_lens=batch["rope_lens"], constrain=self._constrain)
        last = jnp.take_along_axis(hidden, batch["logits_indices"][..., None], axis=1)
        logits = self._constrain(model.unembed(last), ("replica", None, "vocab"))
        rows = SamplingRows(
            positions=batch["kv_lens"],
            **{name: batch[name] for name in SamplingRows._fields if name != "positions"},
        )
        tokens = sample(logits, rows, flags, state.sampler)
        counts = self._count(state.sampler.counts, batch["slots"], tokens, batch["samples"], flags.penalties)
        last_tokens = _keep_last(state.last_tokens, batch["slots"], tokens, batch["samples"])
        sampler = SamplerState(state.sampler.bias, counts)
        return tokens, hidden, DeviceState(paged.keys, paged.values, last_tokens, sampler)

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
        self._plans: dict[int, Any] = {}
        self._attend = jax.jit(self._write_and_attend, static_argnums=(7, 8))

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        decoder, config = self.runner.decoder, self.runner.config
        group = config.layer_groups[layer]
        shape = Shape(config.block_size, config.windows[group], self.layout.one_token_each)
        scoring = Scoring(decoder.scale * decoder.layers[layer].scale, decoder.attention_softcap)
        if group not in self._plans:
            self._plans[group] = self._plan(group, shape)
        slots = self.ragged.slot_mapping[:, group]
        out, self.keys[layer], self.values[layer] = self._attend(
            q, k, v, self.keys[layer], self.values[layer], slots, self._plans[group], shape, scoring
        )
        return out

    def _plan(self, group: int, shape: Shape) -> Any:
        def one_device(ragged: Ragged) -> Any:
            plan = self.runner.attention.plan(Ragged(*(x[0] for x in ragged)), self.layout.num_tokens, shape)
            return jax.tree.map(lambda x: x[None], plan)

        ragged, per_replica = self.ragged, self.runner.rules.spec(("replica",))
        of_group = ragged._replace(
            slot_mapping=ragged.slot_mapping[:, group], block_tables=ragged.block_tables[:, group]
        )
        return self._on_each_device(one_device, per_replica, per_replica)(of_group)

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


def _seconds(action: Callable[[], None]) -> float:
    """The quicker of two runs, after one that is not counted."""
    action()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def unpack(buffer: Array, layout: BatchLayout, name: str) -> Array:
    """One array of a batch, cut out of the transferred buffer."""
    start, shape = layout.fields[name]
    words = buffer[:, start : start + math.prod(shape)].reshape(buffer.shape[0], *shape)
    return jax.lax.bitcast_convert_type(words, jnp.float32) if name in FLOAT_FIELDS else words


def _known_tokens(token_ids: Array, last_tokens: Array) -> Array:
    """token_ids [dp, T] with -1 - slot replaced by what was sampled last in that slot."""
    sampled = jnp.take_along_axis(last_tokens, jnp.maximum(-1 - token_ids, 0), axis=1)
    return jnp.where(token_ids < 0, sampled, token_ids)


def _keep_last(last_tokens: Array, slots: Array, tokens: Array, samples: Array) -> Array:
    """last_tokens [dp, slots] with the tokens [dp, S] of the rows that sample."""

    def one_replica(last: Array, slots: Array, tokens: Array, samples: Array) -> Array:
        return last.at[jnp.where(samples > 0, slots, last.shape[0])].set(tokens, mode="drop")

    return jax.vmap(one_replica)(last_tokens, slots, tokens, samples)


def _write_slot(state: SamplerState, at: Array, bias: Array, counts: Array) -> SamplerState:
    replica, slot, rewrite = at
    counts = jnp.where(rewrite != 0, counts, state.counts[replica, slot])
    return SamplerState(state.bias.at[replica, slot].set(bias), state.counts.at[replica, slot].set(counts))


def _rank_whole(logprobs: np.ndarray, targets: np.ndarray, num_top: int, vocab: int) -> Scores:
    """Scores from the log-probabilities of the whole vocabulary [N, V]."""
    logprobs = logprobs[:, :vocab]
    top_ids = np.argsort(-logprobs, axis=1, kind="stable")[:, : vocab if num_top < 0 else num_top]
    target = logprobs[np.arange(len(targets)), targets]
    rank = np.sum(logprobs > target[:, None], axis=1) + 1
    return Scores(target, rank, np.take_along_axis(logprobs, top_ids, axis=1), top_ids)
