"""Mixers whose heads and sequences are spread over devices.

The compiler sees neither into kernels nor through a recurrence, so the cores of both mixers run per device. Heads are
split over the axes of `activation_heads`; where a sequence is split too (context parallelism), device c holds the c-th
shard of every row, and
  attention       exchanges the split of length for a split of heads and back (all-to-all), which keeps causal work
                  even and runs the same attention as one device does;
  the delta rule  composes the affine map S -> A S + B of every shard in log2(devices) steps;
  the convolution receives the last taps - 1 tokens of the shard before.

Axes: B batch, T tokens, N query heads, K key/value heads, H head dim; H key heads, R value heads per key head, dk/dv
their widths for the delta rule.
"""

import functools

import jax
import jax.numpy as jnp

from qcn_jax.errors import UserError
from qcn_jax.layers.context import document_ids
from qcn_jax.layers.delta_rule import gated_delta_rule
from qcn_jax.layers.flash import causal_attention
from qcn_jax.sharding.parallel import Parallel

Array = jax.Array
Axes = tuple[str, ...]
_TOKENS = ("activation_batch", "activation_length")
_HEADS = (*_TOKENS, "activation_heads")


def grouped_attention(q: Array, k: Array, v: Array, segment_ids: Array | None, form: str = "xla") -> Array:
    """causal_attention with heads behind tokens: q [B, T, N, H], k, v [B, T, K, H] -> [B, T, N, H].

    `form` is xla (layers.flash) or splash (TPU kernels, layers.kernels.splash).
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = jnp.moveaxis(q.reshape(batch, length, kv_heads, heads // kv_heads, dim), 1, 3)
    attention = causal_attention
    if form == "splash":
        from qcn_jax.layers.kernels.splash import causal_attention as attention  # Pallas takes a while to import
    y = attention(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), segment_ids)
    return jnp.moveaxis(y, 3, 1).reshape(batch, length, heads, dim)


def sharded_attention(
    q: Array, k: Array, v: Array, segment_ids: Array | None, parallel: Parallel | None, form: str = "xla"
) -> Array:
    """`grouped_attention` on all devices of `parallel` (None: on one).

    Raises:
      UserError: heads that do not divide by the devices, or parts that would share a key/value head unevenly.
    """
    if parallel is None:
        return grouped_attention(q, k, v, segment_ids, form)
    heads, kv_heads = q.shape[2], k.shape[2]
    _require_divisible(heads, kv_heads, parallel)
    local = functools.partial(
        _local_attention, repeats=heads // kv_heads, split=parallel.axes("activation_heads"),
        context=parallel.axes("activation_length"), form=form)
    heads_spec, tokens = parallel.spec(*_HEADS, None), parallel.spec(*_TOKENS)
    whole = parallel.spec(*_TOKENS, None, None)  # few key/value heads: every device holds all of its tokens'
    return parallel.per_device(local, (heads_spec, whole, whole, tokens), heads_spec)(q, k, v, segment_ids)


def _require_divisible(heads: int, kv_heads: int, parallel: Parallel) -> None:
    parts = parallel.size("activation_heads", "activation_length")
    own, repeats = heads // parts, heads // kv_heads
    if heads % parts or (own % repeats and repeats % own):
        raise UserError(f"--config.mesh: {parts} parts of {' x '.join(parallel.axes(*_HEADS[1:]))} do not divide "
                        f"{heads} attention heads in groups of {repeats}")


def _local_attention(
    q: Array, k: Array, v: Array, segment_ids: Array | None, *, repeats: int, split: Axes, context: Axes,
    form: str,
) -> Array:
    """Of one device: q [B, T / c, N / t, H], k, v [B, T / c, K, H] -> [B, T / c, N / t, H]."""
    if not split and not context:
        return grouped_attention(q, k, v, segment_ids, form)
    parts = jax.lax.axis_size(context) if context else 1
    own = q.shape[2] // parts  # query heads of one device during attention
    needed = max(1, own // repeats)  # key/value heads that serve them
    first = jax.lax.axis_index(split) * parts if split else 0
    # [parts, needed]: key/value heads of each device along `context`.
    served = ((first + jnp.arange(parts)) * own // repeats)[:, None] + jnp.arange(needed)
    if not context:
        return grouped_attention(q, k[:, :, served[0]], v[:, :, served[0]], segment_ids, form)
    to_heads = lambda x: jax.lax.all_to_all(x, context, 2, 1, tiled=True)
    k, v = (to_heads(x[:, :, served.reshape(-1)]) for x in (k, v))
    if segment_ids is not None:
        segment_ids = jax.lax.all_gather(segment_ids, context, axis=1, tiled=True)
    y = grouped_attention(to_heads(q), k, v, segment_ids, form)
    return jax.lax.all_to_all(y, context, 1, 2, tiled=True)


def sharded_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    segment_ids: Array | None,
    form: str,
    chunk_size: int,
    parallel: Parallel,
) -> Array:
    """`gated_delta_rule` from a zero state on all devices of `parallel`; arguments as there -> o.

    Raises:
      UserError: key heads that do not divide by the devices.
    """
    parts = parallel.size("activation_heads")
    if q.shape[2] % parts:
        raise UserError(f"--config.mesh.tensor: {parts} parts do not divide {q.shape[2]} key heads of the delta rule")
    local = functools.partial(
        _local_delta_rule, form=form, chunk_size=chunk_size, context=parallel.axes("activation_length"))
    heads = parallel.spec(*_HEADS, None)
    values = parallel.spec(*_HEADS, None, None)
    specs = (heads, heads, values, heads, heads, parallel.spec(*_TOKENS))
    return parallel.per_device(local, specs, values)(q, k, v, g, beta, segment_ids)


def continued_delta_rule(
    q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, form: str, chunk_size: int, parallel: Parallel
) -> tuple[Array, Array]:
    """`gated_delta_rule` of sequences that go on, each whole on a device; arguments and results as there."""
    batch, heads = ("activation_batch",), ("activation_heads",)
    tokens, values = parallel.spec(*batch, None, *heads, None), parallel.spec(*batch, None, *heads, None, None)
    states = parallel.spec(*batch, *heads, None, None, None)
    local = lambda q, k, v, g, beta, state: gated_delta_rule(q, k, v, g, beta, state, None, form, chunk_size)
    return parallel.per_device(local, (tokens, tokens, values, tokens, tokens, states), (values, states))(
        q, k, v, g, beta, state)


def _local_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    segment_ids: Array | None,
    *,
    form: str,
    chunk_size: int,
    context: Axes,
) -> Array:
    if not context:
        return gated_delta_rule(q, k, v, g, beta, None, segment_ids, form, chunk_size)[0]
    batch, _, heads, key_dim = q.shape
    repeats, value_dim = v.shape[3:]
    # The columns of a state evolve apart. Beside the values from a zero state, columns without values from the
    # identity give, for an incoming state S, the maps S -> o_t (a row of `reach`) and S -> A S.
    zeros = jnp.zeros((*v.shape[:-1], key_dim), v.dtype)
    state = jnp.concatenate([jnp.zeros((key_dim, value_dim), g.dtype), jnp.eye(key_dim, dtype=g.dtype)], axis=1)
    state = jnp.broadcast_to(state, (batch, heads, repeats, *state.shape))
    o, state = gated_delta_rule(
        q, k, jnp.concatenate([v, zeros], axis=-1), g, beta, state, segment_ids, form, chunk_size)
    o, reach = o[..., :value_dim], o[..., value_dim:]
    added, carried = state[..., :value_dim], state[..., value_dim:]
    continues = jnp.ones(batch, g.dtype) if segment_ids is None else continuing(segment_ids, context).astype(g.dtype)
    incoming = received_states(carried, added, continues, context)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return o + product("bthrk,bhrkv->bthrv", reach, incoming)


def sharded_document_ids(segment_ids: Array, parallel: Parallel) -> Array:
    """layers.context.document_ids of [B, T] whose length may be split over devices, which count on from one another."""
    axes, tokens = parallel.axes("activation_length"), parallel.spec(*_TOKENS)
    if not axes:
        return parallel.per_device(document_ids, tokens, tokens)(segment_ids)

    def local(ids: Array) -> Array:
        first = jax.lax.axis_index(axes)
        changed = jnp.concatenate([previous_tokens(ids, 1, axes), ids[:, :-1]], axis=1) != ids
        changed = changed.at[:, 0].set(changed[:, 0] | (first == 0))
        count = jnp.cumsum(changed, axis=1, dtype=jnp.int32)
        ends = jax.lax.all_gather(count[:, -1], axes)  # [devices, B]
        before = jnp.sum(jnp.where(jnp.arange(len(ends))[:, None] < first, ends, 0), axis=0)
        return jnp.where(ids == 0, 0, count + before[:, None])

    return parallel.per_device(local, tokens, tokens)(segment_ids)


def continuing(segment_ids: Array, axes: Axes) -> Array:
    """[B] float32: 1 where a shard's first document, by segment_ids [B, T / c], began in the shard before."""
    return (previous_tokens(segment_ids, 1, axes)[:, 0] == segment_ids[:, 0]).astype(jnp.float32)


