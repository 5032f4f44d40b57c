"""The decoder: embed, layers, final norm, unembed.

Axis letters: R replicas (rows), T tokens, D model, K kv heads, G query heads per kv head, H head dim, F
feed-forward, V vocabulary. Every parameter carries its logical axes (``axes=``), from which its sharding follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxserve.layers.attention import Attend, Projection
from jaxserve.layers.norm import Norm
from jaxserve.layers.rope import rope_tables
from jaxserve.models.config import DecoderConfig
from pallas_kernels.matmul import ACTIVATIONS, Matmul, gate, reference

Constrain = Callable[[Array, tuple[str | None, ...]], Array]
"""Pins an activation to the devices that its logical axes name."""


def _keep(x: Array, axes: tuple[str | None, ...]) -> Array:
    return x


class Ops(NamedTuple):
    """How a program carries out what depends on where it runs; by default, on one device, by XLA."""

    constrain: Constrain = _keep
    matmul: Matmul = reference.IMPLEMENTATION


PLAIN = Ops()


class _Init:
    """Parameters in one dtype: normal weights of 1/sqrt(fan-in), zero biases. Weights that only products read carry the
    number of axes, their first, that a product sums over (``summed=``): such a weight may be laid out for it."""

    def __init__(self, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.dtype = dtype
        self.rngs = rngs

    def weight(self, shape: tuple[int, ...], axes: tuple[str | None, ...], summed: int = 1) -> nnx.Param:
        return nnx.Param(self._normal(shape, math.prod(shape[:summed])), axes=axes, summed=summed)

    def table(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        return nnx.Param(self._normal(shape, shape[-1]), axes=axes)

    def _normal(self, shape: tuple[int, ...], fan_in: int) -> Array:
        return (jax.random.normal(self.rngs.params(), shape, jnp.float32) * fan_in**-0.5).astype(self.dtype)

    def bias(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        return nnx.Param(jnp.zeros(shape, self.dtype), axes=axes)


class Attention(nnx.Module):
    """Projections around ``attend``: fused QKV [D, K, G+2, H] (G query heads, then K, then V), output [K, G, H, D]."""

    def __init__(self, config: DecoderConfig, init: _Init) -> None:
        d, k, g, h = config.hidden_size, config.num_kv_heads, config.group_size, config.head_dim
        self.config = config
        self.qkv = init.weight((d, k, g + 2, h), ("embed", "kv_heads", "qkv_group", None))
        self.o = init.weight((k, g, h, d), ("kv_heads", "q_group", None, "embed"), summed=3)
        if config.qkv_bias:
            self.qkv_bias = init.bias((k, g + 2, h), ("kv_heads", "qkv_group", None))
        if config.out_bias:
            self.o_bias = init.bias((d,), ("embed",))
        if config.qk_norm == "head":
            assert config.norm.kind == "rms" and config.norm.affine, "what writes the KV cache knows no other"
            self.q_norm = Norm((h,), config.norm, init.dtype)
            self.k_norm = Norm((h,), config.norm, init.dtype)
        elif config.qk_norm == "full":
            real_q, real_k = (k * g - config.head_padding) * h, (k - config.kv_head_padding) * h
            self.q_norm = Norm((k, g, h), config.norm, init.dtype, ("kv_heads", "q_group", None), real_q)
            # Copies count: all heads have equally many, so the mean is that of the heads.
            self.k_norm = Norm((k, h), config.norm, init.dtype, ("kv_heads", None), real_k)

    def __call__(self, x: Array, layer: int, rope: tuple[Array, Array] | None, attend: Attend, ops: Ops) -> Array:
        """x [R, T, D] -> [R, T, D], before the residual is added."""
        with jax.named_scope("qkv"):
            qkv = ops.matmul.multiply(x, self.qkv.get_value())
            if self.config.qkv_bias:
                qkv = qkv + self.qkv_bias[...][None, None]
        norm_weights = None
        if self.config.qk_norm == "head":
            norm_weights = self.q_norm.weight[...], self.k_norm.weight[...]
        elif self.config.qk_norm == "full":
            g = self.config.group_size
            q, k = self.q_norm(qkv[:, :, :, :g]), self.k_norm(qkv[:, :, :, g])
            qkv = jnp.concatenate([q, k[:, :, :, None], qkv[:, :, :, g + 1 :]], axis=3)
        out = attend(layer, Projection(qkv, rope, norm_weights))
        with jax.named_scope("out"):
            out = ops.matmul.multiply(out, self.o.get_value(), axes=3)
            return out + self.o_bias[...][None, None] if self.config.out_bias else out


class Mlp(nnx.Module):
    """Feed-forward: gated (fused gate and up, [D, 2, F]) or plain ([D, F])."""

    def __init__(self, config: DecoderConfig, init: _Init) -> None:
        d, f = config.hidden_size, config.intermediate_size
        self.config = config
        if config.gated_mlp:
            self.gate_up = init.weight((d, 2, f), ("embed", None, "mlp"))
            if config.mlp_bias:
                self.gate_up_bias = init.bias((2, f), (None, "mlp"))
        else:
            self.up = init.weight((d, f), ("embed", "mlp"))
            if config.mlp_bias:
                self.up_bias = init.bias((f,), ("mlp",))
        self.down = init.weight((f, d), ("mlp", "embed"))
        if config.mlp_bias:
            self.down_bias = init.bias((d,), ("embed",))

    def __call__(self, x: Array, matmul: Matmul) -> Array:
        """x [R, T, D] -> [R, T, D]."""
        with jax.named_scope("up"):
            y = self._up(x, matmul)
        with jax.named_scope("down"):
            y = matmul.multiply(y, self.down.get_value())
            return y + self.down_bias[...][None, None] if self.config.mlp_bias else y

    def _up(self, x: Array, matmul: Matmul) -> Array:
        """To [R, T, F], through the activation, which is computed in float32."""
        activation, biased = self.config.activation, self.config.mlp_bias
        if not self.config.gated_mlp:
            y = matmul.multiply(x, self.up.get_value())
            y = y + self.up_bias[...][None, None] if biased else y
            return ACTIVATIONS[activation](y.astype(jnp.float32)).astype(x.dtype)
        if not biased:
            return matmul.gated(x, self.gate_up.get_value(), activation)
        return gate(matmul.multiply(x, self.gate_up.get_value()) + self.gate_up_bias[...][None, None], activation)


class Layer(nnx.Module):
    """Attention and feed-forward with the norms where ``norm_placement`` puts them."""

    def __init__(self, config: DecoderConfig, init: _Init) -> None:
        self.config = config
        self.attn = Attention(config, init)
        self.mlp = Mlp(config, init)
        shape = (config.hidden_size,)
        if config.norm_placement in ("pre", "both"):
            self.attn_norm = Norm(shape, config.norm, init.dtype)
            self.mlp_norm = Norm(shape, config.norm, init.dtype)
        if config.norm_placement in ("post", "both"):
            self.post_attn_norm = Norm(shape, config.norm, init.dtype)
            self.post_mlp_norm = Norm(shape, config.norm, init.dtype)

    def __call__(self, x: Array, layer: int, rope: tuple[Array, Array] | None, attend: Attend, ops: Ops) -> Array:
        """x [R, T, D] -> [R, T, D]."""
        if self.config.residual_norm:
            x = self.attn_norm(x + self._attention(x, layer, rope, attend, ops))
            return self.mlp_norm(x + self._feed_forward(x, ops))
        if self.config.parallel_residual:
            y = self._attention(self.attn_norm(x), layer, rope, attend, ops)
            return x + y + self._feed_forward(self.mlp_norm(x), ops)
        placement = self.config.norm_placement
        y = self._attention(x if placement == "post" else self.attn_norm(x), layer, rope, attend, ops)
        x = x + (y if placement == "pre" else self.post_attn_norm(y))
        y = self._feed_forward(x if placement == "post" else self.mlp_norm(x), ops)
        return x + (y if placement == "pre" else self.post_mlp_norm(y))

    def _attention(self, x: Array, layer: int, rope: tuple[Array, Array] | None, attend: Attend, ops: Ops) -> Array:
        with jax.named_scope("attention"):
            return ops.constrain(self.attn(x, layer, rope, attend, ops), ("replica", None, "embed"))

    def _feed_forward(self, x: Array, ops: Ops) -> Array:
        with jax.named_scope("mlp"):
            return ops.constrain(self.mlp(x, ops.matmul), ("replica", None, "embed"))


class Table(nnx.Module):
    """One weight and perhaps a bias under a name: embeddings and projections outside the layers."""

    def __init__(self, weight: nnx.Param, bias: nnx.Param | None = None) -> None:
        self.weight = weight
        if bias is not None:
            self.bias = bias


class Decoder(nnx.Module):
    """A decoder-only language model.

    With tied embeddings there is one array, ``unembedding.weight`` [D, V]: tokens read its columns, so that the
    large product at the end of every step reads it in the layout that XLA multiplies fastest.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        init = _Init(jnp.dtype(dtype), rngs)
        d, v = config.hidden_size, config.vocab_size + config.vocab_padding
        e = config.embed_dim or d
        self.config = config
        bias = init.bias((v,), ("vocab",)) if config.unembed_bias else None
        self.unembedding = Table(init.weight((e, v), ("embed", "vocab")), bias)
        if not config.tied_embeddings:
            self.embedding = Table(init.table((v, e), ("vocab", "embed")))
        if config.learned_positions:
            self.position_embedding = Table(init.table((config.learned_positions, d), (None, "embed")))
        if e != d:
            self.project_in = Table(init.weight((e, d), (None, "embed")))
            self.project_out = Table(init.weight((d, e), ("embed", None)))
        self.layers = nnx.List([Layer(config, init) for _ in config.stage_layers])
        if config.final_norm:
            self.final_norm = Norm((d,), config.norm, init.dtype)

    def __call__(
        self,
        token_ids: Array,
        positions: Array,
        attend: Attend,
        *,
        rope_lens: Array | None = None,
        ops: Ops = PLAIN,
    ) -> Array:
        """Hidden states after the final norm.

        token_ids, positions: int32 [R, T]; rope_lens: int32 [R, T], see ``layers.rope.frequencies`` (default:
        position + 1). Returns [R, T, D] in the parameters' dtype.
        """
        lengths = positions + 1 if rope_lens is None else rope_lens
        x = ops.constrain(self.embed(token_ids, positions, ops.matmul), ("replica", None, "embed"))
        return self.normalize(self.transform(x, positions, lengths, attend, ops))

    def transform(
        self,
        x: Array,
        positions: Array,
        rope_lens: Array,
        attend: Attend,
        ops: Ops = PLAIN,
        is_there: Callable[[int], Array] | None = None,
    ) -> Array:
        """The layers: x [R, T, D] -> [R, T, D]. ``is_there(i)``: whether layer i does anything, where that depends on
        the device."""
        ropes = [rope_tables(rope, positions, rope_lens) for rope in self.config.ropes]
        for i, (layer, options) in enumerate(zip(self.layers, self.config.stage_layers, strict=True)):
            with jax.named_scope(f"layer_{i}"):
                y = layer(x, i, None if options.rope is None else ropes[options.rope], attend, ops)
                x = y if is_there is None else jnp.where(is_there(i), y, x)
        return x

    def normalize(self, x: Array) -> Array:
        """The final norm: x [..., D]."""
        return self.final_norm(x) if self.config.final_norm else x

    def embed(self, token_ids: Array, positions: Array, matmul: Matmul = reference.IMPLEMENTATION) -> Array:
        """Token (and learned position) embeddings, [R, T, D]."""
        with jax.named_scope("embed"):
            if self.config.tied_embeddings:
                x = matmul.columns(self.unembedding.weight.get_value(), token_ids)
            else:
                x = jnp.take(self.embedding.weight[...], token_ids, axis=0)
            if self.config.embed_scale is not None:
                x = x * jnp.asarray(self.config.embed_scale, x.dtype)
            if self.config.embed_dim not in (None, self.config.hidden_size):
                x = matmul.multiply(x, self.project_in.weight.get_value())
            if self.config.learned_positions:
                x = x + jnp.take(self.position_embedding.weight[...], positions + self.config.position_offset, axis=0)
            return x

    def unembed(self, hidden: Array, matmul: Matmul = reference.IMPLEMENTATION) -> Array:
        """Logits of every token id, float32 [..., V], from hidden states [..., D]."""
        with jax.named_scope("unembed"):
            if self.config.embed_dim not in (None, self.config.hidden_size):
                hidden = matmul.multiply(hidden, self.project_out.weight.get_value())
            logits = matmul.multiply(hidden, self.unembedding.weight.get_value(), dtype=jnp.float32)
            if self.config.unembed_bias:
                bias = self.unembedding.bias[...].astype(jnp.float32)
                logits = logits + bias.reshape((1,) * (logits.ndim - 1) + bias.shape)
            if self.config.logit_softcap is not None:
                logits = jnp.tanh(logits / self.config.logit_softcap) * self.config.logit_softcap
            if self.config.vocab_padding:
                real = jnp.arange(logits.shape[-1]) < self.config.vocab_size
                logits = jnp.where(real.reshape((1,) * (logits.ndim - 1) + real.shape), logits, -jnp.inf)
            return logits
