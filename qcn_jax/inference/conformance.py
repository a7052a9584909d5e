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
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.inference.conformance_engine import NEW, Played
from qcn_jax.inference.conformance_scores import Scored, apart, scores
from qcn_jax.inference.generation import NOT_FINITE
from qcn_jax.model import Qwen3Next
from qcn_jax.sharding.parallel import Parallel

SLACK = 16.0  # times what a change in the last bit of the weights does
LEAST = 1e-6  # of the bound, where that does nothing
PIECE = 24  # tokens of a piece, at most
OF_ENGINE = ("turns", "copies", "saved states", "used slots", "other weights", "sampling", "served")
FORMS = ("whole rows", "left padding", "packed rows", "pieces", *OF_ENGINE, "growing limits", "few blocks",
         "scanned layers")
KERNELS = "kernels"  # a form of its own, as anything but a TPU interprets them, which is slow

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of one form.

    Attributes:
      form: its name.
      compared: tokens.
      worst: the largest difference from the reference, in nats.
      bound: what rounding may do.
      flips: tokens that the reference would have sent to other experts.
      refused: in what words the form ended instead, such as that logits are not finite.
    """

    form: str
    compared: int
    worst: float
    bound: float
    flips: int
    refused: str = ""

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
        """Logits [n - 1, V] of tokens[1:], and the routes [n, L, k] that are its own.

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
                fixed[0, : min(len(routes), self._length)] = routes[: self._length]
            fixed = np.moveaxis(fixed, 2, 0)
        logits, own = self._apply(self._params if params is None else params, row, segments, fixed)
        own = None if own is None else np.moveaxis(np.asarray(own)[:, 0, : len(tokens)], 0, 1)
        return np.asarray(logits[0, : len(tokens) - 1]), own


def _pass(config: ModelConfig, params: Any, tokens: jax.Array, segments: jax.Array, routes: jax.Array | None = None,
          parallel: Parallel | None = None) -> tuple[jax.Array, jax.Array | None]:
    out = Qwen3Next(config, parallel=parallel).apply(
        {"params": params}, tokens, segment_ids=segments, routes=routes, with_routes=bool(config.num_experts))
    return out.logits, out.routes


