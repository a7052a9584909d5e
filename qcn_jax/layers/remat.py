"""Which activations a layer keeps for the backward pass, by name."""

from collections.abc import Callable

import jax
from flax import linen as nn

from qcn_jax.errors import UserError

# none: keep everything; full: keep only each layer's input; dots: keep results of weight products.
POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialised(module: type[nn.Module], policy: str) -> type[nn.Module]:
    """`module` as a layer that recomputes in its backward pass what `policy` does not keep.

    Raises:
      UserError: unknown policy.
    """
    if policy not in POLICIES:
        raise UserError(f"model.remat: unknown policy {policy!r}; allowed: {', '.join(POLICIES)}")
    if POLICIES[policy] is None:
        return module
    # Layers run under a scan, which already keeps XLA from merging the recomputation with the original.
    return nn.remat(module, policy=POLICIES[policy], prevent_cse=False)
