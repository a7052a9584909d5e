"""The dtype of sums, and products that accumulate in it: float64 for float64, float32 for all that is narrower."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def accumulator(*dtypes: Any) -> jnp.dtype:
    """Returns the dtype of sums, norms, exponents and states of numbers in `dtypes`: float32 at least."""
    return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


def widened(x: Array) -> Array:
    """Returns x in its `accumulator` dtype."""
    return x.astype(accumulator(x.dtype))


def widened_einsum(equation: str, a: Array, b: Array) -> Array:
    """Returns jnp.einsum(equation, a, b) in their `accumulator` dtype.

    Operands in bfloat16 go to the matrix units as they are. XLA's CPU back end has no bfloat16 product with a float32
    result, so there the operands are cast first, which gives the same numbers.
    """
    wide = accumulator(a.dtype, b.dtype)
    product = functools.partial(jnp.einsum, equation, preferred_element_type=wide)
    if a.dtype == b.dtype == wide:
        return product(a, b)
    upcast = lambda a, b: product(a.astype(wide), b.astype(wide))
    return jax.lax.platform_dependent(a, b, cpu=upcast, default=product)
