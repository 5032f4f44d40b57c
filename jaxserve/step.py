"""What is traced: one step of the model over paged KV blocks, with sampling, as a function on arrays.

``single`` is the step, ``several`` a loop of decode steps in one call, ``tick`` one tick of a pipeline of stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.batch import FLOAT_FIELDS, BatchLayout
from jaxserve.device_state import KV_AXES, SLOT_AXES, DeviceState
from jaxserve.layers.attention import Projection, head_norm
from jaxserve.models.config import DecoderConfig
from jaxserve.models.decoder import Decoder, Ops
from jaxserve.sampler import LOGITS, SamplerState, SamplingRows, Wanted, count_tokens, find_cutoff, sample
from pallas_kernels.kv_write import Inputs
from pallas_kernels.matmul import Matmul
from pallas_kernels.paged_attention import PagedAttention, Ragged, Scoring, Shape
from pallas_kernels.sampling import Tails
from sharding import ShardingRules
from sharding.rules import mesh_axes

HEAD_AXES = ("replica", None, "kv_heads", None, None)
"""Of projections [dp, T, K, G+2, H], and of what attention makes of them."""
WHOLE_AXES = ("replica", None, "embed")
"""Of activations [dp, T, D]."""

Arrays = dict[str, Array]
"""A batch, by the names of ``BatchLayout.fields``."""
Caches = tuple[list[Array], list[Array]]
"""K and V of every layer."""


class Kernels(NamedTuple):
    """What a step's ops are computed by."""

    attention: PagedAttention
    matmul: Matmul
    tails: Tails


