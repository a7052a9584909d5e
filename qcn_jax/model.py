"""Qwen3-Next and the text model of Qwen3.5: embedding, scanned hybrid blocks, norm, head and multi-token prediction.

Forward, prefill and decode are one path: `apply` with a cache appends to it, without one it sees whole rows.
Shapes: B batch, T tokens, D width, V vocabulary, E experts, L layers.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from qcn_jax.config import ModelConfig
from qcn_jax.config_checks import check_model
from qcn_jax.decoder import Block, DecoderLayer, add_layer_axis, join_layers, linear_layers, scanned
from qcn_jax.errors import UserError
from qcn_jax.layers.attention import init_attention_cache
from qcn_jax.layers.cache import Cache, init_cache
from qcn_jax.layers.context import TokenContext, document_ids, segment_positions
from qcn_jax.layers.dense import Kernel, dense, normal_init
from qcn_jax.layers.embedding import sharded_lookup
from qcn_jax.layers.norm import RMSNorm
from qcn_jax.layers.products import accumulator, widened_einsum
from qcn_jax.layers.remat import rematerialised
from qcn_jax.layers.rotary import rotary_angles, rotary_dim
from qcn_jax.layers.sharded import sharded_document_ids
from qcn_jax.moe.router import RouterStatistics
from qcn_jax.sharding.parallel import Parallel

Array = jax.Array


@struct.dataclass
class Output:
    """What a forward pass gives.

    Attributes:
      logits: [B, T, V] float32 (float64 where config.dtype is), or None when not asked for.
      hidden: [B, T, D], after the final norm: input of the head and of multi-token prediction.
      aux: router statistics of every layer in order, leading axis L (plus one per MTP step); None without experts.
      cache: the cache after these tokens, or None.
      mtp_hidden: [K, B, T, D] or None; step i's hidden at t predicts token t + 2 + i (through the head).
      routes: [L, B, T, k] int32, the experts that every layer's router chose for every token; None unless asked for.
    """

    logits: Array | None
    hidden: Array
    aux: RouterStatistics | None
    cache: Cache | None = None
    mtp_hidden: Array | None = None
    routes: Array | None = None


class MultiTokenPredictor(nn.Module):
    """One attention layer that predicts a further token from (hidden at t, token t + 1)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, hidden: Array, embedded: Array, context: TokenContext, cache: Any = None
    ) -> tuple[Array, tuple[RouterStatistics | None, Any]]:
        """hidden, embedded [B, T, D] -> (normed hidden [B, T, D], (statistics, cache))."""
        cfg = self.config
        norm = lambda name: RMSNorm(cfg.rms_norm_eps, param_dtype=jnp.dtype(cfg.param_dtype), name=name)
        pair = [norm("pre_fc_norm_embedding")(embedded), norm("pre_fc_norm_hidden")(hidden)]
        fc = dense(cfg, cfg.hidden_size, ("mtp_in", "embed"), "fc", context.whole_parallel)
        x = fc(jnp.concatenate(pair, axis=-1))
        x, rest = rematerialised(DecoderLayer, cfg.remat)(cfg, "full", name="layer")(x, context, cache)
        return norm("norm")(x), rest


