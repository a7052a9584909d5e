"""What stands between a DeltaNet layer's two projections as Pallas TPU kernels (kernels.mixer_kernels).

Of rows whose length is split over devices, each device has a shard. It receives the rows before the shard, for its
convolution, and the state before it: what a shard does to a state is an affine map, which a first kernel finds, and
the maps of all shards are composed in log2(devices) steps. Gradients of states travel back in the same way.

Axes: B batch, T tokens, H key heads, R value heads per key head, N chunks, C chunk, dk/dv widths; W = 2 dk + R dv
convolved channels of a key head.
"""

import functools

import jax
import jax.numpy as jnp

from qcn_jax.layers.kernels import mixer_kernels
from qcn_jax.layers.kernels.convolution import SUBLANES
from qcn_jax.layers.kernels.delta_rule import gate_rows, on_platform
from qcn_jax.layers.kernels.mixer_blocks import Arrays, Sizes
from qcn_jax.layers.sharded import Axes, continuing, from_neighbour, handed_gradients, previous_tokens, received_states

Array = jax.Array


def delta_net(
    qkvz: Array, kernel: Array, g: Array, beta: Array, weight: Array, segment_ids: Array | None,
    *, eps: float, chunk_size: int, key_dim: int, context: Axes = (),
) -> Array:
    """convolution -> SiLU -> L2 norms -> gated delta rule from a zero state -> gated RMS norm.

    Args:
      qkvz: [B, T, H * (W + R dv)], channels of a key head [q | k | v of R heads | z of R heads].
      kernel: [taps, H, W], the convolution; the last tap is the token itself; at most 8 taps.
      g, beta: [B, T, H, R] float32, as of layers.delta_rule.gated_delta_rule.
      weight: [dv], of the norm.
      segment_ids: [B, T] or None; a change of id starts a document.
      eps: of the norm.
      chunk_size: C, a power of two from 16 on (on a TPU best 128).
      key_dim: dk.
      context: mesh axes along which the rows are split, inside Parallel.per_device; T is then that of a shard.

    Returns:
      [B, T, H * R * dv] in qkvz's dtype.

    Raises:
      UserError: a shard is shorter than the taps before a token.
    """
    batch, length, _ = qkvz.shape
    sizes = _sizes(qkvz, kernel, g, weight, eps, chunk_size, key_dim)
    ids_before, continues = None, jnp.ones((batch,), jnp.float32)
    if context:
        ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
        ids_before = previous_tokens(ids, sizes.taps - 1, context)
        continues = continuing(ids, context)
    rows = gate_rows(g, beta, segment_ids, chunk_size, position_limit=sizes.taps - 1, ids_before=ids_before)
    return _mixer(*_arrays(qkvz, kernel, rows, weight, sizes), continues, sizes, context, length)[:, :length]


def continued_delta_net(
    qkvz: Array, kernel: Array, g: Array, beta: Array, weight: Array, window: Array, state: Array,
    *, eps: float, chunk_size: int, key_dim: int,
) -> tuple[Array, Array]:
    """`delta_net` of sequences that go on, whose padding g = beta = 0 makes inert; has no gradient.

    Args:
      qkvz, kernel, g, beta, weight, eps, chunk_size, key_dim: as of `delta_net`.
      window: [B, taps - 1, H, W], what entered the convolution before the first token; zeros before a sequence.
      state: [B, H, R, dk, dv] float32, before the first token.

    Returns:
      [B, T, H * R * dv] in qkvz's dtype, of no meaning at padding, and the state behind the last token.
    """
    batch, length, _ = qkvz.shape
    sizes = _sizes(qkvz, kernel, g, weight, eps, chunk_size, key_dim)
    same = jnp.zeros((batch, sizes.taps - 1), jnp.int32)  # of the document that goes on
    rows = gate_rows(g, beta, None, chunk_size, position_limit=sizes.taps - 1, ids_before=same)
    missing = SUBLANES - window.shape[1]
    before = jnp.pad(window.astype(jnp.float32), ((0, 0), (missing, 0), (0, 0), (0, sizes.width - sizes.mixed)))
    names = ("qkvz", "kernel", "rows", "weight")
    reads = dict(zip(names, _arrays(qkvz, kernel, rows, weight, sizes)))
    reads |= {"before": before.reshape(batch, SUBLANES, -1), "state": _joined(state.astype(jnp.float32))}
    written = on_platform(mixer_kernels.continued, sizes)(reads)
    return written["out"][:, :length], _by_value(written["final"], sizes)


def _sizes(
    qkvz: Array, kernel: Array, g: Array, weight: Array, eps: float, chunk_size: int, key_dim: int
) -> Sizes:
    heads, repeats = g.shape[2:]
    sizes = Sizes(heads, repeats, key_dim, weight.shape[0], chunk_size, kernel.shape[0], eps)
    if qkvz.shape[2] != heads * sizes.width or kernel.shape[1:] != (heads, sizes.mixed) or sizes.taps > SUBLANES:
        raise ValueError(f"qkvz {qkvz.shape} and kernel {kernel.shape} do not fit {sizes}")
    return sizes


