"""Functions of the vocabulary's logits that never hold all logits, on one device or a mesh.

On a mesh every device takes its share of the tokens and the whole vocabulary: head kernels are gathered once, tokens
go through in chunks, the kernels' gradient adds up on the device in float32 and is reduced over the mesh once. Left to
the compiler, a loop over chunks reduces the gradient of the whole kernel in every chunk.

Axes: B rows, T positions, n tokens of a chunk, D model width, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qcn_jax.layers.products import widened_einsum
from qcn_jax.sharding.parallel import Parallel

Array = jax.Array
# (kernels, *arrays [n, ...]) -> pytree of [n] float32
HeadFunction = Callable[..., Any]
# Logits of one kernel that exist at a time on a device, in float32: half a gigabyte. Smaller chunks would spend more
# on reading and writing the kernel's gradient than on the products.
CHUNK_ELEMENTS = 1 << 27
_TILE = 256  # a large chunk is a multiple of this many tokens, whole tiles of any generation's matrix unit


@jax.custom_vjp
def project(hidden: Array, kernel: Array) -> Array:
    """Logits [n, V] float32 of hidden [n, D] and kernel [D, V], multiplied in hidden's dtype in both directions."""
    return widened_einsum("nd,dv->nv", hidden, kernel.astype(hidden.dtype))


