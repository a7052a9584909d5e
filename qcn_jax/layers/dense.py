"""Linear maps without bias whose kernels carry logical axis names."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from qcn_jax.config import ModelConfig
from qcn_jax.sharding.parallel import Parallel


def dense(
    config: ModelConfig, features: int, axes: tuple[str, str], name: str, parallel: Parallel | None = None
) -> nn.Dense:
    """A bias-free nn.Dense in the config's dtypes; `axes` names the (in, out) axes of its kernel.

    With `parallel` the kernel is gathered as `Parallel.gathered` does it, otherwise as the compiler likes.
    """
    product = None
    if parallel is not None:
        product = lambda x, kernel, *args, **kwargs: jax.lax.dot_general(
            x, parallel.gathered(kernel, *axes), *args, **kwargs)
    return nn.Dense(
        features,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nn.with_logical_partitioning(normal_init(config), axes),
        dot_general=product,
        name=name,
    )


def normal_init(config: ModelConfig) -> nn.initializers.Initializer:
    """The initialiser of every matrix: normal with standard deviation `initializer_range`."""
    return nn.initializers.normal(config.initializer_range)