def _arrays(qkvz: Array, kernel: Array, rows: Array, weight: Array, sizes: Sizes) -> tuple[Array, ...]:
    """qkvz, kernel, rows and weight as mixer_blocks has them."""
    kernel = kernel.astype(jnp.float32).reshape(sizes.taps, sizes.heads * sizes.mixed)
    kernel = jnp.pad(kernel, ((0, SUBLANES - sizes.taps), (0, 0)))
    padded = jnp.pad(qkvz, ((0, 0), (0, -qkvz.shape[1] % sizes.chunk), (0, 0)))
    # Rounded as the weight of the layer's XLA form is.
    return padded, kernel, rows, weight.astype(qkvz.dtype).astype(jnp.float32)[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _mixer(
    qkvz: Array, kernel: Array, rows: Array, weight: Array, continues: Array, sizes: Sizes, context: Axes, length: int
) -> Array:
    """[B, T, H * R * dv]; arrays as mixer_blocks has them, T padded to whole chunks, `length` without.

    `continues` [B]: 1 where the shard's first document began in a shard before.
    """
    return _forward(qkvz, kernel, rows, weight, continues, sizes, context, length, save=False)[0]


def _received(
    reads: Arrays, continues: Array, sizes: Sizes, context: Axes, length: int
) -> tuple[Arrays, Array]:
    """What a shard receives (before, state) and inverses, by name; and `carried` [B, H, R, dk, dk]."""
    rows = previous_tokens(reads["qkvz"][:, :length], min(SUBLANES, length), context)
    before = jnp.pad(rows.astype(jnp.float32), ((0, 0), (SUBLANES - rows.shape[1], 0), (0, 0)))
    first = {name: reads[name] for name in ("qkvz", "kernel", "rows")} | {"before": before}
    found = on_platform(mixer_kernels.transfer, sizes)(first)
    added, carried = jnp.split(_by_value(found["transfer"], sizes), [sizes.value_dim], axis=-1)
    state = received_states(carried, added, continues, context)
    return {"before": before, "state": _joined(state), "inverses": found["inverses"]}, carried


def _by_value(states: Array, sizes: Sizes) -> Array:
    """[B, H, dk, R * x] -> [B, H, R, dk, x]."""
    return jnp.swapaxes(states.reshape(*states.shape[:3], sizes.repeats, -1), 2, 3)


def _joined(states: Array) -> Array:
    """Undoes `_by_value`."""
    batch, heads, _, key_dim, _ = states.shape
    return jnp.swapaxes(states, 2, 3).reshape(batch, heads, key_dim, -1)


def _forward(
    qkvz: Array, kernel: Array, rows: Array, weight: Array, continues: Array, sizes: Sizes, context: Axes, length: int,
    save: bool = True,
) -> tuple[Array, tuple[Arrays, Array | None, Array]]:
    """Output and residuals, which without `save` are not those of the backward pass."""
    reads, carried = {"qkvz": qkvz, "kernel": kernel, "rows": rows, "weight": weight}, None
    if context:
        received, carried = _received(reads, continues, sizes, context, length)
        reads |= received
    written = on_platform(mixer_kernels.forward, sizes, save)(reads)
    out = written.pop("out")
    reads.pop("state", None)  # the first of written["states"]
    return out, (reads | written, carried, continues)


def _backward(
    sizes: Sizes, context: Axes, length: int, residuals: tuple[Arrays, Array | None, Array], cotangent: Array
) -> tuple[Array, ...]:
    reads, carried, continues = residuals
    reads = reads | {"d_out": cotangent}
    if context:
        own = on_platform(mixer_kernels.first_gradient, sizes)(reads)
        d_state = handed_gradients(carried, _by_value(own, sizes), continues, context)
        reads["d_state"] = _joined(d_state)
    d = on_platform(mixer_kernels.backward, sizes)(reads)
    d_qkvz = d["d_qkvz"]
    if context:
        # The last rows also receive the gradient from the next shard.
        from_next = from_neighbour(d["d_before"], context, -1)
        from_next = from_next.reshape(*from_next.shape[:2], sizes.heads, sizes.mixed)
        from_next = jnp.pad(from_next, ((0, 0), (0, 0), (0, 0), (0, sizes.width - sizes.mixed)))
        size = min(SUBLANES, length)
        from_next = from_next.reshape(*from_next.shape[:2], -1)[:, -size:].astype(d_qkvz.dtype)
        d_qkvz = d_qkvz.at[:, length - size : length].add(from_next)
    d_weight = jnp.sum(d["d_weight"], axis=(0, 1, 2))[None]
    return d_qkvz, jnp.sum(d["d_kernel"], axis=0), d["d_rows"], d_weight, jnp.zeros_like(continues)


_mixer.defvjp(_forward, _backward)