class Qwen3Next(nn.Module):
    """The model of a ModelConfig.

    Attributes:
      config: the architecture.
      unrolled: False scans over layers stacked in the parameter tree (one compiled layer for all); True
        holds each layer's parameters and cache apart (see `unroll`), which saves decoding the copies that
        a scan makes of every weight and cache it slices.
      parallel: the devices over which batches and parameters are spread; None is one device, and does to `init`.
    """

    config: ModelConfig
    unrolled: bool = False
    parallel: Parallel | None = None

    def setup(self) -> None:
        cfg = self.config
        check_model(cfg, "model")
        dtypes = {"dtype": jnp.dtype(cfg.dtype), "param_dtype": jnp.dtype(cfg.param_dtype)}
        init = nn.with_logical_partitioning(normal_init(cfg), ("vocab", "embed"))
        self.embed_tokens = nn.Embed(cfg.vocab_size, cfg.hidden_size, embedding_init=init, **dtypes)
        blocks, rest = divmod(cfg.num_hidden_layers, cfg.full_attention_interval)
        if self.unrolled:
            self.blocks = [Block(cfg, unrolled=True) for _ in range(blocks)]
            layer = rematerialised(DecoderLayer, cfg.remat)
            self.tail = [layer(cfg, "linear") for _ in range(rest)]
        else:
            self.blocks = scanned(Block, blocks, "blocks")(cfg) if blocks else None
            self.tail = linear_layers(cfg, rest) if rest else None
        self.norm = RMSNorm(cfg.rms_norm_eps, param_dtype=jnp.dtype(cfg.param_dtype))
        self.lm_head = None if cfg.tie_word_embeddings else Kernel(cfg, cfg.vocab_size, ("embed", "vocab"))
        self.mtp = MultiTokenPredictor(cfg) if cfg.num_nextn_predict_layers else None

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        cache: Cache | None = None,
        lengths: Array | None = None,
        mtp_tokens: Array | None = None,
        with_logits: bool = True,
        key_limit: int | None = None,
        routes: Array | None = None,
        with_routes: bool = False,
        tables: Array | None = None,
    ) -> Output:
        """One pass over `tokens`.

        Args:
          tokens: [B, T] int32.
          positions: [B, T]; by default the position within the document, after what the cache holds.
          segment_ids: [B, T]; a change of id starts a document (convolution, state, attention and positions
            begin anew), 0 is padding on either side. Not with a cache.
          cache: what came before; the tokens are appended to it.
          lengths: [B], how many of the T right-padded tokens are real; caches are exact for those.
          mtp_tokens: [B, T] or [B, T, K], the tokens at t + 1 .. t + K; gives `mtp_hidden`.
          with_logits: False leaves logits out (the loss may apply `head` in pieces).
          key_limit: with a cache, attention reads only its first `key_limit` slots, which must hold every
            sequence; static.
          routes: [L, B, T, k], experts that tokens go to instead of the routers' choice, see moe.router; a negative
            one is free. Not those of multi-token prediction.
          with_routes: ask for `routes` of the output; static.
          tables: [B, n], with a cache whose keys and values lie in blocks (lengths, windows and states of B): the
            numbers of the blocks that each sequence fills, in order. Others are left as they are; a number beyond all
            is none.
        """
        context = self._context(tokens.shape, positions, segment_ids, cache, lengths, key_limit).replace(
            with_routes=with_routes, tables=tables)
        x, aux, layers = self._run_layers(
            self._embed(tokens), context, None if cache is None else cache.layers, routes)
        taken = None
        if with_routes and aux is not None:
            taken, aux, context = aux.routes, aux.replace(routes=None), context.replace(with_routes=False)
        hidden = self.norm(x)
        if cache is not None:
            cache = Cache(cache.length + (tokens.shape[1] if lengths is None else lengths), layers)
        mtp_hidden = None
        if self.is_initializing() and self.mtp is not None:
            mtp_tokens = tokens
        if mtp_tokens is not None:
            mtp_hidden, aux = self._predict_further(hidden, mtp_tokens, context, aux)
        logits = self._logits(hidden) if with_logits or self.is_initializing() else None
        return Output(logits, hidden, aux, cache, mtp_hidden, taken)

    def mtp_step(
        self, hidden: Array, tokens: Array, cache: Cache, positions: Array | None = None, lengths: Array | None = None
    ) -> tuple[Array, Cache]:
        """One cached step of multi-token prediction, for drafting.

        Args:
          hidden: [B, T, D], the model's `hidden` at some positions (or this method's, to draft further).
          tokens: [B, T], the token after each of them.
          cache: from `init_mtp_cache`.
          positions, lengths: as in `__call__`.

        Returns:
          hidden [B, T, D] for the head (predicts the token after `tokens`), and the cache.
        """
        context = self._context(tokens.shape, positions, None, cache, lengths, None)
        hidden, (_, layers) = self.mtp(hidden, self._embed(tokens), context, cache.layers)
        return hidden, Cache(cache.length + (tokens.shape[1] if lengths is None else lengths), layers)

    @nn.nowrap
    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """{"params": tree} of plain arrays; see `logical_axes` for their axis names."""
        return nn.unbox(super().init(rngs, *args, **kwargs))

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """As Linen's. Without `config.scan_layers` a pass that has no cache takes the stacked layers apart first."""
        if self.unrolled or self.config.scan_layers or "method" in kwargs or self._with_cache(*args, **kwargs):
            return super().apply(variables, *args, **kwargs)
        variables = {**variables, "params": unroll(self.config, variables["params"])}
        return self.clone(unrolled=True).apply(variables, *args, **kwargs)

    @nn.nowrap
    def _with_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Whether these arguments of `__call__` hold a cache, by name or position."""
        names = inspect.signature(self.__call__).parameters
        return (dict(zip(names, args)) | kwargs).get("cache") is not None

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int, blocks: int | None = None) -> Cache:
        """An empty cache for `batch` sequences of `max_length` tokens, or with `blocks` of as many for all."""
        return init_cache(self.config, batch, max_length, self.unrolled, blocks)

    @nn.nowrap
    def init_mtp_cache(self, batch: int, max_length: int) -> Cache:
        """An empty cache for `mtp_step`."""
        return Cache(jnp.zeros(batch, jnp.int32), init_attention_cache(self.config, batch, max_length))

    @nn.nowrap
    def head(self, params: Any, hidden: Array) -> Array:
        """Logits [..., V] in float32 at least of hidden [..., D]; params is the tree under "params"."""
        return self._project(hidden, head_kernel(self.config, params))

    def _project(self, hidden: Array, kernel: Array) -> Array:
        kernel = kernel.astype(hidden.dtype)
        if self.parallel is not None:
            return widened_einsum("...d,dv->...v", hidden, kernel)
        rows = widened_einsum("nd,dv->nv", hidden.reshape(-1, hidden.shape[-1]), kernel)  # as layers.dense.product
        return rows.reshape(*hidden.shape[:-1], kernel.shape[1])

    def _logits(self, hidden: Array) -> Array:
        tied = self.lm_head is None
        logits = self._project(hidden, self.embed_tokens.embedding.T if tied else self.lm_head(hidden.shape[-1]))
        if self.parallel is None:
            return logits
        return self.parallel.constrain(logits, "activation_batch", "activation_length", "activation_vocab")

    def _context(
        self,
        shape: tuple[int, int],
        positions: Array | None,
        segment_ids: Array | None,
        cache: Cache | None,
        lengths: Array | None,
        key_limit: int | None,
    ) -> TokenContext:
        index = jnp.arange(shape[1], dtype=jnp.int32)[None]
        start = None
        if cache is not None:
            if segment_ids is not None:
                raise ValueError("segment_ids cannot be given with a cache; use lengths for right padding")
            start = cache.length
        if segment_ids is not None:
            spread = self.parallel is not None
            segment_ids = sharded_document_ids(segment_ids, self.parallel) if spread else document_ids(segment_ids)
        if positions is None:
            if segment_ids is not None:
                positions = segment_positions(segment_ids)
            else:
                positions = index if start is None else index + start[:, None]
            positions = jnp.broadcast_to(positions, shape)
        valid = None
        if segment_ids is not None:
            valid = segment_ids != 0
        elif lengths is not None:
            valid = index < lengths[:, None]
        cfg = self.config
        rotated = rotary_dim(cfg.head_dim, cfg.partial_rotary_factor)
        cos, sin = rotary_angles(positions, rotated, cfg.rope_theta, accumulator(cfg.dtype))
        return TokenContext(cos, sin, segment_ids, valid, start, lengths, key_limit, self.parallel)

    def _embed(self, tokens: Array) -> Array:
        if self.parallel is None:
            return self.embed_tokens(tokens)
        return sharded_lookup(self.embed_tokens.embedding.astype(jnp.dtype(self.config.dtype)), tokens, self.parallel)

    def _run_layers(
        self, x: Array, context: TokenContext, caches: Any, routes: Array | None = None
    ) -> tuple[Array, RouterStatistics | None, Any]:
        """All decoder layers; statistics and routes have a leading axis L, caches the layout they came in."""
        old, new, statistics = caches or {}, {}, []
        size = self.config.full_attention_interval
        blocks = self.config.num_hidden_layers // size
        of = lambda first, last: None if routes is None else routes[first:last]
        if self.unrolled:
            for i, block in enumerate(self.blocks):
                x, (part, new[f"blocks_{i}"]) = block(x, context, old.get(f"blocks_{i}"), of(i * size, (i + 1) * size))
                statistics.append(part)
            for i, layer in enumerate(self.tail, blocks * size):
                x, (part, new[f"tail_{i - blocks * size}"]) = layer(
                    x, context, old.get(f"tail_{i - blocks * size}"), None if routes is None else routes[i])
                statistics.append(add_layer_axis(part))
        else:
            if self.blocks is not None:
                grouped = of(0, blocks * size)
                if grouped is not None:
                    grouped = grouped.reshape(blocks, size, *grouped.shape[1:])
                x, (part, new["blocks"]) = self.blocks(x, context, old.get("blocks"), grouped)
                # [G, P, ...] -> [G * P, ...]
                statistics.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), part))
            if self.tail is not None:
                x, (part, new["tail"]) = self.tail(x, context, old.get("tail"), of(blocks * size, None))
                statistics.append(part)
        return x, join_layers(statistics), new if caches is not None else None

    def _predict_further(
        self, hidden: Array, tokens: Array, context: TokenContext, aux: RouterStatistics | None
    ) -> tuple[Array, RouterStatistics | None]:
        if self.mtp is None:
            raise UserError("model.num_nextn_predict_layers: 0, but multi-token prediction was asked for")
        tokens = tokens[..., None] if tokens.ndim == 2 else tokens
        outputs, statistics = [], [aux]
        for step in range(tokens.shape[-1]):  # one layer, applied again to its own output
            hidden, (part, _) = self.mtp(hidden, self._embed(tokens[..., step]), context)
            outputs.append(hidden)
            statistics.append(add_layer_axis(part))
        return jnp.stack(outputs), join_layers(statistics)


def head_kernel(config: ModelConfig, params: Any) -> Array:
    """The output projection [D, V]: lm_head, or the transposed embedding when tied."""
    if config.tie_word_embeddings:
        return params["embed_tokens"]["embedding"].T
    return params["lm_head"]["kernel"]


def _abstract(config: ModelConfig, unrolled: bool = False) -> Any:
    model = Qwen3Next(config, unrolled)
    initialise = lambda rng, tokens: nn.Module.init(model, rng, tokens)["params"]
    return jax.eval_shape(initialise, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def abstract_params(config: ModelConfig, unrolled: bool = False) -> Any:
    """The parameter tree, stacked or `unrolled`, as jax.ShapeDtypeStruct leaves; allocates nothing."""
    return nn.unbox(_abstract(config, unrolled))


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, by abstract evaluation."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def logical_axes(config: ModelConfig, unrolled: bool = False) -> Any:
    """The parameter tree, stacked or `unrolled`, with a tuple of logical axis names in place of each array.

    Names: vocab, embed, heads, kv_heads, head_dim, conv, router, expert, mlp, shared_gate, mtp_in, and the
    stacking axes blocks and layers.
    """
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    return jax.tree.map(lambda leaf: tuple(leaf.names), _abstract(config, unrolled), is_leaf=is_box)


def unroll(config: ModelConfig, params: Any) -> Any:
    """The stacked parameter tree as `Qwen3Next(config, unrolled=True)` wants it, each layer apart."""
    at = lambda tree, *index: jax.tree.map(lambda leaf: leaf[index], tree)
    blocks, rest = divmod(config.num_hidden_layers, config.full_attention_interval)
    out = {name: tree for name, tree in params.items() if name not in ("blocks", "tail")}
    for g in range(blocks):
        linear = range(config.full_attention_interval - 1)
        layers = {f"linear_{i}": at(params["blocks"]["linear"], g, i) for i in linear}
        out[f"blocks_{g}"] = layers | {"full": at(params["blocks"]["full"], g)}
    return out | {f"tail_{i}": at(params["tail"], i) for i in range(rest)}