def received_states(carried: Array, added: Array, continues: Array, axes: Axes) -> Array:
    """The state that every shard receives.

    Args:
      carried: [B, H, R, dk, dk], and added: [B, H, R, dk, dv], what this device's shard does to a state S:
        S -> carried S + added.
      continues: [B], 1 where its first document began before, 0 where the state is to be forgotten.
      axes: mesh axes along which shards lie.

    Returns:
      [B, H, R, dk, dv].
    """
    continues = continues[:, None, None, None, None]
    return continues * from_neighbour(_composed(carried * continues, added, axes, 1), axes)


def handed_gradients(carried: Array, d_received: Array, continues: Array, axes: Axes) -> Array:
    """The gradient of the state that every shard hands on; the transpose of `received_states`.

    `d_received` [B, H, R, dk, dv] is the gradient of the state that the shard receives, as its own outputs give it.
    """
    continues = continues[:, None, None, None, None]
    carried = jnp.swapaxes(carried * continues, -1, -2)
    return from_neighbour(_composed(carried, d_received * continues, axes, -1), axes, -1)


def _composed(carried: Array, added: Array, axes: Axes, direction: int) -> Array:
    """What becomes of zero along all shards up to each device's own, by the maps S -> carried S + added of each.

    `direction` is 1 from the first shard on, -1 from the last.
    """
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    size, step = jax.lax.axis_size(axes), 1
    while step < size:
        # The maps of devices up to this one's `step` predecessors; before the first there is only zero.
        before = from_neighbour(added, axes, direction * step)
        added = product(carried, before) + added
        if 2 * step < size:
            carried = product(carried, from_neighbour(carried, axes, direction * step))
        step *= 2
    return added


def from_neighbour(x: Array, axes: Axes, step: int = 1) -> Array:
    """x of the device `step` places before this one along `axes` (behind it if negative); zeros where there is none."""
    size = jax.lax.axis_size(axes)
    return jax.lax.ppermute(
        x, axes, [(source, source + step) for source in range(size) if 0 <= source + step < size])


def previous_tokens(x: Array, size: int, axes: Axes) -> Array:
    """The `size` tokens before those of x [B, T / c, ...], zeros at the start of the sequence.

    Raises:
      UserError: a shard is shorter than that.
    """
    if x.shape[1] < size:
        raise UserError(f"--config.mesh.context: {x.shape[1]} tokens of a sequence per device; the convolution needs "
                        f"at least {size}")
    return from_neighbour(x[:, x.shape[1] - size :], axes)


def with_halo(x: Array, size: int, axes: Axes) -> Array:
    """x with its `previous_tokens` before it."""
    return jnp.concatenate([previous_tokens(x, size, axes), x], axis=1)
