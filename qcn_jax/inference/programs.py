"""The compiled functions of an engine: prefill, copy and decode, each over all slots of all devices.

Axes: N slots and P prefill rows over all parts of the placement, S slots of a part, C prefill chunk, M new tokens, V
vocabulary. Indices of slots are those within a part.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcn_jax.inference.cache import cache_put, cache_reset, cache_take, clear_rows, states, with_states
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
        self, model: Qwen3Next, placement: Placement, slots: int, max_length: int, max_new_tokens: int,
        drawable: np.ndarray | None = None, snapshots: int = 0,
        with_routes: bool = False,
    ) -> None:  # fmt: skip
        """Compiles nothing yet.

        Args:
          model: over `placement.parallel`.
          placement: where slots lie.
          slots: of each part.
          max_length, max_new_tokens, drawable: see Engine.
          snapshots: saved states of each part.
          with_routes: give the experts of every token that the model is given.
        """
        self._model, self._placement, self._slots = model, placement, slots
        self._max_length, self._new = max_length, max_new_tokens
        self._with_routes = with_routes
        self._drawable = None if drawable is None or drawable.all() else drawable
        self._shape = jax.eval_shape(lambda: model.init_cache(slots * placement.parts, max_length))
        self._kept = snapshots * placement.parts
        self._kept_shape = jax.eval_shape(lambda: states(model.init_cache(self._kept, 1)))
        self._compiled: dict[tuple[str, int | None], Any] = {}
        self._called: dict[tuple[Any, ...], Callable] = {}

    def compilations(self) -> int:
        """How many programs have been compiled so far, but for changes of layout."""
        return sum(function._cache_size() for (name, _), function in self._compiled.items() if name != "arrange")

    def empty(self) -> tuple[Cache, Array]:
        """Caches of all slots without a token, and the logits [N, V] of each slot's next token."""
        count, model = self._slots * self._placement.parts, self._model
        make = lambda: (model.init_cache(count, self._max_length),
                        jnp.zeros((count, model.config.vocab_size), jnp.float32))
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
          arrange: weights. copy and restore: (cache, logits). save: the same of saved states. prefill: (cache, logits,
          made), decode too; `made` has, where routes are asked for, `routes` [P or N, C or M, L, k] uint16. That of
          decode has `tokens` [N, M], `logprobs` [N, 2, M] and `counts` [N]; that of decode_adjusted also the A most
          probable `ids` [N, M, A] and their log-probabilities `values`, A being the smaller of MAX_ALTERNATIVES and V.
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
                            "restore": (self._restore, (0, 1)), "decode": (self._decode, (1, 2)),
                            "decode_adjusted": (self._decode_adjusted, (1, 2))}[name]
            if key_limit is not None:
                run = functools.partial(run, key_limit=key_limit)
            options = {}
            if self._placement.parallel is not None:
                rows, state = self._placement.rows, self._state()
                weights = self._placement.shardings(self._model.config, self._model.unrolled)
                others = {"arrange": weights, "save": self._pool()} | dict.fromkeys(
                    ("prefill", "decode", "decode_adjusted"), (*state, rows))
                options["out_shardings"] = others.get(name, state)
            self._compiled[key] = jax.jit(run, donate_argnums=donated, **options)
        return self._compiled[key]

    def abstract(self, name: str, rows: int = 1, chunk: int = 1) -> tuple[Any, ...]:
        """Arguments of `prefill` ([rows * parts, chunk] tokens) or `decode` as ShapeDtypeStructs; allocates nothing."""
        parts, rows_of = self._placement.parts, self._placement.rows
        by_slot = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=rows_of)
        like = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        config, count = self._model.config, parts * self._slots
        params = jax.eval_shape(self._arrange, abstract_params(config))
        cache = self._shape
        if rows_of is not None:
            params = jax.tree.map(like, params, self._placement.shardings(self._model.config, self._model.unrolled))
            cache = jax.tree.map(like, cache, self._placement.cache_shardings(cache))
        held = params, cache, by_slot(jnp.float32, count, config.vocab_size)
        if name == "prefill":
            size = rows * parts
            return (*held, by_slot(jnp.int32, size), by_slot(jnp.bool_, size), by_slot(jnp.int32, size, chunk),
                    by_slot(jnp.int32, size))
        draw = {"temperature": by_slot(jnp.float32, count), "top_p": by_slot(jnp.float32, count),
                "top_k": by_slot(jnp.int32, count), "min_p": by_slot(jnp.float32, count)}
        return (*held, by_slot(jnp.uint32, count), by_slot(jnp.int32, count), by_slot(jnp.int32, count),
                jax.ShapeDtypeStruct((), jnp.int32), draw, jax.ShapeDtypeStruct((STOP_IDS,), jnp.int32))

    def _state(self) -> Any:
        return self._placement.cache_shardings(self._shape), self._placement.rows

    def _pool(self) -> Any:
        return self._placement.cache_shardings(self._kept_shape), self._placement.rows

    def _arrange(self, params: Any) -> Any:
        """Parameters, stacked and laid out in any way, as the model takes them."""
        return unroll(self._model.config, params) if self._model.unrolled else params

    def _prefill(self, params: Any, cache: Cache, logits: Array, indices: Array, fresh: Array, tokens: Array,
                 lengths: Array, key_limit: int) -> tuple[Cache, Array, dict[str, Array]]:
        """Appends lengths[p] of tokens [P, C] to slot indices[p] of its part; S: no slot; `fresh`: cleared first."""
        slots, stepwise = self._slots, self._model.unrolled
        specs = {"cache": cache, "held": states(cache)}

        def take(cache: Cache, indices: Array, fresh: Array) -> tuple[Cache, ...]:
            nearest = jnp.minimum(indices, slots - 1)
            if not stepwise:  # a scan over layers would copy the keys and values of all slots
                return (cache_reset(cache_take(cache, nearest), fresh),)
            # Keys and values stay where they are, and are written there.
            return cache_reset(cache_take(states(cache), nearest), fresh), clear_rows(cache, indices, fresh)

        def put(cache: Cache, logits: Array, indices: Array, lengths: Array, rows: Cache, last: Array
                ) -> tuple[Cache, Array]:
            target = jnp.where(lengths > 0, indices, slots)
            return cache_put(cache, indices, rows), logits.at[target].set(last, mode="drop")

        run = functools.partial(self._placement.per_part, caches=specs)
        taken = ("held", "cache") if stepwise else ("cache",)
        rows, *cleared = run(take, in_specs=("cache", "rows", "rows"), out_specs=taken)(cache, indices, fresh)
        out = self._model.apply(
            {"params": params}, tokens, cache=with_states(cleared[0], rows) if stepwise else rows, lengths=lengths,
            with_logits=False, key_limit=key_limit, with_routes=self._with_routes, rows=indices if stepwise else None)
        last = jnp.take_along_axis(out.hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
        last = self._model.head(params, last)[:, 0].astype(jnp.float32)
        made = {"routes": by_token(out.routes)} if self._with_routes else {}
        kind, old, new = ("held", states(cache), states(out.cache)) if stepwise else ("cache", cache, out.cache)
        store = run(put, in_specs=(kind, "rows", "rows", "rows", kind, "rows"), out_specs=(kind, "rows"))
        stored, logits = store(old, logits, indices, lengths, new, last)
        return with_states(out.cache, stored) if stepwise else stored, logits, made

    def _copy(self, cache: Cache, logits: Array, source: Array) -> tuple[Cache, Array]:
        """Slot n becomes a copy of slot source[n] of its part."""
        take = lambda cache, logits, source: (cache_take(cache, source), logits[source])
        run = self._placement.per_part(take, {"cache": cache}, ("cache", "rows", "rows"), ("cache", "rows"))
        return run(cache, logits, source)

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

    def _decode(self, *arguments: Any, key_limit: int) -> tuple[Cache, Array, dict[str, Array]]:
        """Samples up to limits[n] tokens for every slot, until no more than `enough` slots are under way."""
        return self._loop(*arguments, None, key_limit=key_limit)

    def _decode_adjusted(self, *arguments: Any, key_limit: int) -> tuple[Cache, Array, dict[str, Array]]:
        """`_decode` with sampling.adjustments as its last argument, which also names alternatives."""
        return self._loop(*arguments, key_limit=key_limit)

    def _loop(self, params: Any, cache: Cache, logits: Array, seeds: Array, positions: Array, limits: Array,
              enough: Array, draw: dict[str, Array], stop: Array, adjust: dict[str, Array] | None, key_limit: int
              ) -> tuple[Cache, Array, dict[str, Array]]:
        count, config = len(limits), self._model.config
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
            token, *both = sample(
                logits, seeds, positions + step, **draw, drawable=self._drawable, chosen_by=chosen_by)
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
                with_routes=self._with_routes)
            if self._with_routes:
                made |= {"routes": made["routes"].at[:, step].set(by_token(out.routes)[:, 0])}
            logits = jnp.where(active[:, None], out.logits[:, 0].astype(jnp.float32), logits)
            counts = counts + active
            active = active & ~jnp.any(token[:, None] == stop[None], axis=-1) & (counts < limits)
            return step + 1, out.cache, logits, active, made, counts

        start = (0, cache, logits, limits > 0, made, jnp.zeros(count, jnp.int32))
        carry = jax.lax.while_loop(lambda carry: jnp.sum(carry[3]) > enough, body, start)
        _, cache, logits, _, made, counts = carry
        return cache, logits, made | {"counts": counts}  # in place of those of the vocabulary


def by_token(routes: Array) -> Array:
    """Routes [L, B, T, k] of a model as an engine keeps them, [B, T, L, k] uint16."""
    return jnp.moveaxis(routes, 0, 2).astype(jnp.uint16)
