"""Choosing the next token: penalties and biases, temperature, min-p, top-k, top-p, a random stream for each sequence.

Axes: B batch, V vocabulary. A sequence draws from `fold_in(key(seed), position)`, so that what it samples
depends on its seed and its own tokens, never on which other sequences happen to share the batch.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

MAX_TOP_K = (1 << 31) - 1  # an int32
MAX_ALTERNATIVES = 20  # as OpenAI's API has it
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw tokens; the defaults switch everything off.

    Attributes:
      temperature: 0 means the most probable token.
      top_p, top_k: see `filter_logits`.
      min_p: tokens less probable than this share of the most probable one are not drawn.
      presence_penalty, frequency_penalty: taken off the logits of tokens generated before, once and for each time, as
        OpenAI's API has it.
      repetition_penalty: divides positive logits of tokens in prompt and answer and multiplies negative ones
        (Keskar et al. 2019, section 4.1).
      logit_bias: (id, what is added to its logit), an id once.
      alternatives: how many of the most probable tokens to name beside each that was drawn.

    Raises ValueError for what no device can draw with.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    alternatives: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1 and 0 <= self.top_k <= MAX_TOP_K
                and 0 <= self.min_p <= 1 and 0 <= self.alternatives <= MAX_ALTERNATIVES):
            raise ValueError(f"{self}: temperature must be finite and at least 0, top_p above 0 and at most 1, "
                             f"top_k from 0 to {MAX_TOP_K}, min_p from 0 to 1, alternatives at most {MAX_ALTERNATIVES}")
        amounts = (self.presence_penalty, self.frequency_penalty, *(amount for _, amount in self.logit_bias))
        if not (all(map(math.isfinite, amounts)) and 0 < self.repetition_penalty < math.inf):
            raise ValueError(f"{self}: penalties and biases must be finite, repetition_penalty above 0")

    @property
    def adjusts(self) -> bool:
        """Whether it takes more than the logits: what was said before, biases, or alternatives."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1 or self.logit_bias
                    or self.alternatives)


@dataclasses.dataclass(frozen=True)
class History:
    """The tokens of a sequence: its prompt, and what was generated since."""

    prompt: Sequence[int]
    generated: Sequence[int]


def adjustments(draws: Sequence[Sampling], histories: Sequence[History], vocabulary: int) -> dict[str, np.ndarray]:
    """What `adjusted` takes, for B sequences.

    Returns:
      counts [B, V] int32 of tokens generated, prompt [B, V] bool, bias [B, V] float32, and the penalties [B] float32.

    Raises:
      ValueError: a bias of an id that is not in the vocabulary.
    """
    size = (len(draws), vocabulary)
    made = {"counts": np.zeros(size, np.int32), "prompt": np.zeros(size, bool), "bias": np.zeros(size, np.float32)}
    for row, (draw, history) in enumerate(zip(draws, histories, strict=True)):
        np.add.at(made["counts"][row], np.asarray(history.generated, np.int64), 1)
        made["prompt"][row, np.asarray(history.prompt, np.int64)] = True
        for id_, amount in draw.logit_bias:
            if not 0 <= id_ < vocabulary:
                raise ValueError(f"logit_bias: {id_} is no id below {vocabulary}")
            made["bias"][row, id_] = amount
    for name in PENALTIES:
        made[name] = np.array([getattr(draw, name) for draw in draws], np.float32)
    return made


def adjusted(logits: jax.Array, adjust: Mapping[str, jax.Array]) -> jax.Array:
    """Logits [B, V] with `adjustments`: the repetition penalty first, then the other two, then biases."""
    column = lambda name: adjust[name][:, None]
    counts = adjust["counts"]
    said, repetition = adjust["prompt"] | (counts > 0), column("repetition_penalty")
    logits = jnp.where(said, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    off = column("frequency_penalty") * counts + column("presence_penalty") * (counts > 0)
    return logits - off + adjust["bias"]


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
    min_p: jax.Array,
    drawable: jax.Array | None = None,
    chosen_by: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws one token a sequence.

    Args:
      logits: [B, V] float32.
      seeds: [B] uint32, one stream a sequence.
      positions: [B] int32, position of the token to draw; the stream's counter.
      temperature: [B] float32; 0 is greedy.
      top_p: [B] float32.
      top_k: [B] int32.
      min_p: [B] float32 in [0, 1].
      drawable: [V] bool, the ids that may be drawn; None for all. Like the three before it is no part of the
        log-probabilities.
      chosen_by: [B, V] float32, adjusted logits to draw by instead; None for `logits` themselves.

    Returns:
      tokens [B] int32, and their log-probabilities twice, [B] float32: under softmax(logits), the model's own, and
      under softmax(chosen_by / temperature), which draws them where no filter is on. Both are the former where the
      temperature is 0.
    """
    greedily = temperature <= 0
    own, logits = logits, logits if chosen_by is None else chosen_by
    scaled = logits / jnp.where(greedily, 1.0, jnp.maximum(temperature, 1e-6))[:, None]
    allowed = (lambda x: x) if drawable is None else (lambda x: jnp.where(jnp.asarray(drawable)[None], x, -jnp.inf))

    def probable(x: jax.Array) -> jax.Array:
        return jnp.where(x < jnp.max(x, axis=-1, keepdims=True) + jnp.log(min_p)[:, None], -jnp.inf, x)

    def draw(_: None) -> jax.Array:
        filtered = jax.lax.cond(
            jnp.any((top_p < 1.0) | (top_k > 0)),  # sorting the vocabulary costs more than all the rest
            lambda x: filter_logits(x, top_p, top_k),
            lambda x: x,
            probable(allowed(scaled)),
        )
        keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(seeds, positions)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32))(keys)
        return jnp.argmax(filtered + noise, axis=-1)

    greedy = jnp.argmax(allowed(logits), axis=-1)
    random = jax.lax.cond(jnp.all(greedily), lambda _: greedy, draw, None)
    tokens = jnp.where(greedily, greedy, random).astype(jnp.int32)
    of = lambda x: jnp.take_along_axis(x, tokens[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(x, axis=-1)
    drawn_by = scaled if chosen_by is None else jnp.where(greedily[:, None], own, scaled)
    return tokens, of(own), of(drawn_by)
