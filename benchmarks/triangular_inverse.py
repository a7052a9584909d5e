"""Claim: the chunk's triangular inverse by blocks of substitution and products is as accurate as substitution.

    python benchmarks/triangular_inverse.py [--heads=256] [--rounds=20]

Inverts I + A for A = strictly lower (beta_i k_i . k_j), as the delta rule forms it, by every method: row by row
(substitution), LAPACK-like triangular solve (XLA), doubling (I - A)(I + A^2)(I + A^4)... (products alone), and
`unit_lower_inverse` with each size of its substituted blocks (32 is the one in use). The error is the largest
difference to NumPy's float64 inverse over keys of every kind; times are the fastest of `rounds` turns taken by all
methods one after the other. Exit status 1 where the error of the method in use is more than twice that of substitution.
"""

import functools
import sys
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from qcn_jax.layers import triangular

HEADS = flags.DEFINE_integer("heads", 256, "Matrices inverted side by side in the timing.")
ROUNDS = flags.DEFINE_integer("rounds", 20, "Turns of every method.")
KINDS = ("random", "correlated", "repeated")
KEY_DIM = 128
IN_USE = f"blocks of {triangular.MAX_BASE}, products (in use)"


def system(kind: str, heads: int, size: int) -> np.ndarray:
    """[heads, size, size] float32, strictly lower."""
    rng = np.random.default_rng(size)
    keys = rng.standard_normal((heads, size, KEY_DIM))
    if kind == "correlated":
        keys = rng.standard_normal((heads, 1, KEY_DIM)) + 0.1 * keys
    elif kind == "repeated":
        keys = keys[:, np.zeros(size, int)]
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    beta = rng.uniform(0.5, 1, (heads, size, 1))
    return np.tril(beta * (keys @ keys.transpose(0, 2, 1)), -1).astype(np.float32)


def doubling(a: jax.Array) -> jax.Array:
    """(I - a)(I + a^2)(I + a^4)..., exact in exact arithmetic since a^C = 0."""
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    eye = jnp.eye(a.shape[-1])
    inverse, power, reach = eye - a, a, 2
    while reach < a.shape[-1]:
        power = product(power, power)
        inverse, reach = product(inverse, eye + power), 2 * reach
    return inverse


def solve(a: jax.Array) -> jax.Array:
    """XLA's triangular solve against the identity."""
    eye = jnp.broadcast_to(jnp.eye(a.shape[-1]), a.shape)
    return jax.lax.linalg.triangular_solve(a + eye, eye, left_side=True, lower=True, unit_diagonal=True)


def blocked(a: jax.Array, base: int) -> jax.Array:
    """The method in use with another size of its substituted blocks."""
    with mock.patch.object(triangular, "MAX_BASE", base):
        return triangular._inverse(a)


METHODS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "substitution": triangular._substitute,
    "triangular solve": solve,
    "doubling, products alone": doubling,
    **{f"blocks of {base}, products": functools.partial(blocked, base=base) for base in (4, 8, 16)},
    IN_USE: triangular.unit_lower_inverse,
}


def errors(function: Callable, size: int) -> list[float]:
    """Largest error for each kind of keys."""
    result = []
    for kind in KINDS:
        a = system(kind, 16, size)
        exact = np.linalg.inv(np.eye(size) + a.astype(np.float64))
        result.append(float(np.abs(np.asarray(function(jnp.asarray(a)), np.float64) - exact).max()))
    return result


def main(argv: list[str]) -> None:
    """Prints a table for each chunk size."""
    del argv
    failed = False
    for size in (32, 64, 128):
        functions = {name: jax.jit(function) for name, function in METHODS.items()}
        a = jnp.asarray(system("random", HEADS.value, size))
        seconds: dict[str, list[float]] = {name: [] for name in METHODS}
        for _ in range(ROUNDS.value + 1):  # the first turn compiles
            for name, function in functions.items():
                start = time.perf_counter()
                jax.block_until_ready(function(a))
                seconds[name].append(time.perf_counter() - start)
        print(f"\nC = {size}, {HEADS.value} matrices\n")
        print(f"| method | ms | error: {' | '.join(KINDS)} |\n|---|---|---|---|---|")
        worst = {}
        for name, function in functions.items():
            found = errors(function, size)
            worst[name] = max(found)
            figures = " | ".join(f"{error:.1e}" for error in found)
            print(f"| {name} | {1e3 * min(seconds[name][1:]):.2f} | {figures} |", flush=True)
        failed |= not worst[IN_USE] <= 2 * worst["substitution"]
    sys.exit(int(failed))


if __name__ == "__main__":
    app.run(main)
