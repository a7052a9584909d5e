"""One contract for every way to run a model: a token's log-probability depends on what came before it, and on no more.

It is kept by a full forward pass, by pieces that go through a cache, by packed rows, by padding on either side, and by
the engine whatever happens to its slots: copies, saved states, slots that were used before, several turns, weights
given anew. All of them are held against a full pass in the recurrent form, the plainest one there is.

What rounding may do is measured, not guessed: the reference is run once more with weights changed by their last bit,
and what that does to the log-probabilities, times SLACK, is the bound. Routes are fixed meanwhile: the reference sends
every token to the experts that the form sent it to, as a choice between two that are as good as each other breaks any
bound. Where it would have chosen others itself is a flip, which is counted apart.

Peers' faults that it knows: left padding that corrupts a state for the whole sequence, states that leak between packed
documents, prefill and decoding that part ways, a prefix that is taken up wrongly or kept over a change of weights.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcn_jax.config import ModelConfig
from qcn_jax.inference.engine import Engine
from qcn_jax.inference.sampling import Sampling
from qcn_jax.model import Qwen3Next
from qcn_jax.sharding.parallel import Parallel

SLACK = 16.0  # times what a change in the last bit of the weights does
LEAST = 1e-6  # of the bound, where that does nothing
PIECE = 24  # tokens of a piece, at most
NEW = 8  # tokens that the engine generates at a time

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Scored:
    """Log-probabilities of tokens[start:] of a sequence, and each token's experts [n, L, k] where these are kept."""

    tokens: list[int]
    start: int
    logprobs: Array
    routes: Array | None = None


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of one form.

    Attributes:
      form: its name.
      compared: tokens.
      worst: the largest difference from the reference, in nats.
      bound: what rounding may do.
      flips: tokens that the reference would have sent to other experts.
    """

    form: str
    compared: int
    worst: float
    bound: float
    flips: int

    @property
    def holds(self) -> bool:
        """Whether the form keeps the contract; what was not compared at all does not."""
        return self.compared > 0 and self.worst <= self.bound


class Reference:
    """Full passes of single sequences in the recurrent form."""

    def __init__(self, config: ModelConfig, params: Any, length: int) -> None:
        """`length`: tokens of the longest sequence."""
        plain = dataclasses.replace(config, delta_rule="recurrent", attention="xla", moe="dense", remat="none")
        self._params, self._length = params, length
        self._each = (config.num_hidden_layers, config.num_experts_per_tok) if config.num_experts else None
        self._apply = jax.jit(lambda *given: _pass(plain, *given))

    def of(self, tokens: Sequence[int], routes: Array | None = None, params: Any = None) -> tuple[Array, Array | None]:
        """Log-probabilities [n - 1] of tokens[1:], and the routes [n, L, k] that are its own.

        Args:
          tokens: n.
          routes: [n, L, k], where to send the tokens; free without.
          params: others than the model's.
        """
        row, segments = np.zeros((1, self._length), np.int32), np.zeros((1, self._length), np.int32)
        row[0, : len(tokens)], segments[0, : len(tokens)] = tokens, 1
        fixed = None
        if self._each is not None:
            fixed = np.full((1, self._length, *self._each), -1, np.int32)
            if routes is not None:
                fixed[0, : len(routes)] = routes
            fixed = np.moveaxis(fixed, 2, 0)
        logits, own = self._apply(self._params if params is None else params, row, segments, fixed)
        scores = _scores(logits[0, : len(tokens) - 1], tokens[1:])
        return scores, None if own is None else np.moveaxis(np.asarray(own)[:, 0, : len(tokens)], 0, 1)


def _pass(config: ModelConfig, params: Any, tokens: jax.Array, segments: jax.Array, routes: jax.Array | None = None,
          parallel: Parallel | None = None) -> tuple[jax.Array, jax.Array | None]:
    out = Qwen3Next(config, parallel=parallel).apply(
        {"params": params}, tokens, segment_ids=segments, routes=routes, with_routes=bool(config.num_experts))
    return out.logits, out.routes


def _scores(logits: Any, targets: Sequence[int]) -> Array:
    logits = np.asarray(logits, np.float64)
    peak = logits.max(-1, keepdims=True)
    scores = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
    return scores[np.arange(len(targets)), list(targets)]


def check(config: ModelConfig, params: Any, *, count: int = 6, length: int = 96, seed: int = 0,
          parallel: Parallel | None = None) -> Iterator[Finding]:
    """Holds every form against the reference, one after the other.

    Args:
      config, params: the model.
      count: random sequences, of 2 to `length` tokens.
      length: see above; at least 64.
      seed: of sequences, pieces and draws.
      parallel: a mesh, for passes of whole rows and for the engine.
    """
    rng = np.random.default_rng(seed)
    lengths = np.unique(np.clip([length, 2, *rng.integers(3, length, count - 2)], 2, length - 2 * NEW - 4))
    sequences = [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]
    here = jax.device_get(params)
    reference = Reference(config, here, length)
    bound = _bound(reference, sequences, here, config)
    forms: dict[str, Callable[[], list[Scored]]] = {
        "whole rows": lambda: _rows(config, params, [[s] for s in sequences], length, "right", parallel),
        "left padding": lambda: _rows(config, params, [[s] for s in sequences], length, "left", parallel),
        "packed rows": lambda: _packed(config, params, sequences, length, parallel),
        "pieces": lambda: _pieces(config, here, sequences, length, rng),
    }
    engine = _Played(config, params, sequences, length, parallel)
    forms |= {name.replace("_", " "): getattr(engine, name) for name in (
        "turns", "copies", "saved_states", "used_slots", "other_weights")}
    for name, run in forms.items():
        yield _compared(name, run(), reference, bound)


def _bound(reference: Reference, sequences: Sequence[list[int]], params: Any, config: ModelConfig) -> float:
    """SLACK times what weights changed in the last bit of the narrower of both dtypes do to log-probabilities."""
    steps = max(float(jnp.finfo(dtype).eps) for dtype in (config.dtype, config.param_dtype))
    rng, worst = np.random.default_rng(0), LEAST / SLACK

    def nudge(leaf: Array) -> Array:
        return (np.asarray(leaf, np.float64) * (1 + steps * rng.choice([-0.5, 0.5], leaf.shape))).astype(leaf.dtype)

    moved = jax.tree.map(nudge, params)
    for tokens in sequences:
        plain, routes = reference.of(tokens)
        other, _ = reference.of(tokens, routes, moved)
        worst = max(worst, float(np.abs(plain - other).max(initial=0.0)))
    return SLACK * worst


def _compared(name: str, found: Sequence[Scored], reference: Reference, bound: float) -> Finding:
    worst, compared, flips = 0.0, 0, 0
    for one in found:
        want, own = reference.of(one.tokens, one.routes)
        if one.routes is not None and own is not None:
            flips += int((np.sort(one.routes, -1) != np.sort(own[: len(one.routes)], -1)).any((1, 2)).sum())
        # A token's log-probability is of the pass over the one before it.
        apart = np.abs(one.logprobs - want[one.start - 1 : one.start - 1 + len(one.logprobs)])
        worst = max(worst, float(np.where(np.isnan(apart), np.inf, apart).max(initial=0.0)))
        compared += len(one.logprobs)
    return Finding(name, compared, worst, bound, flips)


def _rows(config: ModelConfig, params: Any, rows: Sequence[Sequence[list[int]]], length: int, padding: str,
          parallel: Parallel | None) -> list[Scored]:
    """Rows of documents, padded to `length` on one side, as many as devices want."""
    count = len(rows) if parallel is None else -(-len(rows) // (n := parallel.size("activation_batch"))) * n
    tokens, segments, places = np.zeros((count, length), np.int32), np.zeros((count, length), np.int32), []
    for row, documents in enumerate(rows):
        at = length - sum(map(len, documents)) if padding == "left" else 0
        for number, document in enumerate(documents):
            tokens[row, at : at + len(document)] = document
            segments[row, at : at + len(document)] = number + 1
            places.append((row, at, document))
            at += len(document)
    run = jax.jit(lambda params, tokens, segments: _pass(config, params, tokens, segments, None, parallel))
    logits, routes = jax.device_get(run(params, tokens, segments))
    return [Scored(document, 1, _scores(logits[row, at : at + len(document) - 1], document[1:]),
                   None if routes is None else np.moveaxis(routes[:, row, at : at + len(document)], 0, 1))
            for row, at, document in places]


def _packed(config: ModelConfig, params: Any, sequences: Sequence[list[int]], length: int, parallel: Parallel | None
            ) -> list[Scored]:
    """As many short documents in a row as there is room for; the longest alone says nothing here."""
    rows: list[list[list[int]]] = [[]]
    for document in sequences:
        if sum(map(len, rows[-1])) + len(document) > length:
            rows.append([])
        rows[-1].append(document)
    return _rows(config, params, rows, length, "right", parallel)


def _pieces(config: ModelConfig, params: Any, sequences: Sequence[list[int]], length: int, rng: np.random.Generator
            ) -> list[Scored]:
    """Pieces of random sizes, several sequences side by side, each right-padded, through a cache."""
    model, count = Qwen3Next(config), len(sequences)
    run = jax.jit(lambda params, tokens, cache, lengths: model.apply(
        {"params": params}, tokens, cache=cache, lengths=lengths, with_routes=bool(config.num_experts)))
    cache, at = model.init_cache(count, length), np.zeros(count, np.int64)
    logits: list[list[Array]] = [[] for _ in sequences]
    routes: list[list[Array]] = [[] for _ in sequences]
    while any(at[i] < len(tokens) for i, tokens in enumerate(sequences)):
        sizes = np.minimum(rng.integers(0, PIECE + 1, count), [len(t) - a for t, a in zip(sequences, at)])
        pieces = np.zeros((count, PIECE), np.int32)
        for i, size in enumerate(sizes):
            pieces[i, :size] = sequences[i][at[i] : at[i] + size]
        out = run(params, pieces, cache, sizes.astype(np.int32))
        cache = out.cache
        for i, size in enumerate(sizes):
            logits[i].append(np.asarray(out.logits[i, :size]))
            if out.routes is not None:
                routes[i].append(np.moveaxis(np.asarray(out.routes)[:, i, :size], 0, 1))
        at += sizes
    return [Scored(tokens, 1, _scores(np.concatenate(logits[i])[:-1], tokens[1:]),
                   np.concatenate(routes[i]) if routes[i] else None) for i, tokens in enumerate(sequences)]


class _Played:
    """What the engine says of the tokens that it draws, after all that can happen to a slot."""

    def __init__(self, config: ModelConfig, params: Any, sequences: Sequence[list[int]], length: int,
                 parallel: Parallel | None) -> None:
        self._params, self._sequences = params, [list(tokens) for tokens in sequences]
        self._engine = Engine(config, params, slots=2 * len(sequences) + 2, max_length=length, max_new_tokens=NEW,
                              prefill_rows=4, prefill_chunk=16, several_shapes=True, snapshots=len(sequences) + 1,
                              with_routes=bool(config.num_experts), parallel=parallel)
        self._slots = range(min(len(sequences), self._engine.slots))

    def _begin(self) -> dict[int, list[int]]:
        """The sequences in slots that were empty."""
        held = {slot: self._sequences[slot] for slot in self._slots}
        self._engine.reset(range(self._engine.slots))
        self._engine.extend(held)
        return held

    def _draw(self, held: dict[int, list[int]], seed: int, most: int = NEW) -> list[Scored]:
        """Generates for the slots of `held`, to which the tokens are added."""
        slots, found = sorted(held), []
        made = self._engine.generate(slots, seeds=[seed + slot for slot in slots], sampling=Sampling(1.0),
                                     max_new_tokens=most)
        for slot, one in zip(slots, made):
            before, held[slot] = len(held[slot]), held[slot] + one.tokens
            routes = self._engine.routes(slot) if self._engine.with_routes else None
            found.append(Scored(held[slot], before, one.logprobs.astype(np.float64), routes))
        return found

    def turns(self) -> list[Scored]:
        """Answers, observations of unlike lengths, answers."""
        held = self._begin()
        found = self._draw(held, 1)
        added = {slot: self._sequences[0][: slot % 3] or [1] for slot in held}
        self._engine.extend(added)
        held = {slot: tokens + added[slot] for slot, tokens in held.items()}
        return found + self._draw(held, 2)

    def copies(self) -> list[Scored]:
        """Two samples of a prompt, of which only one was prefilled, and the other goes on alone first."""
        held, engine = self._begin(), self._engine
        free = [slot for slot in range(engine.slots) if slot not in held]
        pairs = [(slot, copy) for slot, copy in zip(held, free) if engine.part(slot) == engine.part(copy)]
        engine.fork({slot: [copy] for slot, copy in pairs})
        copies = {copy: held[slot] for slot, copy in pairs}
        found = self._draw(copies, 3) if copies else []
        return found + self._draw(held, 4)

    def saved_states(self) -> list[Scored]:
        """Slots cut back to states that were saved behind their prompts, one of them by way of a copy."""
        held, engine, entries = self._begin(), self._engine, {}
        for slot in held:
            entry = sum(engine.part(slot) == engine.part(other) for other in entries)
            if entry < engine.snapshots:
                entries[slot] = entry
        engine.save(entries)
        self._draw(dict(held), 5)
        engine.restore(entries)
        return self._draw({slot: held[slot] for slot in entries}, 6)

    def used_slots(self) -> list[Scored]:
        """Slots that held other, longer sequences before."""
        engine, longest = self._engine, max(self._sequences, key=len)
        engine.reset(range(engine.slots))
        engine.extend({slot: longest for slot in range(engine.slots)})
        return self._draw(self._begin(), 7)

    def other_weights(self) -> list[Scored]:
        """The same weights given again after others had acted in the same slots."""
        self._engine.params = jax.tree.map(lambda leaf: leaf * jnp.asarray(0.5, leaf.dtype), self._params)
        self._draw(self._begin(), 8, most=2)
        self._engine.params = self._params
        return self._draw(self._begin(), 9)
