"""Products that accumulate and return float32 whatever the dtype of their operands."""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


def einsum_float32(equation: str, a: Array, b: Array) -> Array:
    """jnp.einsum(equation, a, b) as float32; bfloat16 operands go to the matrix units as they are.

    XLA's CPU back end has no bfloat16 product with a float32 result, so there the operands are cast first,
    which gives the same numbers.
    """
    product = functools.partial(jnp.einsum, equation, preferred_element_type=jnp.float32)
    if a.dtype == b.dtype == jnp.float32:
        return product(a, b)
    upcast = lambda a, b: product(a.astype(jnp.float32), b.astype(jnp.float32))
    return jax.lax.platform_dependent(a, b, cpu=upcast, default=product)
