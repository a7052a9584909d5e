"""Generation engine: many conversations side by side, each with its own cache slot.

Axes: N slots, P prefill rows, C prefill chunk, M new tokens, V vocabulary. Everything compiled has one fixed
shape, whatever the conversations look like: one prefill of [P, C] tokens that is called as often as the
prompts need, one copy of cache rows, and one decoding loop over all N slots that runs inside the jitted
function until every active slot, or all but a few, has met a stop token or its limit. Prefill and decoding are
compiled once more each time the longest sequence outgrows the part of the cache that attention reads.

What a slot generates depends on its tokens, its seed and the weights, not on the other slots (but for rounding:
longer neighbours may make attention read more of the empty cache). Weights are an argument of the compiled
functions: `engine.params = new` costs nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.inference.cache import cache_put, cache_reset, cache_take
from qcn_jax.inference.sampling import Sampling, sample
from qcn_jax.model import Qwen3Next, unroll

FIRST_KEY_LIMIT = 256  # attention reads this many cached tokens, or twice as many, and so on up to the capacity
UNROLL_BYTES = 1 << 30  # parameters up to this size are also kept layer by layer
NOT_FINITE = "the model's logits are not finite: its weights hold NaN or infinity, or overflow its dtype"
STOP_IDS = 8  # stop ids are padded to a multiple of this, so that their number is not part of the compiled shape


@dataclasses.dataclass(frozen=True)
class Generation:
    """One turn of one slot.

    `tokens` end with the stop token when `finish` is "stop"; "length" is the limit of new tokens or of the slot;
    "paused" turns may be continued by the next `generate`. `logprobs` [len(tokens)] float32 are the
    model's own, of softmax(logits); `drawn_logprobs` those of softmax(logits / temperature), which reinforcement
    learning compares with, and at temperature 0 the same as `logprobs`. Neither knows of top_p and top_k.
    """

    tokens: list[int]
    logprobs: np.ndarray
    drawn_logprobs: np.ndarray
    finish: Literal["stop", "length", "paused"]


class Engine:
    """Continues up to `slots` token sequences of up to `max_length` tokens each.

    Usual course: `reset` slots, `extend` one with a prompt, `fork` it to the others of its group, `generate`,
    `extend` with what the environment answered, `generate` again.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        *,
        slots: int,
        max_length: int,
        max_new_tokens: int = 64,
        stop_ids: Sequence[int] = (),
        prefill_rows: int = 16,
        prefill_chunk: int = 64,
        unrolled: bool | None = None,
        drawable: np.ndarray | None = None,
    ) -> None:
        """Allocates the caches; nothing is compiled before the first use.

        Args:
          config: the model's configuration.
          params: its parameter tree.
          slots: N, sequences held at a time.
          max_length: tokens a slot can hold, prompt and answers together.
          max_new_tokens: M, the most that one `generate` call can give a slot.
          stop_ids: tokens that end a turn.
          prefill_rows: P, slots that one prefill call works on.
          prefill_chunk: C, tokens of each of them that it takes in.
          unrolled: compile every layer apart, which decodes faster (no copies of the weights and caches that a
            scan slices), compiles longer by the number of layers, and holds the weights twice. By default so
            for small models.
          drawable: [V] bool, the ids that may be generated, e.g. those of the tokenizer; None for all.
        """
        self.config = config
        if unrolled is None:
            unrolled = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) <= UNROLL_BYTES
        self._model = model = Qwen3Next(config, unrolled=unrolled)
        self.params = params
        self.slots = slots
        self.max_length = max_length
        self.max_new_tokens = max_new_tokens
        self._rows = min(prefill_rows, slots)
        self._chunk = min(prefill_chunk, max_length)
        self._stop = np.full(max(1, -(-len(stop_ids) // STOP_IDS)) * STOP_IDS, -1, np.int32)
        self._stop[: len(stop_ids)] = stop_ids
        drawable = None if drawable is None or drawable.all() else jnp.asarray(drawable)
        self._lengths = np.zeros(slots, np.int64)
        self._cache = model.init_cache(slots, max_length)
        self._logits = jnp.zeros((slots, config.vocab_size), jnp.float32)  # of each slot's next token

        def prefill(params, cache, logits, indices, fresh, tokens, lengths, key_limit):
            """Appends lengths[p] of tokens [P, C] to slot indices[p]; an index of N means no slot."""
            rows = cache_reset(cache_take(cache, jnp.minimum(indices, slots - 1)), fresh)
            out = model.apply(
                {"params": params}, tokens, cache=rows, lengths=lengths, with_logits=False, key_limit=key_limit
            )
            last = jnp.take_along_axis(out.hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
            last = model.head(params, last)[:, 0].astype(jnp.float32)
            target = jnp.where(lengths > 0, indices, slots)
            return cache_put(cache, indices, out.cache), logits.at[target].set(last, mode="drop")

        def copy(cache, logits, source):
            """Slot n becomes a copy of slot source[n]."""
            return cache_take(cache, source), logits[source]

        def decode(params, cache, logits, seeds, positions, limits, enough, draw, stop, key_limit):
            """Samples up to limits[n] tokens for every slot; returns tokens [N, M], logprobs [2, N, M], counts [N]."""

            def body(carry):
                step, cache, logits, active, tokens, logprobs, counts = carry
                token, *scores = sample(logits, seeds, positions + step, **draw, drawable=drawable)
                token = jnp.where(active, token, 0)
                tokens = tokens.at[:, step].set(token)
                logprobs = logprobs.at[:, :, step].set(jnp.stack(scores))
                out = model.apply(
                    {"params": params}, token[:, None], cache=cache, lengths=active.astype(jnp.int32),
                    key_limit=key_limit,
                )  # fmt: skip
                logits = jnp.where(active[:, None], out.logits[:, 0].astype(jnp.float32), logits)
                counts = counts + active
                active = active & ~jnp.any(token[:, None] == stop[None], axis=-1) & (counts < limits)
                return step + 1, out.cache, logits, active, tokens, logprobs, counts

            shape = (slots, max_new_tokens)
            start = (0, cache, logits, limits > 0, jnp.zeros(shape, jnp.int32), jnp.zeros((2, *shape), jnp.float32))
            carry = jax.lax.while_loop(lambda c: jnp.sum(c[3]) > enough, body, (*start, jnp.zeros(slots, jnp.int32)))
            _, cache, logits, _, tokens, logprobs, counts = carry
            return cache, logits, tokens, logprobs, counts

        self._prefill = jax.jit(prefill, donate_argnums=(1, 2), static_argnames="key_limit")
        self._copy = jax.jit(copy)
        self._decode = jax.jit(decode, donate_argnums=(1, 2), static_argnames="key_limit")
        self._fresh = np.ones(slots, bool)  # the slot's cache rows are to be cleared before their next use

    @property
    def params(self) -> Any:
        """The model's parameter tree; assigning another tree of the same shapes acts at once."""
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        self._params = params
        self._weights = unroll(self.config, params) if self._model.unrolled else params

    def length(self, slot: int) -> int:
        """Tokens that `slot` holds."""
        return int(self._lengths[slot])

    def compilations(self) -> int:
        """How many shapes have been compiled so far: one of copying, one of prefill and decoding per key limit."""
        return sum(function._cache_size() for function in (self._prefill, self._copy, self._decode))

    def reset(self, slots: Sequence[int]) -> None:
        """Empties slots; the clearing itself happens with their next prefill."""
        self._lengths[list(slots)] = 0
        self._fresh[list(slots)] = True

    def extend(self, tokens: Mapping[int, Sequence[int]]) -> None:
        """Appends tokens to slots (slot -> tokens), in prefill calls of P slots by C tokens.

        Raises:
          ValueError: a slot would hold more than `max_length` tokens.
        """
        for slot, added in tokens.items():
            if self._lengths[slot] + len(added) > self.max_length:
                raise ValueError(
                    f"slot {slot} holds {self._lengths[slot]} tokens; {len(added)} more exceed {self.max_length}"
                )
        order = sorted((slot for slot in tokens if len(tokens[slot])), key=lambda slot: (-len(tokens[slot]), slot))
        for first in range(0, len(order), self._rows):
            group = order[first : first + self._rows]
            for start in range(0, len(tokens[group[0]]), self._chunk):
                self._prefill_chunk(group, [tokens[slot][start : start + self._chunk] for slot in group])

    def _prefill_chunk(self, group: Sequence[int], pieces: Sequence[Sequence[int]]) -> None:
        indices = np.full(self._rows, self.slots, np.int32)
        fresh = np.zeros(self._rows, bool)
        tokens = np.zeros((self._rows, self._chunk), np.int32)
        lengths = np.zeros(self._rows, np.int32)
        for row, (slot, piece) in enumerate(zip(group, pieces)):
            indices[row], fresh[row], lengths[row] = slot, self._fresh[slot], len(piece)
            tokens[row, : len(piece)] = piece
            self._fresh[slot] = False
            self._lengths[slot] += len(piece)
        self._cache, self._logits = self._prefill(
            self._weights, self._cache, self._logits, indices, fresh, tokens, lengths,
            key_limit=self._key_limit(int(self._lengths[list(group)].max())),
        )  # fmt: skip

    def _key_limit(self, longest: int) -> int:
        """How much of the cache attention must read for sequences of up to `longest` tokens."""
        limit = FIRST_KEY_LIMIT
        while limit < longest:
            limit *= 2
        return min(limit, self.max_length)

    def fork(self, copies: Mapping[int, Sequence[int]]) -> None:
        """Makes slots copies of others (source -> targets), so that one prefill serves a whole group."""
        source = np.arange(self.slots, dtype=np.int32)
        for origin, targets in copies.items():
            for target in targets:
                source[target] = origin
        self._cache, self._logits = self._copy(self._cache, self._logits, source)
        self._lengths, self._fresh = self._lengths[source], self._fresh[source]

    def generate(
        self,
        slots: Sequence[int],
        *,
        seeds: Sequence[int],
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        max_new_tokens: int | Sequence[int] | None = None,
        enough: int = 0,
    ) -> list[Generation]:
        """Generates one turn for each of `slots`, which must hold at least one token.

        Args:
          slots: which slots; the others stay as they are.
          seeds: one random stream a slot; the same seed may serve a conversation's every turn, because the
            stream counts positions.
          sampling: how to draw, for all or one each.
          max_new_tokens: at most this many, for all or one each; never past a slot's `max_length`.
          enough: stop once no more than this many slots are still generating, so that a few long turns do not
            keep all others waiting. Less than the number of slots.

        Returns:
          One Generation a slot, in the order of `slots`. All their tokens, a stop token included, are in the
          slot afterwards.

        Raises:
          UserError: the model's logits are not finite.
        """
        chosen = np.asarray(slots, np.int64)
        if (self._lengths[chosen] == 0).any():
            raise ValueError("generate needs slots that hold a prompt")
        draws = [sampling] * len(chosen) if isinstance(sampling, Sampling) else list(sampling)
        wanted = self.max_new_tokens if max_new_tokens is None else np.asarray(max_new_tokens)
        limits = np.zeros(self.slots, np.int32)
        limits[chosen] = np.minimum(np.minimum(wanted, self.max_new_tokens), self.max_length - self._lengths[chosen])
        draw = {}
        for name, dtype in (("temperature", np.float32), ("top_p", np.float32), ("top_k", np.int32)):
            draw[name] = np.full(self.slots, getattr(Sampling(0.0), name), dtype)
            draw[name][chosen] = [getattr(one, name) for one in draws]
        streams = np.zeros(self.slots, np.uint32)
        streams[chosen] = np.asarray(seeds, np.uint64) & 0xFFFFFFFF
        self._cache, self._logits, tokens, logprobs, counts = self._decode(
            self._weights, self._cache, self._logits, streams, self._lengths.astype(np.int32), limits,
            np.int32(enough), draw, self._stop,
            key_limit=self._key_limit(int((self._lengths[chosen] + limits[chosen]).max(initial=0))),
        )  # fmt: skip
        tokens, logprobs, counts = np.asarray(tokens), np.asarray(logprobs), np.asarray(counts)
        if any(np.isnan(logprobs[:, slot, : counts[slot]]).any() for slot in chosen):
            raise UserError(NOT_FINITE)
        self._lengths = self._lengths + counts
        results = []
        for slot in chosen:
            new = tokens[slot, : counts[slot]].tolist()
            ended = "length" if counts[slot] == limits[slot] else "paused"
            finish = "stop" if new and new[-1] in self._stop else ended
            results.append(Generation(new, *logprobs[:, slot, : counts[slot]].copy(), finish))
        return results
