"""How far from the exact result a program in float32 may be, measured for every test anew.

Two programs in float32 need not agree to any fixed number of digits: each rounds in an order of its own, which differs
between processors, and what they compute may magnify that a thousandfold. So what is right is computed in float64, by a
definition that is short and slow, and how far rounding may lead away is measured on the definition too: its inputs and
what its operations give, in both directions, are changed at random by at most a unit in the last place of float32. A
program in float32 changes the same numbers by its rounding, and more of them, so it may be ALLOWED times as far away.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

EPS, EPS64 = 2.0**-23, 2.0**-52  # units in the last place of 1 in float32 and float64
# Rounding errors of a sum of n terms grow as the root of n. The longest sums of these tests, over all tokens of a batch,
# have some 450 terms: 21 times one rounding, and three times that because some draw is the unluckiest.
ALLOWED = 64
RUNS = 2  # results with changes; of two independent ones, both are rarely lucky


def ratio(found: np.ndarray, exact: np.ndarray, moved: Sequence[np.ndarray], axis: int | None = None,
          eps: float | None = None) -> float:
    """Returns how far `found` is from `exact`, in units of what roundings by `eps` make: at most ALLOWED is right.

    Args:
      found, exact: of one shape.
      moved: results of the definition with changes.
      axis: of vectors whose distances count each for itself, the largest deciding; None is all axes.
      eps: of the roundings; None is float64's for float64 and float32's for all else.
    """
    norm = lambda x: np.linalg.norm(x) if axis is None else np.linalg.norm(x, axis=axis)
    exact = np.asarray(exact, np.float64)
    eps = eps or (EPS64 if found.dtype == np.float64 else EPS)
    unit = np.max([norm(one - exact) for one in moved], axis=0)
    # Where changes happen to cancel: as much as elsewhere, and as a rounding of the result makes.
    unit = np.maximum(np.maximum(unit, np.median(unit)), EPS * norm(exact)) * (eps / EPS)
    own = float(jnp.finfo(found.dtype).eps) / 2 * norm(exact)  # the result's own rounding, which bfloat16 makes large
    distance = np.maximum(norm(np.asarray(found, np.float64) - exact) - own, 0)
    return float(np.max(np.where(distance == 0, 0, distance / np.maximum(unit, np.finfo(float).tiny)), initial=0))


@jax.custom_vjp
def touched(x: jax.Array, noise: jax.Array, place: int | jax.Array) -> jax.Array:
    """Returns x with each number changed by its own of `noise`; so is the cotangent that comes back.

    Args:
      x: float64.
      noise: [N] relative changes, N larger than x.
      place: number of the operation that gave x; others get other changes.
    """
    start = (place * 7919 + 1) % (len(noise) - x.size)
    return x * (1 + jax.lax.dynamic_slice(noise, [start], [x.size]).reshape(x.shape))


def _backward(residuals: tuple[jax.Array, int | jax.Array], cotangent: jax.Array) -> tuple:
    noise, place = residuals
    return touched(cotangent, noise, place + 104_729), None, None


touched.defvjp(lambda x, noise, place: (touched(x, noise, place), (noise, place)), _backward)


@dataclasses.dataclass
class Bounds:
    """Arrays that are right, and what changes make of them."""

    exact: list[np.ndarray]
    moved: list[list[np.ndarray]]

    def ratios(self, found: Sequence[Any], axis: int | None = None) -> list[float]:
        """Returns the `ratio` of every array, which is NaN where the array has one; of None it is 0."""
        assert len(found) == len(self.exact)
        return [0.0 if one is None else ratio(np.asarray(one), exact, moved, axis)
                for one, exact, *moved in zip(found, self.exact, *self.moved)]

    def check(self, found: Sequence[Any], axis: int | None = None, what: Any = "") -> None:
        """Asserts that every array is as near as rounding allows."""
        ratios = self.ratios(found, axis)
        assert all(one < ALLOWED for one in ratios), (what, ratios)


@functools.cache
def _together(definition: Callable[..., Any], arguments: int) -> Callable[..., Any]:
    """The definition for several noises at a time: most of a scan's time is overhead."""
    return jax.jit(jax.vmap(definition, in_axes=(0, *[None] * arguments)))


def bounds(definition: Callable[..., Any], *arguments: Any) -> Bounds:
    """Runs a definition exactly, and RUNS times with changes.

    Args:
      definition: a function of (noise, *arguments), which hands its arguments and what each of its operations
        gives through `touched`.
      arguments: arrays or None; those of floating point become float64. None of its results is larger than all of them.
    """
    wide = lambda x: np.asarray(x, np.float64) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating) else np.asarray(x)
    arguments = jax.tree.map(wide, arguments)
    size = max(1 << 16, 2 * sum(x.size for x in jax.tree.leaves(arguments)))
    noise = [EPS * np.random.default_rng(seed).uniform(-1, 1, size) for seed in range(RUNS)]
    with jax.enable_x64(True):
        leaves = jax.tree.leaves(_together(definition, len(arguments))(np.stack([np.zeros(size), *noise]), *arguments))
        exact, *moved = zip(*map(np.asarray, leaves))
    return Bounds(list(exact), [list(one) for one in moved])
