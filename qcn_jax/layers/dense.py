"""Linear maps without bias whose kernels carry logical axis names, and the MLP made of them."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from qcn_jax.config import ModelConfig
from qcn_jax.sharding.parallel import Parallel

Array = jax.Array


def dense(
    config: ModelConfig, features: int, axes: tuple[str, str], name: str, parallel: Parallel | None = None
) -> nn.Dense:
    """A bias-free nn.Dense in the config's dtypes by `product`; `axes` names the (in, out) axes of its kernel."""
    return nn.Dense(
        features,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nn.with_logical_partitioning(normal_init(config), axes),
        dot_general=lambda x, kernel, *_, **__: product(x, kernel, axes, parallel),
        name=name,
    )


class Kernel(nn.Module):
    """The parameter of a `dense` alone, [inputs, features] in param_dtype, for callers that multiply by parts of it."""

    config: ModelConfig
    features: int
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, inputs: int) -> Array:
        init = nn.with_logical_partitioning(normal_init(self.config), self.axes)
        return self.param("kernel", init, (inputs, self.features), jnp.dtype(self.config.param_dtype))


def product(x: Array, kernel: Array, axes: tuple[str, str], parallel: Parallel | None) -> Array:
    """x [..., D] times kernel [D, F].

    With `parallel` the kernel is gathered as `Parallel.gathered` does it, otherwise as the compiler likes. Without, the
    token axes are merged: for the weight gradient of x [B, T, D], which sums over two axes, XLA's CPU back end copies
    the cotangent into another order first and takes twice the time. So without it at most one token axis may be spread
    over devices: merged, tokens of one device would no longer lie one after the other.
    """
    if parallel is not None:
        return jax.lax.dot_general(x, parallel.gathered(kernel, *axes), (((x.ndim - 1,), (0,)), ((), ())))
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[1])


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) with `width` inner channels: the MLP of a layer without experts, a shared expert."""

    config: ModelConfig
    width: int

    @nn.compact
    def __call__(self, x: Array, parallel: Parallel | None = None) -> Array:
        """x [..., D] -> [..., D]."""
        project = functools.partial(dense, self.config, parallel=parallel)
        gate = project(self.width, ("embed", "mlp"), "gate_proj")(x)
        up = project(self.width, ("embed", "mlp"), "up_proj")(x)
        return project(self.config.hidden_size, ("mlp", "embed"), "down_proj")(jax.nn.silu(gate) * up)


def normal_init(config: ModelConfig) -> nn.initializers.Initializer:
    """The initialiser of every matrix: normal with standard deviation `initializer_range`."""
    return nn.initializers.normal(config.initializer_range)