def _project_forward(hidden: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return project(hidden, kernel), (hidden, kernel)


def _project_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    hidden, kernel = residuals
    cotangent = cotangent.astype(hidden.dtype)
    d_hidden = widened_einsum("nv,dv->nd", cotangent, kernel.astype(hidden.dtype))
    d_kernel = widened_einsum("nd,nv->dv", hidden, cotangent)
    return d_hidden.astype(hidden.dtype), d_kernel.astype(kernel.dtype)


project.defvjp(_project_forward, _project_backward)


def over_vocabulary(
    function: HeadFunction, kernels: Sequence[Array], *arrays: Array, parallel: Parallel | None = None,
    chunk: int | None = None,
) -> Any:  # fmt: skip
    """Applies `function` to all positions, a chunk of them at a time.

    Args:
      function: (kernels, *arrays) -> pytree of [n] float32, for n tokens; typically `project`s hidden states and
        reduces over the vocabulary. It must close over no traced value. Recomputed in the backward pass.
      kernels: head kernels [D, V] laid out as parameters are.
      *arrays: [B, T, ...] laid out as activations are; gradients flow to those of floating type. B and T must
        divide by the mesh axes of activation_batch, and of activation_length and vocab.
      parallel: the devices; None is one.
      chunk: tokens at a time on a device; by default such that some CHUNK_ELEMENTS logits exist.

    Returns:
      The pytree with [B, T] leaves.
    """
    batch, length = arrays[0].shape[:2]
    tokens = batch * length // (1 if parallel is None else parallel.mesh.size)
    if chunk is None:
        parts = math.ceil(tokens * kernels[0].shape[1] / CHUNK_ELEMENTS)
        chunk = math.ceil(tokens / parts)
        chunk = chunk if chunk < _TILE else -(-chunk // _TILE) * _TILE
    with jax.named_scope("over_vocabulary"):
        if parallel is None and chunk >= tokens:  # nothing to save: logits are kept for the backward pass
            return _unflatten(function(tuple(kernels), *(_flatten(array) for array in arrays)), batch, length)
        return _chunked(function, chunk, parallel, tuple(kernels), arrays)


def _flatten(array: Array) -> Array:
    return array.reshape(-1, *array.shape[2:])


def _unflatten(tree: Any, batch: int, length: int) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(batch, length, *leaf.shape[1:]), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(
    function: HeadFunction, chunk: int, parallel: Parallel | None, kernels: tuple[Array, ...], arrays: tuple[Array, ...]
) -> Any:
    layout = _Layout(parallel)

    def local(kernels: tuple[Array, ...], arrays: tuple[Array, ...]) -> Any:
        batch, length = arrays[0].shape[:2]
        kernels = layout.gathered(kernels)
        parts, total = _split(arrays, chunk)
        out = jax.lax.map(lambda xs: function(kernels, *xs), parts)
        return _unflatten(jax.tree.map(lambda leaf: _flatten(leaf)[:total], out), batch, length)

    return layout.run(local, (layout.kernel, layout.tokens), layout.tokens, kernels, arrays)


def _forward(
    function: HeadFunction, chunk: int, parallel: Parallel | None, kernels: tuple[Array, ...], arrays: tuple[Array, ...]
) -> Any:
    return _chunked(function, chunk, parallel, kernels, arrays), (kernels, arrays)


def _backward(
    function: HeadFunction, chunk: int, parallel: Parallel | None, residuals: tuple, cotangent: Any
) -> tuple[Any, Any]:
    kernels, arrays = residuals
    moving = [jnp.issubdtype(array.dtype, jnp.floating) for array in arrays]
    layout = _Layout(parallel)

    def local(kernels: tuple[Array, ...], arrays: tuple[Array, ...], cotangent: Any) -> Any:
        batch, length = arrays[0].shape[:2]
        whole = layout.gathered(kernels)
        parts, total = _split((arrays, cotangent), chunk)

        def body(sums: tuple[Array, ...], part: tuple) -> tuple:
            xs, ct = part

            def of(kernels: tuple[Array, ...], floating: list[Array]) -> Any:
                remaining = iter(floating)
                return function(kernels, *(next(remaining) if m else x for m, x in zip(moving, xs)))

            _, pull = jax.vjp(of, whole, [x for m, x in zip(moving, xs) if m])
            d_kernels, d_arrays = pull(ct)
            return tuple(s + d.astype(jnp.float32) for s, d in zip(sums, d_kernels)), d_arrays

        zeros = tuple(jnp.zeros(kernel.shape, jnp.float32) for kernel in whole)
        sums, d_arrays = jax.lax.scan(body, zeros, parts)
        d_arrays = _unflatten([_flatten(leaf)[:total] for leaf in d_arrays], batch, length)
        d_kernels = tuple(layout.scattered(s.astype(k.dtype)) for s, k in zip(sums, kernels))
        # Nothing before the head goes backward until the whole gradients, the largest arrays there are, are gone.
        return jax.lax.optimization_barrier((d_kernels, d_arrays))

    specs = (layout.kernel, layout.tokens, layout.tokens)
    d_kernels, d_arrays = layout.run(local, specs, (layout.kernel, layout.tokens), kernels, arrays, cotangent)
    remaining = iter(d_arrays)
    return d_kernels, tuple(next(remaining) if m else None for m in moving)


_chunked.defvjp(_forward, _backward)


def _split(tree: Any, chunk: int) -> tuple[Any, int]:
    """[b, t, ...] leaves as [chunks, chunk, ...], zero-padded; and the number of tokens."""
    total = math.prod(jax.tree.leaves(tree)[0].shape[:2])

    def split(array: Array) -> Array:
        flat = _flatten(array)
        flat = jnp.pad(flat, [(0, -total % chunk)] + [(0, 0)] * (flat.ndim - 1))
        return flat.reshape(-1, chunk, *flat.shape[1:])

    return jax.tree.map(split, tree), total


class _Layout:
    """Where kernels and tokens lie, and the collectives between."""

    def __init__(self, parallel: Parallel | None) -> None:
        self._parallel = parallel
        if parallel is None:
            self.kernel = self.tokens = PartitionSpec()
            self._dimensions, self._others = ((), ()), ()
            return
        self.kernel = parallel.spec("embed", "vocab")
        self._dimensions = (parallel.axes("embed"), parallel.axes("vocab"))
        # Tokens are split over the axes of the vocabulary too, so that no device repeats another's work.
        rows, columns = parallel.axes("activation_batch"), parallel.axes("activation_length", "vocab")
        self.tokens = PartitionSpec(rows or None, columns or None)
        self._others = tuple(axis for axis in (*rows, *columns) if axis not in parallel.axes("embed", "vocab"))

    def run(self, local: Callable[..., Any], in_specs: Any, out_specs: Any, *arguments: Any) -> Any:
        """`local` on every device's part of `arguments`."""
        if self._parallel is None:
            return local(*arguments)
        return self._parallel.per_device(local, in_specs, out_specs)(*arguments)

    # One mesh axis at a time, as `Parallel.gathered` and for its reason.

    def gathered(self, kernels: tuple[Array, ...]) -> tuple[Array, ...]:
        """Whole kernels from every device's part."""
        for dimension, axes in enumerate(self._dimensions):
            for axis in reversed(axes):  # the last axis holds neighbouring parts
                kernels = tuple(jax.lax.all_gather(k, axis, axis=dimension, tiled=True) for k in kernels)
        return kernels

    def scattered(self, gradient: Array) -> Array:
        """The device's part of the sum of whole gradients over all devices."""
        for dimension, axes in enumerate(self._dimensions):
            for axis in axes:
                gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=dimension, tiled=True)
        return jax.lax.psum(gradient, self._others) if self._others else gradient