@dataclass(frozen=True)
class Step:
    """The static side of a step: the model's structure, what computes it, what lies where."""

    graph: Any
    tree: Any
    decoder: DecoderConfig
    kernels: Kernels
    mesh: Mesh
    rules: ShardingRules
    block_size: int
    windows: tuple[int | None, ...]
    """Of the groups of layers that share block tables."""
    layer_groups: tuple[int, ...]
    """The group of each layer (of a stage)."""

    def model(self, params: list[Array]) -> Decoder:
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, params))

    # -- programs ----------------------------------------------------------------------------------------------------

    def single(
        self, params: list[Array], state: DeviceState, buffer: Array, wanted: Array, layout: BatchLayout
    ) -> tuple[Array, Array, DeviceState]:
        """Tokens [dp, 1, S], hidden states [dp, T, D], the new state."""
        batch = {name: unpack(buffer, layout, name) for name in layout.fields}
        tokens, hidden, state = self._forward(self.model(params), state, batch, _flags(wanted), layout)
        return tokens[:, None], hidden, state

    def several(
        self, params: list[Array], state: DeviceState, buffer: Array, wanted: Array, layout: BatchLayout
    ) -> tuple[Array, None, DeviceState]:
        """Tokens [dp, num_steps, S] of as many decode steps, one after the other."""
        model, flags = self.model(params), _flags(wanted)
        batch = {name: unpack(buffer, layout, name) for name in layout.fields}

        def one_step(i: Array, carry: tuple[DeviceState, Array]) -> tuple[DeviceState, Array]:
            tokens, _, state = self._forward(model, carry[0], self._decode_batch(batch, i), flags, layout)
            return state, carry[1].at[:, i].set(tokens)

        tokens = jnp.zeros((buffer.shape[0], layout.num_steps, layout.num_seqs), jnp.int32)
        state, tokens = jax.lax.fori_loop(0, jnp.max(batch["samples"]), one_step, (state, tokens))
        return tokens, None, state

    def tick(
        self,
        params: list[Array],
        state: DeviceState,
        entering: Array,
        staged: Array,
        leaving: Array,
        wanted: Array,
        layout: BatchLayout,
    ) -> tuple[Array, Array, DeviceState]:
        """Every stage works on the batch that entered so many ticks ago; activations move one stage on.

        ``entering`` and ``leaving`` [dp, words]: the batches of the first and the last stage; ``staged`` [pp, dp,
        words]: of every stage. Returns the leaving batch's tokens [dp, 1, S], and [pp, dp, T, D], whose row 0 holds
        its hidden states before the final norm.
        """
        model = self.model(params)
        first, last = ({name: unpack(b, layout, name) for name in layout.fields} for b in (entering, leaving))
        token_ids = _known_tokens(first["token_ids"], state.last_tokens)
        x = self.constrain(model.embed(token_ids, first["positions"], self.kernels.matmul), WHOLE_AXES)
        assert state.activations is not None
        passed = state.activations[:, :, : layout.num_tokens]
        caches, moved = self._stages(params, (state.keys, state.values), passed, x, staged, layout)
        # What the last stage passed on has come round to the first. Every stage takes its rows, and one's are sent.
        rows = jnp.take_along_axis(moved, last["logits_indices"][None, ..., None], axis=2)[0]
        rows = self.constrain(rows, WHOLE_AXES)
        logits = self._logits(model, model.normalize(rows))
        activations = state.activations.at[:, :, : layout.num_tokens].set(moved)
        state = state._replace(keys=caches[0], values=caches[1], activations=activations)
        tokens, state = self._sample(logits, state, last, _flags(wanted))
        return tokens[:, None], moved, state

    def score(self, params: list[Array], hidden: Array, targets: Array, num_top: int | None) -> tuple[Array, ...]:
        """Log-probabilities after hidden states [dp, rows, D]: of the whole vocabulary (num_top None), or those of
        ``targets`` [dp, rows], their ranks, and the ``num_top`` likeliest ones with their ids."""
        model = self.model(params)
        if self.decoder.num_stages > 1:
            hidden = model.normalize(hidden)
        logprobs = jax.nn.log_softmax(model.unembed(hidden, self.kernels.matmul), axis=-1)
        if num_top is None:
            return (logprobs,)
        target = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)
        rank = jnp.sum((logprobs > target).astype(jnp.int32), axis=-1) + 1
        return target[..., 0], rank, *jax.lax.top_k(logprobs, num_top)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _forward(
        self, model: Decoder, state: DeviceState, batch: Arrays, flags: Wanted, layout: BatchLayout
    ) -> tuple[Array, Array, DeviceState]:
        """Embed, layers with their KV blocks, logits of every sequence's last token, sampling."""
        paged = PagedLayers(self, (state.keys, state.values), batch, layout)
        token_ids = _known_tokens(batch["token_ids"], state.last_tokens)
        hidden = model(token_ids, batch["positions"], paged, rope_lens=batch["rope_lens"], ops=self.ops())
        last = jnp.take_along_axis(hidden, batch["logits_indices"][..., None], axis=1)
        state = state._replace(keys=paged.keys, values=paged.values)
        tokens, state = self._sample(self._logits(model, last), state, batch, flags)
        return tokens, hidden, state

    def _logits(self, model: Decoder, hidden: Array) -> Array:
        return self.constrain(model.unembed(hidden, self.kernels.matmul), ("replica", None, "vocab"))

    def _sample(self, logits: Array, state: DeviceState, batch: Arrays, flags: Wanted) -> tuple[Array, DeviceState]:
        """Tokens [dp, S], and the state that remembers them."""
        rows = SamplingRows(
            positions=batch["kv_lens"],
            **{name: batch[name] for name in SamplingRows._fields if name != "positions"},
        )
        tokens = sample(logits, rows, flags, state.sampler, self.constrain, self._find_cutoff)
        counts = self._count(state.sampler.counts, batch["slots"], tokens, batch["samples"], flags.penalties)
        last_tokens = _keep_last(state.last_tokens, batch["slots"], tokens, batch["samples"])
        return tokens, state._replace(last_tokens=last_tokens, sampler=SamplerState(state.sampler.bias, counts))

    def _decode_batch(self, batch: Arrays, i: Array) -> Arrays:
        """The batch of the i-th of several decode steps. A sequence that has all its tokens goes on reading its first
        block and writing to the null block."""
        size = self.block_size * self.mesh.shape["cp"]
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

    def _stages(
        self, params: list[Array], caches: Caches, passed: Array, entering: Array, staged: Array, layout: BatchLayout
    ) -> tuple[Caches, Array]:
        """The layers of every stage, each stage on its own batch. Manual over ``pp`` only: XLA still inserts the
        collectives of the other axes.

        caches: per layer of a stage [pp * dp * ..., ...]; passed [pp, dp, T, D]: what each stage was passed; entering
        [dp, T, D]: what the first one takes instead. Returns caches, and what each stage is passed for the next tick.
        """
        decoder, pp = self.decoder, self.decoder.num_stages
        of_layers = [path[0] == "layers" for path, _ in nnx.to_flat_state(jax.tree.unflatten(self.tree, params))]
        stacked = [p for p, is_layer in zip(params, of_layers, strict=True) if is_layer]

        def one_stage(stacked: list[Array], caches: Caches, passed: Array, entering: Array, staged: Array) -> Any:
            stage = jax.lax.axis_index("pp")
            mine = iter([p[0] for p in stacked])
            model = self.model([next(mine) if is_layer else p for p, is_layer in zip(params, of_layers, strict=True)])
            batch = {name: unpack(staged[0], layout, name) for name in layout.fields}
            paged = PagedLayers(self, caches, batch, layout, inside_stage=True)
            x = jnp.where(stage == 0, entering, passed[0])
            there = partial(_is_there, decoder, stage) if decoder.has_idle_places else None
            x = model.transform(x, batch["positions"], batch["rope_lens"], paged, self.ops(inside_stage=True), there)
            x = jax.lax.ppermute(x, "pp", [(i, (i + 1) % pp) for i in range(pp)])
            keys, values = ([row_major(cache) for cache in side] for side in (paged.keys, paged.values))
            return (keys, values), x[None]

        per_stage = PartitionSpec("pp")
        return jax.shard_map(
            one_stage,
            mesh=self.mesh,
            in_specs=(per_stage, per_stage, per_stage, PartitionSpec(), per_stage),
            out_specs=(per_stage, per_stage),
            axis_names={"pp"},
            check_vma=False,
        )(stacked, caches, passed, entering, staged)

    def ops(self, inside_stage: bool = False) -> Ops:
        """How the decoder runs on this mesh."""
        return Ops(partial(self.constrain, inside_stage=inside_stage), self.kernels.matmul)

    def constrain(self, x: Array, axes: tuple[str | None, ...], inside_stage: bool = False) -> Array:
        """Pin an activation to the devices that its logical axes name."""
        spec = self.rules.spec(axes)
        return jax.lax.with_sharding_constraint(x, spec if inside_stage else NamedSharding(self.mesh, spec))

    def _find_cutoff(self, scaled: Array, best: Array, top_k: Array, top_p: Array) -> Array:
        """Each device has its part of the vocabulary; what they add up are a few numbers per row."""
        # Axes of one device are left out: XLA:CPU would keep an all-reduce over nobody.
        axes = tuple(axis for axis in mesh_axes(self.rules.vocab) if self.mesh.shape[axis] > 1)
        add_up = partial(jax.lax.psum, axis_name=axes)
        logits, row = self.rules.spec(LOGITS), self.rules.spec(("replica", None))
        on_device = partial(find_cutoff, tails=self.kernels.tails, add_up=add_up)
        specs = (logits, row, row, row)
        return jax.shard_map(on_device, mesh=self.mesh, in_specs=specs, out_specs=row, check_vma=False)(
            scaled, best, top_k, top_p
        )

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


