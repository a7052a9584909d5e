"""Choosing the next token: temperature, top-k, top-p, with a random stream of each sequence's own.

Axes: B batch, V vocabulary. A sequence draws from `fold_in(key(seed), position)`, so that what it samples
depends on its seed and its own tokens, never on which other sequences happen to share the batch.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

MAX_TOP_K = (1 << 31) - 1  # an int32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw tokens; temperature 0 means the most probable one. top_k 0 and top_p 1 switch both off.

    Raises ValueError for what no device can draw with.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1 and 0 <= self.top_k <= MAX_TOP_K):
            raise ValueError(f"{self}: temperature must be finite and at least 0, top_p above 0 and at most 1, "
                             f"top_k from 0 to {MAX_TOP_K}")


GREEDY = Sampling(temperature=0.0)


def filter_logits(logits: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """Sets to -inf what lies outside of the top k, and then outside of the nucleus of mass p.

    The nucleus is the smallest set of most probable tokens whose mass reaches `top_p`; the most probable
    token always stays (Holtzman et al. 2020, as in Hugging Face's TopPLogitsWarper).

    Args:
      logits: [B, V] float32, already divided by the temperature.
      top_p: [B] float32 in (0, 1].
      top_k: [B] int32; 0 keeps all.

    Returns:
      [B, V] float32.
    """
    vocabulary = logits.shape[-1]
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    kept = jnp.where(top_k > 0, top_k, vocabulary)[:, None]
    ranked = jnp.where(jnp.arange(vocabulary)[None] < kept, ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the strictly better ranks
    ranked = jnp.where((before < top_p[:, None]) | (top_p[:, None] >= 1.0), ranked, -jnp.inf)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.zeros_like(logits).at[rows, order].set(ranked)


def sample(
    logits: jax.Array,
    seeds: jax.Array,
    positions: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    top_k: jax.Array,
    drawable: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws one token a sequence.

    Args:
      logits: [B, V] float32.
      seeds: [B] uint32, one stream a sequence.
      positions: [B] int32, position of the token to draw; the stream's counter.
      temperature: [B] float32; 0 is greedy.
      top_p: [B] float32.
      top_k: [B] int32.
      drawable: [V] bool, the ids that may be drawn; None for all. Like top_p and top_k it is no part of the
        log-probabilities.

    Returns:
      tokens [B] int32, and their log-probabilities twice, [B] float32: under softmax(logits), the model's own, and
      under softmax(logits / temperature), which draws them where no filter is on. Both are the former where the
      temperature is 0.
    """
    greedily = temperature <= 0
    scaled = logits / jnp.where(greedily, 1.0, jnp.maximum(temperature, 1e-6))[:, None]
    allowed = (lambda x: x) if drawable is None else (lambda x: jnp.where(jnp.asarray(drawable)[None], x, -jnp.inf))

    def draw(_: None) -> jax.Array:
        filtered = jax.lax.cond(
            jnp.any((top_p < 1.0) | (top_k > 0)),  # sorting the vocabulary costs more than all the rest
            lambda x: filter_logits(x, top_p, top_k),
            lambda x: x,
            allowed(scaled),
        )
        keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(seeds, positions)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32))(keys)
        return jnp.argmax(filtered + noise, axis=-1)

    greedy = jnp.argmax(allowed(logits), axis=-1)
    random = jax.lax.cond(jnp.all(greedily), lambda _: greedy, draw, None)
    tokens = jnp.where(greedily, greedy, random).astype(jnp.int32)
    of = lambda x: jnp.take_along_axis(x, tokens[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(x, axis=-1)
    return tokens, of(logits), of(scaled)
