"""The device half: one jitted step per shape bucket, and the few programs around it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.batch import Batch, BatchLayout, Features, StepOutput
from jaxserve.config import SWAP_CHUNK
from jaxserve.device_state import DeviceState, StateSizes, abstract_state, allocate
from jaxserve.host_blocks import SwappedBlocks
from jaxserve.interrupts import Uninterrupted
from jaxserve.models.config import DecoderConfig
from jaxserve.models.decoder import Decoder
from jaxserve.sampler import SamplerState
from jaxserve.step import Kernels, Step
from pallas_kernels.matmul import Weight
from sharding import ShardingRules

SCORE_ROWS = (8, 64)
"""Numbers of rows that log-probabilities are computed for at once."""
COMPILE_THREADS = min(8, os.cpu_count() or 1)
"""Of programs for GPUs. XLA:CPU is given one at a time: it uses all cores for it, and crashes where one program is
written to the compilation cache while another is compiled."""
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
    """Fewest rows of a product that has a fast path."""

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
    """A step that was started: tokens [dp, num_steps, S]; hidden states [dp, T, D], or [pp, dp, T, D] of which row 0
    counts, or None if it is several steps in one."""

    program: str
    tokens: Array
    hidden: Array | None

    def is_ready(self) -> bool:
        """Whether the devices are done with it."""
        return self.tokens.is_ready()  # pyright: ignore[reportAttributeAccessIssue]

    def output(self) -> StepOutput:
        """Wait for the tokens."""
        return StepOutput(np.asarray(self.tokens))

    def states(self) -> np.ndarray:
        """Wait for the hidden states [dp, T, D]."""
        assert self.hidden is not None, "several steps in one keep no hidden states"
        states = np.asarray(self.hidden)
        return states[0] if states.ndim == 4 else states


class ModelRunner:
    """Owns the parameters and the device state; nobody else touches either."""

    def __init__(
        self,
        model: tuple[Any, Any],
        decoder: DecoderConfig,
        kernels: Kernels,
        config: RunnerConfig,
        mesh: Mesh,
        rules: ShardingRules,
    ) -> None:
        """``model``: graph definition and parameters of a Decoder, as ``nnx.split`` gives them."""
        graph, state = model
        # A plain list: flattening nnx variables costs a millisecond a step.
        self.params, tree = jax.tree.flatten(state)
        self.decoder, self.kernels, self.config = decoder, kernels, config
        self.mesh, self.rules = mesh, rules
        self.traced = Step(
            graph, tree, decoder, kernels, mesh, rules, config.block_size, config.windows, config.layer_groups
        )
        self.num_blocks: tuple[int, ...] = ()
        """KV blocks of each group of layers."""
        self.state: DeviceState | None = None
        self.swapped: SwappedBlocks | None = None
        self.biased_slots: set[tuple[int, int]] = set()
        """(replica, slot) of the sampler rows whose bias is not zero; kept by who writes them."""
        self.compiled: list[CompileRecord] = []
        self.compiler_options: dict[str, Any] = {}
        """Of XLA, for programs that are compiled from now on."""
        self.warm = False
        self.last_started: PendingStep | None = None
        self.is_shared = len({device.process_index for device in mesh.devices.flat}) > 1
        """Whether the mesh is that of several processes, all of which make the same calls with the same arguments."""
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
                self._programs[key] = self._compiled(lower())
            seconds = time.perf_counter() - start
            self.compiled.append(CompileRecord(name, start - self._made, seconds))
        return self._programs[key]

    def _compiled(self, lowered: Any) -> Any:
        try:
            return lowered.compile(self.compiler_options or None)
        except jax.errors.JaxRuntimeError as error:
            if "compile option" in str(error):
                raise ValueError(f"xla_flags of the mesh file: {str(error).splitlines()[0]}") from None
            raise

    def abstract_state(self, num_blocks: Sequence[int]) -> DeviceState:
        """``num_blocks``: of each group of layers."""
        c = self.config
        of_layers = [num_blocks[group] for group in c.layer_groups]
        rows = None if self.decoder.num_stages == 1 else (max(c.token_buckets), self.params[0].dtype)
        sizes = StateSizes(of_layers, c.block_size, c.max_num_seqs, rows)
        return abstract_state(self.decoder, self.kernels.attention, c.kv_dtype, sizes, self.mesh, self.rules)

    def step_program(self, layout: BatchLayout, num_blocks: tuple[int, ...]) -> Any:
        """The compiled step for ``layout`` and caches of ``num_blocks`` (of each group of layers)."""
        key = ("step", layout, num_blocks)
        if key in self._programs:
            return self._programs[key]
        buffer = jax.ShapeDtypeStruct((self.mesh.shape["dp"], layout.num_words), jnp.int32, sharding=self._per_replica)
        wanted = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=self._replicated)
        state = self.abstract_state(num_blocks)
        stages = self.decoder.num_stages
        if stages > 1:
            sharding = NamedSharding(self.mesh, self.rules.spec(("stage", "replica", None)))
            staged = jax.ShapeDtypeStruct((stages, *buffer.shape), jnp.int32, sharding=sharding)
            traced, batches = self.traced.tick, (buffer, staged, buffer)
        else:
            traced = self.traced.several if layout.num_steps > 1 else self.traced.single
            batches = (buffer,)
        shardings = jax.tree.map(lambda x: x.sharding, state)

        def lower() -> Any:
            static = 3 + len(batches)
            outputs = (None, None)
            if self.is_shared:  # every process reads the tokens
                outputs = (self._replicated, None if layout.num_steps > 1 else self._hidden_sharding)
            step = jax.jit(traced, static_argnums=static, donate_argnums=1, out_shardings=(*outputs, shardings))
            return step.lower(self.params, state, *batches, wanted, layout)

        return self.compile(self.step_name(layout), key, lower)

    def step_name(self, layout: BatchLayout) -> str:
        """Of the program for a layout."""
        kind = "tick" if self.decoder.num_stages > 1 else "decode" if layout.one_token_each else "step"
        times = f", steps={layout.num_steps}" if layout.num_steps > 1 else ""
        return f"{kind}[tokens={layout.num_tokens}, seqs={layout.num_seqs}{times}]"

    def _score_program(self, rows: int, whole: bool) -> Any:
        dp, d = self.mesh.shape["dp"], self.decoder.hidden_size
        sharding = NamedSharding(self.mesh, self.rules.spec(("replica", None, None)))
        hidden = jax.ShapeDtypeStruct((dp, rows, d), self.params[0].dtype, sharding=sharding)
        targets = jax.ShapeDtypeStruct((dp, rows), jnp.int32, sharding=self._per_replica)
        num_top = None if whole else min(TOP_LOGPROBS, self.decoder.vocab_size)
        name = f"score[rows={rows}, {'whole vocabulary' if whole else f'top {TOP_LOGPROBS}'}]"

        def lower() -> Any:
            shardings = self._replicated if self.is_shared else None
            score = jax.jit(self.traced.score, static_argnums=3, out_shardings=shardings)
            return score.lower(self.params, hidden, targets, num_top)

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

    def _gather_program(self, num_tokens: int) -> Any:
        """The hidden states that count of a step's, where every process can read them."""
        stages = (self.decoder.num_stages,) if self.decoder.num_stages > 1 else ()
        shape = (*stages, self.mesh.shape["dp"], num_tokens, self.decoder.hidden_size)
        hidden = jax.ShapeDtypeStruct(shape, self.params[0].dtype, sharding=self._hidden_sharding)

        def lower() -> Any:
            return jax.jit(lambda x: x[0] if stages else x, out_shardings=self._replicated).lower(hidden)

        return self.compile(f"gather[tokens={num_tokens}]", ("gather", num_tokens), lower)

    @property
    def _hidden_sharding(self) -> NamedSharding:
        stages = ("stage",) if self.decoder.num_stages > 1 else ()
        return NamedSharding(self.mesh, self.rules.spec((*stages, "replica", None, None)))

    def _global(self, array: np.ndarray, axes: tuple[str | None, ...]) -> Any:
        """An argument of a program: as it is, or of several processes one array of them all."""
        if not self.is_shared:
            return array
        sharding = NamedSharding(self.mesh, self.rules.spec(axes))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def model(self) -> Decoder:
        """The decoder over the runner's parameters."""
        return self.traced.model(self.params)

    @property
    def named_params(self) -> dict[str, Weight]:
        """Parameters by name, such as ``layers.0.attn.qkv``, as they lie in memory."""
        state = nnx.to_flat_state(jax.tree.unflatten(self.traced.tree, self.params))
        return {".".join(map(str, path)): variable.get_value() for path, variable in state}

    def warm_up(
        self,
        num_blocks: tuple[int, ...],
        progress: Callable[[Iterable[Any]], Iterable[Any]],
        swaps: bool = False,
    ) -> None:
        """Allocate the caches and compile every program that a request can need, on a GPU several at once; ``swaps``:
        also those that move blocks to host memory and back."""
        self.num_blocks = num_blocks
        self.state = allocate(self.abstract_state(num_blocks))
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        with ThreadPoolExecutor(1 if on_cpu else COMPILE_THREADS) as threads:  # XLA lets go of Python while it compiles
            steps = [threads.submit(self.step_program, layout, num_blocks) for layout in self.config.layouts]
            scores = [threads.submit(self._score_program, r, whole) for r in SCORE_ROWS for whole in (False, True)]
            for program in progress([*steps, *scores]):
                program.result()
        self._write_slot_program()
        if self.is_shared:
            for layout in self.config.layouts:
                self._gather_program(layout.num_tokens)
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

        moved = 2 * SWAP_CHUNK * sum(x.nbytes // x.shape[0] for x in [*self.state.keys, *self.state.values])
        return layout.num_tokens / _seconds(prefill), moved / _seconds(move)

    # -- what the engine calls -------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> PendingStep:
        """Start a step. Its tokens come when they are asked for; the next step may be started before that."""
        return self._start(batch.layout, [batch.buffer], batch)

    def tick(self, batches: Sequence[Batch]) -> PendingStep:
        """Start a tick of the pipeline, with the batch of each stage, all of one layout. What is pending are the
        tokens of the last one."""
        staged = np.stack([batch.buffer for batch in batches])
        return self._start(batches[0].layout, [batches[0].buffer, staged, batches[-1].buffer], batches[-1])

    def _start(self, layout: BatchLayout, buffers: list[np.ndarray], sampled: Batch) -> PendingStep:
        program = self.step_program(layout, self.num_blocks)
        batches = [self._global(b, (*("stage",) * (b.ndim - 2), "replica", None)) for b in buffers]
        wanted = self._global(sampled.features.as_array(), (None,))
        with Uninterrupted():
            tokens, hidden, self.state = program(self.params, self.state, *batches, wanted)
            self.last_started = PendingStep(self.step_name(layout), tokens, hidden)
        return self.last_started

    @property
    def is_computing(self) -> bool:
        """Whether the step that was started last is not done."""
        return self.last_started is not None and not self.last_started.is_ready()

    def states(self, pending: PendingStep) -> np.ndarray:
        """Wait for a step's hidden states [dp, T, D]."""
        if not self.is_shared or pending.hidden is None:
            return pending.states()
        return np.asarray(self._gather_program(pending.hidden.shape[-2])(pending.hidden))

    def move_blocks(self, outs: Iterable[Move], ins: Iterable[Move], dropped: Iterable[tuple[int, int]]) -> None:
        """Between steps: copy blocks to host memory, then others back, and forget what nobody needs. A move is
        (replica, handle, blocks per group of layers)."""
        for replica, handle, blocks in outs:
            assert self.swapped is not None and self.state is not None
            self.swapped.out(self.state, replica, handle, blocks)
        for replica, handle, blocks in ins:
            assert self.swapped is not None and self.state is not None
            with Uninterrupted():
                self.state = self.swapped.back(self.state, replica, handle, blocks)
        for replica, handle in dropped:
            assert self.swapped is not None
            self.swapped.forget(replica, handle)

    def write_slot(self, replica: int, slot: int, bias: np.ndarray, counts: np.ndarray | None) -> None:
        """Set a slot's row of the sampler state: bias float32 [V]; counts int32 [V], None to let them be."""
        assert self.state is not None
        padding = (0, self.decoder.vocab_padding)
        counted = np.zeros(len(bias), np.int32) if counts is None else counts
        row = (
            self._global(np.array([replica, slot, counts is not None], np.int32), (None,)),
            self._global(np.pad(bias, padding), ("vocab",)),
            self._global(np.pad(counted, padding), ("vocab",)),
        )
        program = self._write_slot_program()
        with Uninterrupted():
            self.state = self.state._replace(sampler=program(self.state.sampler, *row))

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
            inputs = self._global(h, ("replica", None, None)), self._global(t_padded, ("replica", None))
            outputs = self._score_program(rows, whole)(self.params, *inputs)
            flat = [np.asarray(x).reshape(rows * dp, *x.shape[2:])[: len(t)] for x in outputs]
            parts.append(_rank_whole(flat[0], t, num_top, self.decoder.vocab_size) if whole else Scores(*flat))
            at += len(t)
        return Scores(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def _seconds(action: Callable[[], None]) -> float:
    """The quicker of two runs, after one that is not counted."""
    action()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


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
