"""The DeltaNet mixer put together from the layer's parts: the reference of the kernels that do all of it."""

import jax

from qcn_jax.layers.delta_rule import gated_delta_rule
from qcn_jax.layers.gated_delta_net import causal_conv
from qcn_jax.layers.norm import GatedRMSNorm, l2_norm


def by_parts(eps, qkvz, kernel, g, beta, weight, segment_ids):
    """As in GatedDeltaNet, with the recurrent form of the rule; arguments as of kernels.mixer.delta_net."""
    batch, length, heads, repeats = g.shape
    mixed, values = kernel.shape[2], repeats * weight.shape[0]
    key_dim = (mixed - values) // 2
    qkvz = qkvz.reshape(batch, length, heads, -1)
    qkv, z = qkvz[..., :mixed], qkvz[..., mixed:].reshape(batch, length, heads, repeats, -1)
    qkv = jax.nn.silu(causal_conv(qkv, kernel, None, segment_ids))
    q, k, v = l2_norm(qkv[..., :key_dim]) * key_dim**-0.5, l2_norm(qkv[..., key_dim : 2 * key_dim]), qkv[..., -values:]
    o, _ = gated_delta_rule(q, k, v.reshape(z.shape), g, beta, None, segment_ids, "recurrent")
    return GatedRMSNorm(eps).apply({"params": {"weight": weight}}, o, z).reshape(batch, length, -1)
