"""The compiled functions of an engine: prefill, copy and decode, each over some slots of every device.

Axes: N slots, P prefill rows, D decoding lanes over all parts of the placement, S slots of a part, W blocks of a
sequence, C prefill chunk, M new tokens, V vocabulary. Indices of slots and blocks are those within a part.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcn_jax.inference.cache import (
    cache_put,
    cache_reset,
    cache_take,
    copy_blocks,
    read_blocks,
    states,
    with_states,
    write_blocks,
)
from qcn_jax.inference.placement import Placement
from qcn_jax.inference.sampling import MAX_ALTERNATIVES, adjusted, sample
from qcn_jax.layers.cache import Cache
from qcn_jax.model import Qwen3Next, abstract_params, unroll
from qcn_jax.sharding import distributed

Array = jax.Array
STOP_IDS = 8  # stop ids are padded to a multiple of this, so that their number is not part of the compiled shape


class Programs:
    """Compiled functions, once for each part of the cache that attention reads (`key_limit`)."""

    def __init__(
        self, model: Qwen3Next, placement: Placement, slots: int, blocks: int, block_size: int, max_new_tokens: int,
        drawable: np.ndarray | None = None, snapshots: int = 0, with_routes: bool = False,
    ) -> None:  # fmt: skip
        """Compiles nothing yet.

        Args:
          model: over `placement.parallel`.
          placement: where slots lie.
          slots: of each part.
          blocks: of keys and values, of each part.
          block_size: tokens of one.
          max_new_tokens, drawable: see Engine.
          snapshots: saved states of each part.
          with_routes: give the experts of every token that the model is given.
        """
        self._model, self._placement, self._slots = model, placement, slots
        self._blocks, self._size, self._new = blocks, block_size, max_new_tokens
        self._with_routes = with_routes
        self._drawable = None if drawable is None or drawable.all() else drawable
        self._shape = jax.eval_shape(self._empty)
        self._kept = snapshots * placement.parts
        self._kept_shape = jax.eval_shape(lambda: states(model.init_cache(self._kept, 1)))
        self._compiled: dict[tuple[str, int | None], Any] = {}
        self._called: dict[tuple[Any, ...], Callable] = {}

    @property
    def block(self) -> tuple[tuple[int, ...], Any]:
        """Shape and dtype of the keys and values of a block."""
        data = jax.eval_shape(read_blocks, self._shape, jax.ShapeDtypeStruct((1,), jnp.int32))
        return data.shape[1:], data.dtype

    def compilations(self) -> int:
        """How many programs have been compiled so far, but for changes of layout."""
        return sum(function._cache_size() for (name, _), function in self._compiled.items() if name != "arrange")

    def _empty(self) -> Cache:
        parts = self._placement.parts
        return self._model.init_cache(self._slots * parts, self._size, self._blocks * parts)

    def empty(self) -> tuple[Cache, Array]:
        """Caches of all slots without a token, and the logits [N, V] of each slot's next token."""
        make = lambda: (self._empty(), jnp.zeros(
            (self._slots * self._placement.parts, self._model.config.vocab_size), jnp.float32))
        if self._placement.parallel is None:
            return make()
        return jax.jit(make, out_shardings=self._state())()

    def no_snapshots(self) -> tuple[Cache, Array]:
        """Room for saved states: a cache without keys and values, and logits [K, V]."""
        make = lambda: (states(self._model.init_cache(self._kept, 1)),
                        jnp.zeros((self._kept, self._model.config.vocab_size), jnp.float32))
        return make() if self._placement.parallel is None else jax.jit(make, out_shardings=self._pool())()

    def run(self, name: str, *arguments: Any, key_limit: int | None = None, shape: tuple[int, ...] = ()) -> Any:
        """Calls a program with arguments as `abstract` describes them; over several hosts when all have come here.

        `shape` tells calls of one program apart that are compiled apart.

        Returns:
          arrange: weights. copy and restore: (cache, logits). save: the same of saved states. copy_blocks and
          write_blocks: cache. read_blocks: see inference.cache. prefill: (cache, logits, made), decode too; `made` has,
          where routes are asked for, `routes` [P or D, C or M, L, k] uint16. That of decode has `tokens` [D, M],
          `logprobs` [D, 2, M] and `counts` [D]; that of decode_adjusted also the A most probable `ids` [D, M, A] and
          their log-probabilities `values`, A being the smaller of MAX_ALTERNATIVES and V.
        """
        key = name, key_limit, shape
        if key not in self._called:
            self._called[key] = distributed.met(self.function(name, key_limit))
        return self._called[key](*arguments)

    def function(self, name: str, key_limit: int | None = None) -> Any:
        """The jitted function that `run` calls."""
        key = name, key_limit
        if key not in self._compiled:
            run, donated = {"arrange": (self._arrange, ()), "prefill": (self._prefill, (1, 2)),
                            "copy": (self._copy, ()), "save": (self._save, (0, 1)),
                            "restore": (self._restore, (0, 1)), "copy_blocks": (self._copy_blocks, (0,)),
                            "read_blocks": (self._read_blocks, ()), "write_blocks": (self._write_blocks, (0,)),
                            "decode": (self._decode, (1, 2)),
                            "decode_adjusted": (self._decode_adjusted, (1, 2))}[name]
            if key_limit is not None:
                run = functools.partial(run, key_limit=key_limit)
            options = {}
            if self._placement.parallel is not None:
                rows, state = self._placement.rows, self._state()
                weights = self._placement.shardings(self._model.config, self._model.unrolled)
                others = {"arrange": weights, "save": self._pool(), "read_blocks": rows, "copy_blocks": state[0],
                          "write_blocks": state[0]} | dict.fromkeys(
                    ("prefill", "decode", "decode_adjusted"), (*state, rows))
                options["out_shardings"] = others.get(name, state)
            self._compiled[key] = jax.jit(run, donate_argnums=donated, **options)
        return self._compiled[key]

    def abstract(self, name: str, rows: int, width: int, chunk: int = 1) -> tuple[Any, ...]:
        """Arguments of `prefill` ([rows * parts, chunk] tokens) or `decode` as ShapeDtypeStructs; allocates nothing.

        `width`: W.
        """
        parts, rows_of = self._placement.parts, self._placement.rows
        by_slot = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=rows_of)
        like = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        config, size = self._model.config, rows * parts
        params = jax.eval_shape(self._arrange, abstract_params(config))
        cache = self._shape
        if rows_of is not None:
            params = jax.tree.map(like, params, self._placement.shardings(self._model.config, self._model.unrolled))
            cache = jax.tree.map(like, cache, self._placement.cache_shardings(cache))
        held = params, cache, by_slot(jnp.float32, parts * self._slots, config.vocab_size), by_slot(jnp.int32, size)
        tables = by_slot(jnp.int32, size, width)
        if name == "prefill":
            return (*held, by_slot(jnp.bool_, size), by_slot(jnp.int32, size, chunk), by_slot(jnp.int32, size), tables)
        draw = {"temperature": by_slot(jnp.float32, size), "top_p": by_slot(jnp.float32, size),
                "top_k": by_slot(jnp.int32, size), "min_p": by_slot(jnp.float32, size)}
        return (*held, tables, by_slot(jnp.uint32, size), by_slot(jnp.int32, size), by_slot(jnp.int32, size),
                jax.ShapeDtypeStruct((), jnp.int32), draw, jax.ShapeDtypeStruct((STOP_IDS,), jnp.int32))

    def _state(self) -> Any:
        return self._placement.cache_shardings(self._shape), self._placement.rows

    def _pool(self) -> Any:
        return self._placement.cache_shardings(self._kept_shape), self._placement.rows

    def _arrange(self, params: Any) -> Any:
        """Parameters, stacked and laid out in any way, as the model takes them."""
        return unroll(self._model.config, params) if self._model.unrolled else params

    def _take(self, cache: Cache, logits: Array, indices: Array, fresh: Array) -> tuple[Cache, Array]:
        """States and logits of slots indices[p] of a part, `fresh` ones cleared; S: no slot, whose states are clear."""

        def take(held: Cache, logits: Array, indices: Array, fresh: Array) -> tuple[Cache, Array]:
            nearest = jnp.minimum(indices, self._slots - 1)
            return cache_reset(cache_take(held, nearest), fresh | (indices >= self._slots)), logits[nearest]

        specs = ("held", "rows", "rows", "rows")
        run = self._placement.per_part(take, {"held": states(cache)}, specs, ("held", "rows"))
        return run(states(cache), logits, indices, fresh)

    def _put(self, cache: Cache, logits: Array, new: Cache, indices: Array, rows: Array) -> tuple[Cache, Array]:
        """`cache` with keys and values of `new`, and its states and logits `rows` for slots indices[p] of a part."""

        def put(held: Cache, logits: Array, new: Cache, indices: Array, rows: Array) -> tuple[Cache, Array]:
            return cache_put(held, indices, new), logits.at[indices].set(rows, mode="drop")

        specs = ("held", "rows", "held", "rows", "rows")
        run = self._placement.per_part(put, {"held": states(cache)}, specs, ("held", "rows"))
        held, logits = run(states(cache), logits, states(new), indices, rows)
        return with_states(new, held), logits

    def _prefill(self, params: Any, cache: Cache, logits: Array, indices: Array, fresh: Array, tokens: Array,
                 lengths: Array, tables: Array, key_limit: int) -> tuple[Cache, Array, dict[str, Array]]:
        """Appends lengths[p] of tokens [P, C] to slot indices[p] of its part; S: no slot; `fresh`: cleared first.

        tables [P, W] are the blocks that its keys and values fill.
        """
        held, _ = self._take(cache, logits, indices, fresh)
        out = self._model.apply(
            {"params": params}, tokens, cache=with_states(cache, held), lengths=lengths, with_logits=False,
            key_limit=key_limit, with_routes=self._with_routes, tables=tables)
        last = jnp.take_along_axis(out.hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
        last = self._model.head(params, last)[:, 0].astype(jnp.float32)
        made = {"routes": by_token(out.routes)} if self._with_routes else {}
        target = jnp.where(lengths > 0, indices, self._slots)
        return *self._put(cache, logits, out.cache, target, last), made

    def _copy(self, cache: Cache, logits: Array, source: Array, target: Array) -> tuple[Cache, Array]:
        """Gives slot target[p] of a part the states that slot source[p] has; S: no slot."""

        def copy(held: Cache, logits: Array, source: Array, target: Array) -> tuple[Cache, Array]:
            nearest = jnp.minimum(source, self._slots - 1)
            return (cache_put(held, target, cache_take(held, nearest)),
                    logits.at[target].set(logits[nearest], mode="drop"))

        specs = ("held", "rows", "rows", "rows")
        run = self._placement.per_part(copy, {"held": states(cache)}, specs, ("held", "rows"))
        held, logits = run(states(cache), logits, source, target)
        return with_states(cache, held), logits

    def _copy_blocks(self, cache: Cache, source: Array, target: Array) -> Cache:
        return self._placement.per_part(copy_blocks, {"cache": cache}, ("cache", "rows", "rows"), ("cache",))(
            cache, source, target)

    def _read_blocks(self, cache: Cache, indices: Array) -> Array:
        return self._placement.per_part(read_blocks, {"cache": cache}, ("cache", "rows"), ("rows",))(cache, indices)

    def _write_blocks(self, cache: Cache, indices: Array, data: Array) -> Cache:
        return self._placement.per_part(write_blocks, {"cache": cache}, ("cache", "rows", "rows"), ("cache",))(
            cache, indices, data)

    def _save(self, pool: Cache, pool_logits: Array, cache: Cache, logits: Array, slots: Array, entries: Array
              ) -> tuple[Cache, Array]:
        """Keeps the states of slot slots[p] of a part under entries[p] of its pool; beyond the pool: nothing."""

        def save(pool: Cache, kept: Array, held: Cache, logits: Array, slots: Array, entries: Array
                 ) -> tuple[Cache, Array]:
            return (cache_put(pool, entries, cache_take(held, slots)),
                    kept.at[entries].set(logits[slots], mode="drop"))

        specs = ("pool", "rows", "pool", "rows", "rows", "rows")
        run = self._placement.per_part(save, {"pool": pool}, specs, ("pool", "rows"))
        return run(pool, pool_logits, states(cache), logits, slots, entries)

    def _restore(self, cache: Cache, logits: Array, pool: Cache, pool_logits: Array, slots: Array, entries: Array
                 ) -> tuple[Cache, Array]:
        """Gives slot slots[p] of a part the states, and the length, that entries[p] of its pool holds; S: no slot."""

        def restore(held: Cache, logits: Array, pool: Cache, kept: Array, slots: Array, entries: Array
                    ) -> tuple[Cache, Array]:
            return (cache_put(held, slots, cache_take(pool, entries)),
                    logits.at[slots].set(kept[entries], mode="drop"))

        specs = ("pool", "rows", "pool", "rows", "rows", "rows")
        run = self._placement.per_part(restore, {"pool": pool}, specs, ("pool", "rows"))
        held, logits = run(states(cache), logits, pool, pool_logits, slots, entries)
        return with_states(cache, held), logits

    def _sample(self, logits: Array, seeds: Array, positions: Array, draw: dict[str, Array], chosen_by: Array | None
                ) -> tuple[Array, Array, Array]:
        """sampling.sample of every device's own lanes; the compiler may not see that they do not mix."""
        names, further = list(draw), [] if chosen_by is None else [chosen_by]

        def local(logits: Array, seeds: Array, positions: Array, *rest: Array) -> tuple[Array, Array, Array]:
            return sample(logits, seeds, positions, **dict(zip(names, rest)), drawable=self._drawable,
                          chosen_by=rest[len(names)] if further else None)

        given = (logits, seeds, positions, *draw.values(), *further)
        return self._placement.per_part(local, {}, ("rows",) * len(given), ("rows",) * 3)(*given)

    def _decode(self, *arguments: Any, key_limit: int) -> tuple[Cache, Array, dict[str, Array]]:
        """Samples up to limits[d] tokens for slot indices[d] of its part, until at most `enough` lanes are under way.

        tables [D, W] are the blocks that its keys and values fill, those to come included; S: no slot.
        """
        return self._loop(*arguments, None, key_limit=key_limit)

    def _decode_adjusted(self, *arguments: Any, key_limit: int) -> tuple[Cache, Array, dict[str, Array]]:
        """`_decode` with sampling.adjustments as its last argument, which also names alternatives."""
        return self._loop(*arguments, key_limit=key_limit)

    def _loop(self, params: Any, cache: Cache, logits: Array, indices: Array, tables: Array, seeds: Array,
              positions: Array, limits: Array, enough: Array, draw: dict[str, Array], stop: Array,
              adjust: dict[str, Array] | None, key_limit: int) -> tuple[Cache, Array, dict[str, Array]]:
        count, config, every, all_logits = len(limits), self._model.config, cache, logits
        held, logits = self._take(cache, logits, indices, jnp.zeros_like(limits, bool))
        cache = with_states(cache, held)
        made = {"tokens": jnp.zeros((count, self._new), jnp.int32),
                "logprobs": jnp.zeros((count, 2, self._new), jnp.float32)}
        if self._with_routes:
            each = (config.num_hidden_layers, config.num_experts_per_tok)
            made["routes"] = jnp.zeros((count, self._new, *each), jnp.uint16)
        if adjust is not None:
            size = (count, self._new, min(MAX_ALTERNATIVES, logits.shape[-1]))
            made |= {"counts": adjust["counts"], "ids": jnp.zeros(size, jnp.int32),
                     "values": jnp.zeros(size, jnp.float32)}

        def body(carry: tuple) -> tuple:
            step, cache, logits, active, made, counts = carry
            chosen_by = None if adjust is None else adjusted(logits, adjust | {"counts": made["counts"]})
            token, *both = self._sample(logits, seeds, positions + step, draw, chosen_by)
            token = jnp.where(active, token, 0)
            made = made | {"tokens": made["tokens"].at[:, step].set(token),
                           "logprobs": made["logprobs"].at[:, :, step].set(jnp.stack(both, axis=1))}
            if adjust is not None:
                scores = jax.nn.log_softmax(logits)
                if self._drawable is not None:
                    scores = jnp.where(jnp.asarray(self._drawable)[None], scores, -jnp.inf)
                values, ids = jax.lax.top_k(scores, made["ids"].shape[-1])
                made |= {"ids": made["ids"].at[:, step].set(ids), "values": made["values"].at[:, step].set(values),
                         "counts": made["counts"].at[jnp.arange(count), token].add(active.astype(jnp.int32))}
            out = self._model.apply(
                {"params": params}, token[:, None], cache=cache, lengths=active.astype(jnp.int32), key_limit=key_limit,
                with_routes=self._with_routes, tables=tables)
            if self._with_routes:
                made |= {"routes": made["routes"].at[:, step].set(by_token(out.routes)[:, 0])}
            logits = jnp.where(active[:, None], out.logits[:, 0].astype(jnp.float32), logits)
            counts = counts + active
            active = active & ~jnp.any(token[:, None] == stop[None], axis=-1) & (counts < limits)
            return step + 1, out.cache, logits, active, made, counts

        start = (0, cache, logits, limits > 0, made, jnp.zeros(count, jnp.int32))
        carry = jax.lax.while_loop(lambda carry: jnp.sum(carry[3]) > enough, body, start)
        _, cache, logits, _, made, counts = carry
        made |= {"counts": counts}  # in place of those of the vocabulary
        return *self._put(every, all_logits, cache, indices, logits), made


def by_token(routes: Array) -> Array:
    """Routes [L, B, T, k] of a model as an engine keeps them, [B, T, L, k] uint16."""
    return jnp.moveaxis(routes, 0, 2).astype(jnp.uint16)
