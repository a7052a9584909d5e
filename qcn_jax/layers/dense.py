"""Linear maps without bias whose kernels carry logical axis names."""

import jax.numpy as jnp
from flax import linen as nn

from qcn_jax.config import ModelConfig


def dense(config: ModelConfig, features: int, axes: tuple[str, str], name: str) -> nn.Dense:
    """A bias-free nn.Dense in the config's dtypes; `axes` names the (in, out) axes of its kernel."""
    return nn.Dense(
        features,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nn.with_logical_partitioning(normal_init(config), axes),
        name=name,
    )


def normal_init(config: ModelConfig) -> nn.initializers.Initializer:
    """The initialiser of every matrix: normal with standard deviation `initializer_range`."""
    return nn.initializers.normal(config.initializer_range)
