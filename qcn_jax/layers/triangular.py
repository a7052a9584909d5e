"""Inverse of unit lower triangular matrices, the solve inside the chunked delta rule.

Diagonal blocks of at most 32 rows are inverted by forward substitution, then merged in pairs by products:
inv([[L1, 0], [M, L2]]) = [[T1, 0], [-T2 M T1, T2]]. Substitution stays accurate for correlated and
repeated keys, where doubling (I - A)(I + A^2)(I + A^4)... loses every digit; products feed matrix units.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
# At C = 64 the largest error is that of substitution throughout (1e-7) at twice its speed on CPU; blocks of 16 are no
# faster and err three times as much (benchmarks/triangular_inverse.py).
MAX_BASE = 32
_EXACT = jax.lax.Precision.HIGHEST  # bf16 passes would cost 4 to 6 digits of the inverse


def _base_size(n: int) -> int:
    while n > MAX_BASE and n % 2 == 0:
        n //= 2
    return n


def _substitute(a: Array) -> Array:
    """(I + a)^-1 row by row, for strictly lower a [..., n, n]."""
    n = a.shape[-1]
    eye = jnp.eye(n, dtype=a.dtype)

    def solve_row(i: Array, inverse: Array) -> Array:
        row = jax.lax.dynamic_index_in_dim(a, i, a.ndim - 2)
        # Rows from i on are still zero, so what stands right of the diagonal has no effect.
        return jax.lax.dynamic_update_index_in_dim(
            inverse, eye[i] - jnp.matmul(row, inverse, precision=_EXACT), i, a.ndim - 2
        )

    first = jnp.zeros_like(eye).at[0, 0].set(1)
    return jax.lax.fori_loop(1, n, solve_row, jnp.broadcast_to(first, a.shape))


def _inverse(a: Array) -> Array:
    n = a.shape[-1]
    size = _base_size(n)
    # [..., blocks, size, size]: the diagonal blocks.
    blocks = [a[..., i : i + size, i : i + size] for i in range(0, n, size)]
    inverse = _substitute(jnp.stack(blocks, axis=-3))
    while size < n:
        below = [a[..., i + size : i + 2 * size, i : i + size] for i in range(0, n, 2 * size)]
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        product = jnp.matmul(second, jnp.stack(below, axis=-3), precision=_EXACT)
        lower = -jnp.matmul(product, first, precision=_EXACT)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([lower, second], axis=-1)], axis=-2)
        size *= 2
    return inverse[..., 0, :, :]


@jax.custom_vjp
def unit_lower_inverse(a: Array) -> Array:
    """(I + a)^-1 for strictly lower triangular a [..., C, C]; what lies on or above the diagonal is ignored.

    C is best 32 times a power of two, or at most 32; of any other C even parts are merged by products, the rest
    substituted.
    """
    return _inverse(a)


def _forward(a: Array) -> tuple[Array, Array]:
    inverse = _inverse(a)
    return inverse, inverse


def _backward(inverse: Array, cotangent: Array) -> tuple[Array]:
    transposed = jnp.swapaxes(inverse, -1, -2)
    product = jnp.matmul(transposed, jnp.matmul(cotangent, transposed, precision=_EXACT), precision=_EXACT)
    return (-jnp.tril(product, -1),)


unit_lower_inverse.defvjp(_forward, _backward)
