"""One interface over the forms of expert parallelism, with a backward pass of its own.

Nothing but the inputs is kept for the backward pass: it sends the tokens again beside the cotangents. Per layer that
makes five exchanges (two forward, three backward) and no buffer of rows that outlives its round.

Axes: B batch, T tokens, D width, k experts per token, E experts, F expert width; inside a device N tokens, R rows.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qcn_jax.errors import UserError
from qcn_jax.moe.dispatch.capacity import Capacity
from qcn_jax.moe.dispatch.gather import Gather
from qcn_jax.moe.dispatch.ragged import Ragged
from qcn_jax.moe.experts import ExpertWeights, check_platform, sorted_experts, sorted_experts_vjp
from qcn_jax.sharding.parallel import Parallel

Array = jax.Array
FORMS = {"ragged": Ragged, "capacity": Capacity, "gather": Gather}


class Form(Protocol):
    """How tokens of one device reach experts of others, planned from `experts` [N, k] (E: no expert).

    A buffer, made by `send` and `send_slots`, goes through all rounds: each fetches rows from it and may store their
    results in it, which `collect` and `collect_slots` bring back.

    Attributes:
      rounds: how often this device works through a buffer of rows.
      dropped: float32, slots of this device's tokens that found no room; None where there always is.
    """

    rounds: int | Array
    dropped: Array | None
    send: Callable[[Array], Any]
    send_slots: Callable[[Array], Any]
    fetch: Callable[[Any, int | Array], Array]
    sizes: Callable[[int | Array], Array | None]
    store: Callable[[Any, Array, int | Array], Any]
    collect: Callable[[Any], Array]
    collect_slots: Callable[[Any], Array]


def dispatch_experts(
    x: Array, weights: Array, experts: Array, kernels: ExpertWeights, parallel: Parallel, backend: str = "auto"
) -> tuple[Array, Array]:
    """sum_j weights[.., j] * expert_{experts[.., j]}(x[..]) for tokens and experts spread over devices.

    Args:
      x: [B, T, D], split as activations are.
      weights: [B, T, k] float32 routing weights.
      experts: [B, T, k] int32, distinct within a token; E for a choice that counts for nothing.
      kernels: gate, up [E, D, F] and down [E, F, D] in x's dtype, split as parameters are.
      parallel: the devices, the form and its buffer. "ragged" and "gather" drop nothing: what does not fit the
        buffer takes another round. "capacity" drops what exceeds its expert's room, buffer * N * k / E slots per
        device and expert.
      backend: see moe.experts.sorted_experts ("capacity" needs none).

    Returns:
      [B, T, D] in x's dtype, and how many choices of all tokens were dropped (float32).

    Raises:
      UserError: unknown form or back end, or sizes that do not divide.
    """
    if parallel.dispatch not in FORMS:
        raise UserError(f"--config.mesh.dispatch: unknown form {parallel.dispatch!r}; allowed: {', '.join(FORMS)}")
    if parallel.dispatch_buffer < 0:
        raise UserError(f"--config.mesh.dispatch_buffer: {parallel.dispatch_buffer} is negative; 0 holds any routing")
    num_experts = kernels.gate.shape[0]
    if num_experts % parallel.size("expert"):
        raise UserError(f"--config.mesh.expert: {parallel.size('expert')} parts do not divide {num_experts} experts")
    check_platform(backend, parallel.platform or "tpu")
    if backend == "auto" and parallel.platform is not None:  # one form less to trace
        backend = "megablox" if parallel.platform == "tpu" else "blocked"
    return _apply(x, weights, experts, kernels, parallel, backend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _apply(
    x: Array, weights: Array, experts: Array, kernels: ExpertWeights, parallel: Parallel, backend: str
) -> tuple[Array, Array]:
    tokens, stacked = _specs(parallel)

    def local(x: Array, weights: Array, experts: Array, kernels: ExpertWeights) -> tuple[Array, Array]:
        form, flat = _plan(experts, kernels, parallel)
        whole = _gather_kernels(kernels, parallel)
        out = _run(form, flat(x), flat(weights), whole, backend)
        out = _sum(out, parallel.axes("mlp")).reshape(x.shape)
        if form.dropped is None:
            return out, jnp.zeros((), jnp.float32)
        return out, _sum(form.dropped, parallel.axes("activation_batch", "activation_length"))

    run = parallel.per_device(local, (tokens, tokens, tokens, stacked), (tokens, PartitionSpec()))
    return run(x, weights, experts, kernels)


def _apply_forward(
    x: Array, weights: Array, experts: Array, kernels: ExpertWeights, parallel: Parallel, backend: str
) -> tuple[tuple[Array, Array], tuple]:
    return _apply(x, weights, experts, kernels, parallel, backend), (x, weights, experts, kernels)


def _apply_backward(
    parallel: Parallel, backend: str, inputs: tuple, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, ExpertWeights]:
    tokens, stacked = _specs(parallel)

    def local(x: Array, weights: Array, experts: Array, kernels: ExpertWeights, grad: Array) -> tuple:
        form, flat = _plan(experts, kernels, parallel)
        whole = _gather_kernels(kernels, parallel)
        dx, dweights, dkernels = _run_backward(form, flat(x), flat(weights), whole, flat(grad), backend)
        split = parallel.axes("mlp")
        dx, dweights = _sum(dx, split).reshape(x.shape), _sum(dweights, split).reshape(weights.shape)
        return dx, dweights, _scatter_kernels(dkernels, parallel)

    run = parallel.per_device(local, (tokens, tokens, tokens, stacked, tokens), (tokens, tokens, stacked))
    dx, dweights, dkernels = run(*inputs, cotangents[0])
    return dx, dweights, None, dkernels


_apply.defvjp(_apply_forward, _apply_backward)


def _run(form: Form, x: Array, weights: Array, kernels: ExpertWeights, backend: str) -> Array:
    scale = form.send_slots(weights)

    def one_round(step: int | Array, buffer: Any) -> Any:
        rows, scales, sizes = form.fetch(buffer, step), form.fetch(scale, step), form.sizes(step)
        compute = _equal_groups if sizes is None else functools.partial(_groups, sizes=sizes, backend=backend)
        return form.store(buffer, compute(rows, scales, kernels), step)

    return form.collect(_rounds(form, one_round, form.send(x)))


def _run_backward(
    form: Form, x: Array, weights: Array, kernels: ExpertWeights, grad: Array, backend: str
) -> tuple[Array, Array, ExpertWeights]:
    sent_grad = form.send(grad)

    def one_round(step: int | Array, carry: tuple) -> tuple:
        buffer, scale, dkernels = carry
        rows, scales, grads = form.fetch(buffer, step), form.fetch(scale, step), form.fetch(sent_grad, step)
        sizes = form.sizes(step)
        if sizes is None:
            drows, dscales, more = jax.vjp(_equal_groups, rows, scales, kernels)[1](grads)
        else:
            drows, dscales, more = sorted_experts_vjp(rows, scales, sizes, kernels, grads, backend)
        buffer, scale = form.store(buffer, drows, step), form.store(scale, dscales, step)
        return buffer, scale, more if dkernels is None else jax.tree.map(jnp.add, dkernels, more)

    single = isinstance(form.rounds, int)
    begin = form.send(x), form.send_slots(weights), None if single else jax.tree.map(jnp.zeros_like, kernels)
    buffer, scale, dkernels = _rounds(form, one_round, begin)
    return form.collect(buffer), form.collect_slots(scale), dkernels


def _rounds(form: Form, one_round: Callable[[Any, Any], Any], carry: Any) -> Any:
    if isinstance(form.rounds, int):  # one
        return one_round(0, carry)
    return jax.lax.fori_loop(0, form.rounds, one_round, carry)


def _groups(rows: Array, scales: Array, kernels: ExpertWeights, sizes: Array, backend: str) -> Array:
    return sorted_experts(rows, scales, sizes, kernels, backend)


def _equal_groups(rows: Array, scales: Array, kernels: ExpertWeights) -> Array:
    """rows [E, R, D], scales [E, R] -> [E, R, D]."""
    hidden = jax.nn.silu(rows @ kernels.gate) * (rows @ kernels.up)
    return (hidden * scales.astype(rows.dtype)[..., None]) @ kernels.down


def _specs(parallel: Parallel) -> tuple[PartitionSpec, ExpertWeights]:
    wide = parallel.spec("expert", "expert_embed", "mlp")
    return parallel.spec("activation_batch", "activation_length", None), ExpertWeights(
        wide, wide, parallel.spec("expert", "mlp", "expert_embed"))


def _plan(experts: Array, kernels: ExpertWeights, parallel: Parallel) -> tuple[Form, Callable[[Array], Array]]:
    axes = parallel.axes("expert")
    flat = lambda x: x.reshape(-1, x.shape[-1])
    # With all experts here there is nothing to exchange, and the ragged form is a plain permutation.
    form = FORMS[parallel.dispatch] if axes else Ragged
    num_experts = kernels.gate.shape[0] * parallel.size("expert")
    everywhere = tuple(axis for axis, size in parallel.mesh.shape.items() if size > 1)
    return form(flat(experts), num_experts, axes, everywhere, parallel.dispatch_buffer), flat


def _gather_kernels(kernels: ExpertWeights, parallel: Parallel) -> ExpertWeights:
    """Whole expert widths D on every device that computes with them."""
    axes = parallel.axes("expert_embed")
    gather = lambda kernel, dim: jax.lax.all_gather(kernel, axes, axis=dim, tiled=True) if axes else kernel
    return ExpertWeights(gather(kernels.gate, 1), gather(kernels.up, 1), gather(kernels.down, 2))


def _scatter_kernels(grads: ExpertWeights, parallel: Parallel) -> ExpertWeights:
    """The transpose: summed over all devices whose tokens met these experts, each keeping its part."""
    axes = parallel.axes("expert_embed")
    others = tuple(
        axis for axis in parallel.axes("activation_batch", "activation_length")
        if axis not in axes and axis not in parallel.axes("expert")
    )

    def scatter(grad: Array, dim: int) -> Array:
        grad = jax.lax.psum_scatter(grad, axes, scatter_dimension=dim, tiled=True) if axes else grad
        return _sum(grad, others)

    return ExpertWeights(scatter(grads.gate, 1), scatter(grads.up, 1), scatter(grads.down, 2))


def _sum(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(x, axes) if axes else x