class PagedLayers:
    """The ``attend`` of one step: writes each layer's K and V to its blocks and attends through the tables.

    The partitioner cannot see into a kernel, so each call is a ``shard_map`` in which every axis is manual (every
    other axis, inside a stage). The call of a layer is jitted, so that layers of the same kind are traced once.
    """

    def __init__(
        self, step: Step, caches: Caches, batch: Arrays, layout: BatchLayout, inside_stage: bool = False
    ) -> None:
        self.step, self.layout, self.inside_stage = step, layout, inside_stage
        fields = batch | {"visible": batch["positions"] + 1}
        self.ragged = Ragged(**{name: fields[name] for name in Ragged._fields})
        self.keys, self.values = list(caches[0]), list(caches[1])
        self._plans: dict[int, Any] = {}
        self._attend = jax.jit(self._write_and_attend, static_argnums=(5, 6))

    def __call__(self, layer: int, projection: Projection) -> Array:
        step, decoder = self.step, self.step.decoder
        group = step.layer_groups[layer]
        shape = Shape(step.block_size, step.windows[group], self.layout.one_token_each)
        scoring = Scoring(decoder.scale * decoder.stage_layers[layer].scale, decoder.attention_softcap)
        if group not in self._plans:
            self._plans[group] = self._plan(group, shape)
        slots = self.ragged.slot_mapping[:, group]
        out, self.keys[layer], self.values[layer] = self._attend(
            projection, self.keys[layer], self.values[layer], slots, self._plans[group], shape, scoring
        )
        return out

    def _plan(self, group: int, shape: Shape) -> Any:
        ranks = self.step.mesh.shape["cp"]

        def one_device(ragged: Ragged) -> Any:
            mine = own_part(Ragged(*(x[0] for x in ragged)), shape.block_size, ranks)
            plan = self.step.kernels.attention.plan(mine, self.layout.num_tokens, shape)
            return jax.tree.map(lambda x: x[None, None], plan)

        ragged, per_replica = self.ragged, self.step.rules.spec(("replica",))
        of_group = ragged._replace(
            slot_mapping=ragged.slot_mapping[:, group], block_tables=ragged.block_tables[:, group]
        )
        per_rank = self.step.rules.spec(("replica", "kv_blocks"))
        return self._on_each_device(one_device, per_replica, per_rank)(of_group)

    def _write_and_attend(
        self,
        projection: Projection,
        keys: Array,
        values: Array,
        slots: Array,
        plan: Any,
        shape: Shape,
        scoring: Scoring,
    ) -> tuple[Array, Array, Array]:
        attention, spec, ranks = self.step.kernels.attention, self.step.rules.spec, self.step.mesh.shape["cp"]
        norm = head_norm(self.step.decoder)

        def one_device(projection: Projection, keys: Array, values: Array, slots: Array, plan: Any) -> Any:
            qkv, rope, weights = projection
            rope = None if rope is None else (rope[0][0], rope[1][0])
            inputs = Inputs(qkv[0], own_slots(slots[0], shape.block_size, ranks), rope, weights)
            with jax.named_scope("kv_write"):
                q, keys, values = attention.kv_write.write(keys, values, inputs, norm, scoring)
            with jax.named_scope("paged_attention"):
                plan = jax.tree.map(lambda x: x[0, 0], plan)
                out, lse = attention.attend(q, keys, values, plan, shape, scoring)
            if ranks > 1:
                with jax.named_scope("merge"):
                    out = merge(out, lse, "cp")
            return out.astype(q.dtype)[None], row_major(keys), row_major(values)

        blocks = KV_AXES[0][1:] if self.inside_stage else KV_AXES[0]
        kv, heads, replica = spec((blocks, *KV_AXES[1:])), spec(HEAD_AXES), spec(("replica",))
        specs = (Projection._make((heads, replica, PartitionSpec())), kv, kv, replica, spec(("replica", "kv_blocks")))
        return self._on_each_device(one_device, specs, (heads, kv, kv))(projection, keys, values, slots, plan)

    def _on_each_device(self, f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        if self.inside_stage:  # already manual over pp; the mesh is the context's
            axes = set(self.step.mesh.axis_names) - {"pp"}
            return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)
        return jax.shard_map(f, mesh=self.step.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def row_major(cache: Array) -> Array:
    """Says where its dimensions lie: where several are 1, as with one KV head on a device, XLA:CPU may choose another
    order of theirs, and copies the whole cache to get back."""
    return with_layout_constraint(cache, Layout(tuple(range(cache.ndim))))


def unpack(buffer: Array, layout: BatchLayout, name: str) -> Array:
    """One array of a batch, cut out of the transferred buffer."""
    start, shape = layout.fields[name]
    words = buffer[:, start : start + math.prod(shape)].reshape(buffer.shape[0], *shape)
    return jax.lax.bitcast_convert_type(words, jnp.float32) if name in FLOAT_FIELDS else words


# -- contexts that several ranks share ---------------------------------------------------------------------------------
#
# Blocks of a sequence are dealt out: of ``ranks * size`` tokens in a row, each rank has ``size`` in a block of its own,
# under the same number as the others. So the host sees blocks of ``ranks * size`` tokens, and tokens keep their order.


def own_slots(slots: Array, size: int, ranks: int) -> Array:
    """Slots of the host's blocks as slots of this rank's; those of other ranks go to the null block."""
    if ranks == 1:
        return slots
    block, offset = slots // (ranks * size), slots % (ranks * size)
    mine = offset // size == jax.lax.axis_index("cp")
    return jnp.where(mine, block * size + offset % size, 0)


def own_part(ragged: Ragged, size: int, ranks: int) -> Ragged:
    """What this rank has of every sequence."""
    if ranks == 1:
        return ragged
    rank = jax.lax.axis_index("cp")

    def own_tokens(count: Array) -> Array:
        """How many of a sequence's first ``count`` tokens."""
        rounds, rest = count // (ranks * size), count % (ranks * size)
        return rounds * size + jnp.clip(rest - rank * size, 0, size)

    return ragged._replace(kv_lens=own_tokens(ragged.kv_lens), visible=own_tokens(ragged.visible))


def merge(out: Array, lse: Array, axis: str) -> Array:
    """Attention over all ranks' keys from that over each one's: output [T,K,G,H], log-sum-exp [T,K,G]."""
    weight = jnp.exp(lse - jax.lax.pmax(lse, axis))[..., None]
    total = jax.lax.psum(jnp.concatenate([out * weight, weight], axis=-1), axis)
    return total[..., :-1] / total[..., -1:]


def _flags(wanted: Array) -> Wanted:
    return Wanted(*(wanted[i] != 0 for i in range(4)))


def _is_there(decoder: DecoderConfig, stage: Array, slot: int) -> Array:
    """Whether a stage has a layer in this place."""
    stages = [decoder.layer_at(s, slot) is not None for s in range(decoder.num_stages)]
    return jnp.array(stages)[stage]


def _known_tokens(token_ids: Array, last_tokens: Array) -> Array:
    """token_ids [dp, T] with -1 - slot replaced by what was sampled last in that slot."""
    sampled = jnp.take_along_axis(last_tokens, jnp.maximum(-1 - token_ids, 0), axis=1)
    return jnp.where(token_ids < 0, sampled, token_ids)


def _keep_last(last_tokens: Array, slots: Array, tokens: Array, samples: Array) -> Array:
    """last_tokens [dp, slots] with the tokens [dp, S] of the rows that sample."""

    def one_replica(last: Array, slots: Array, tokens: Array, samples: Array) -> Array:
        return last.at[jnp.where(samples > 0, slots, last.shape[0])].set(tokens, mode="drop")

    return jax.vmap(one_replica)(last_tokens, slots, tokens, samples)
