"""Expert parallelism: tokens travel to the devices that hold their experts, and results travel back."""

from qcn_jax.moe.dispatch.dispatch import FORMS, dispatch_experts

__all__ = ["FORMS", "dispatch_experts"]