def check(config: ModelConfig, params: Any, *, count: int = 6, length: int = 96, seed: int = 0,
          parallel: Parallel | None = None, forms: Sequence[str] = FORMS) -> Iterator[Finding]:
    """Holds every form against the reference, one after the other.

    Args:
      config, params: the model.
      count: random sequences, of 2 to `length` tokens.
      length: see above; at least 64.
      seed: of sequences, pieces and draws.
      parallel: a mesh, for passes of whole rows and for the engine.
      forms: of FORMS and KERNELS, in the order wanted.

    Raises:
      UserError: an unknown form, or logits of the reference that are not finite.
    """
    rng = np.random.default_rng(seed)
    lengths = np.unique(np.clip([length, 2, *rng.integers(3, length, count - 2)], 2, length - 2 * NEW - 4))
    sequences = [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]
    here = jax.device_get(params)
    rows = lambda padding: _rows(config, params, [[s] for s in sequences], length, padding, parallel)
    few = (sequences[0], sequences[-1])
    engine = functools.cache(lambda: Played(config, params, sequences, length, parallel, several_shapes=True))
    known: dict[str, Callable[[], list[Scored]]] = {
        "whole rows": lambda: rows("right"),
        "left padding": lambda: rows("left"),
        "packed rows": lambda: _packed(config, params, sequences, length, parallel),
        "pieces": lambda: _pieces(config, here, sequences, length, np.random.default_rng(seed)),
        **{name: lambda method=name.replace(" ", "_"): getattr(engine(), method)() for name in OF_ENGINE},
        # Decoding outgrows the part of the cache that the longest prompt needs.
        "growing limits": lambda: Played(
            config, params, few, length, parallel, key_limit=(length - 2 * NEW) // 2).turns(),
        # Most of what slots hold is in host memory, and they decode a few at a time.
        "few blocks": lambda: Played(config, params, sequences, length, parallel, few_blocks=True).events(),
        "scanned layers": lambda: Played(config, params, few, length, parallel, unrolled=False).events(),
        KERNELS: lambda: _by_kernels(config, params, few, length, parallel, seed),
    }
    unknown = [form for form in forms if form not in known]
    if unknown:
        raise UserError(f"forms: unknown {', '.join(unknown)}; allowed: {', '.join(known)}")
    reference = Reference(config, here, length)
    bound = _bound(reference, sequences, here, config)
    for name in forms:
        try:
            scored = known[name]()
        except UserError as error:
            yield Finding(name, 0, math.inf, bound, 0, str(error))
        else:
            yield _compared(name, scored, reference, bound)


def _by_kernels(config: ModelConfig, params: Any, sequences: Sequence[list[int]], length: int,
                parallel: Parallel | None, seed: int) -> list[Scored]:
    config = dataclasses.replace(config, delta_rule="pallas", attention="splash")
    pieces = _pieces(config, jax.device_get(params), sequences, length, np.random.default_rng(seed))
    return pieces + Played(config, params, sequences, length, parallel).events()


def _bound(reference: Reference, sequences: Sequence[list[int]], params: Any, config: ModelConfig) -> float:
    """SLACK times what weights changed in the last bit of the narrower of both dtypes do to log-probabilities."""
    steps = max(float(jnp.finfo(dtype).eps) for dtype in (config.dtype, config.param_dtype))
    rng, worst = np.random.default_rng(0), LEAST / SLACK

    def nudge(leaf: Array) -> Array:
        return (np.asarray(leaf, np.float64) * (1 + steps * rng.choice([-0.5, 0.5], leaf.shape))).astype(leaf.dtype)

    moved = jax.tree.map(nudge, params)
    for tokens in sequences:
        plain, routes = reference.of(tokens)
        if not np.isfinite(plain).all():
            raise UserError(NOT_FINITE)
        other, _ = reference.of(tokens, routes, moved)
        moves = scores(plain, tokens[1:]) - scores(other, tokens[1:])
        worst = max(worst, float(np.abs(moves).max(initial=0.0)))
    return SLACK * worst


def _compared(name: str, found: Sequence[Scored], reference: Reference, bound: float) -> Finding:
    worst, compared, flips = 0.0, 0, 0
    for one in found:
        logits, own = reference.of(one.tokens, one.routes, one.params)
        if one.routes is not None and own is not None:
            chosen = one.routes[: len(own)]
            flips += int((np.sort(chosen, -1) != np.sort(own[: len(chosen)], -1)).any((1, 2)).sum())
        worst = max(worst, apart(one, logits, bound))
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
            segments[row, at : at + len(document)] = number % 2 + 1  # an id that comes again is another document
            places.append((row, at, document))
            at += len(document)
    run = jax.jit(lambda params, tokens, segments: _pass(config, params, tokens, segments, None, parallel))
    logits, routes = jax.device_get(run(params, tokens, segments))
    return [Scored(document, 1, scores(logits[row, at : at + len(document) - 1], document[1:]),
                   None if routes is None else np.moveaxis(routes[:, row, at : at + len(document)], 0, 1))
            for row, at, document in places]


def _packed(config: ModelConfig, params: Any, sequences: Sequence[list[int]], length: int, parallel: Parallel | None
            ) -> list[Scored]:
    """As many short documents in a row as there is room for, and three, of which the first and the last share an id."""
    part, longest = length // 5, max(sequences, key=len)
    rows: list[list[list[int]]] = [[longest[at : at + part] for at in (0, part, 2 * part)], []]
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
    return [Scored(tokens, 1, scores(np.concatenate(logits[i])[:-1], tokens[1:]),
                   np.concatenate(routes[i]) if routes[i] else None) for i, tokens in enumerate(sequences)]
