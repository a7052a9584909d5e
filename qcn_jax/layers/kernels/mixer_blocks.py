"""Sizes, arrays and grid of the DeltaNet mixer's kernels (kernels.mixer_kernels).

Axes: B batch, T tokens (whole chunks), H key heads, R value heads per key head, N chunks, C chunk, dk/dv widths;
W = 2 dk + R dv convolved channels of a key head.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qcn_jax.layers.kernels.convolution import SUBLANES
from qcn_jax.layers.kernels.delta_rule import PARAMS, group_size

Array = jax.Array
Arrays = dict[str, Array]
_HALO = 16  # rows read before a chunk: a whole tile of any dtype, at least taps - 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes: heads H, repeats R, key_dim dk, value_dim dv, chunk C, taps of the convolution, eps of the norm."""

    heads: int
    repeats: int
    key_dim: int
    value_dim: int
    chunk: int
    taps: int
    eps: float

    @property
    def mixed(self) -> int:
        """W, convolved channels of a key head."""
        return 2 * self.key_dim + self.repeats * self.value_dim

    @property
    def width(self) -> int:
        """Channels of a key head in the projection: [q | k | v of R heads | z of R heads]."""
        return self.mixed + self.repeats * self.value_dim

    @property
    def pieces(self) -> list[slice]:
        """Channels of q, k and every value head within a key head."""
        ends = [0, self.key_dim, 2 * self.key_dim]
        ends += [ends[-1] + self.value_dim * (r + 1) for r in range(self.repeats)]
        return [slice(a, b) for a, b in zip(ends, ends[1:])]

    def part(self, i: int) -> slice:
        """Lanes of value head i among value heads side by side."""
        return slice(i * self.value_dim, (i + 1) * self.value_dim)


class Blocks:
    """Grid, shapes and blocks of a call; `reverse` runs the chunks from the last to the first."""

    def __init__(self, sizes: Sizes, rows: Array, limit: int, reverse: bool = False):
        self.sizes = sizes
        self.batch, self.heads, self.chunks, self.gates, self.chunk = rows.shape
        self.group = group_size(self.heads, limit)
        self.grid = (self.batch, self.heads // self.group, self.chunks)
        self.turn = (lambda n: self.chunks - 1 - n) if reverse else (lambda n: n)

    def array(self, name: str) -> tuple[tuple[int, ...], pl.BlockSpec]:
        """Shape and blocks of an array by its name; the gradient of x is d_x."""
        s, (batch, group, groups) = self.sizes, (self.batch, self.group, self.grid[1])
        values = s.repeats * s.value_dim
        state = (s.key_dim, values)
        match name:
            case "qkvz" | "d_qkvz":
                return self._tokens(s.width)
            case "halo":  # of qkvz, the rows before the chunk; before the first chunk its own (to be ignored)
                before = lambda n: jnp.maximum(self.turn(n) * (self.chunk // _HALO) - 1, 0)
                block = pl.BlockSpec((1, _HALO, group * s.width), lambda b, h, n: (b, before(n), h))
                return self._tokens(s.width)[0], block
            case "out" | "d_out":
                return self._tokens(values)
            case "kernel":  # taps, then zeros
                block = pl.BlockSpec((SUBLANES, group * s.mixed), lambda b, h, n: (0, h))
                return (SUBLANES, self.heads * s.mixed), block
            case "weight":
                return (1, s.value_dim), pl.BlockSpec((1, s.value_dim), lambda b, h, n: (0, 0))
            case "d_weight":
                block = pl.BlockSpec((1, 1, SUBLANES, s.value_dim), lambda b, h, n: (b, h, 0, 0))
                return (batch, groups, SUBLANES, s.value_dim), block
            case "rows" | "d_rows":
                return self._per_chunk(self.gates, self.chunk)
            case "states":  # which chunks receive
                return self._per_chunk(*state)
            case "inverses":
                return self._per_chunk(s.repeats, self.chunk, self.chunk)
            case "before":  # float32, of qkvz, the rows before the first token
                return self._per_head_lanes(s.width)
            case "d_before" | "d_kernel":
                return self._per_head_lanes(s.mixed)
            # Before the first token and behind the last; in the backward pass the gradient of what a shard hands on.
            case "state" | "final" | "d_state":
                return self._per_head(*state)
            case "transfer":  # of every value head [added | carried]
                return self._per_head(s.key_dim, s.repeats * (s.value_dim + s.key_dim))
        raise KeyError(name)

    def _tokens(self, width: int) -> tuple[tuple[int, ...], pl.BlockSpec]:
        block = pl.BlockSpec((1, self.chunk, self.group * width), lambda b, h, n: (b, self.turn(n), h))
        return (self.batch, self.chunks * self.chunk, self.heads * width), block

    def _per_chunk(self, *tail: int) -> tuple[tuple[int, ...], pl.BlockSpec]:
        index = lambda b, h, n: (b, h, self.turn(n), *[0] * len(tail))
        return (self.batch, self.heads, self.chunks, *tail), pl.BlockSpec((1, self.group, 1, *tail), index)

    def _per_head(self, *tail: int) -> tuple[tuple[int, ...], pl.BlockSpec]:
        index = lambda b, h, n: (b, h, *[0] * len(tail))
        return (self.batch, self.heads, *tail), pl.BlockSpec((1, self.group, *tail), index)

    def _per_head_lanes(self, width: int) -> tuple[tuple[int, ...], pl.BlockSpec]:
        block = pl.BlockSpec((1, SUBLANES, self.group * width), lambda b, h, n: (b, 0, h))
        return (self.batch, SUBLANES, self.heads * width), block

    def run(
        self, kernel: Callable, name: str, reads: Arrays, writes: dict[str, jnp.dtype], state: str, interpret: bool
    ) -> Arrays:
        """Runs `kernel`(reads, writes, state, rows), which is given references.

        Scratch that lasts from chunk to chunk: for every key head of the group a float32 state of the shape of the
        array `state`, and 8 rows of convolved channels.
        """
        shapes = {array: jax.ShapeDtypeStruct(self.array(array)[0], dtype) for array, dtype in writes.items()}
        blocks = lambda arrays: {array: self.array(array)[1] for array in arrays}
        scratch = [(self.group, *self.array(state)[0][2:]), (SUBLANES, self.group * self.sizes.mixed)]
        return pl.pallas_call(
            functools.partial(kernel, sizes=self.sizes, interpret=interpret), grid=self.grid,
            in_specs=[blocks(reads)], out_specs=(blocks(writes),), out_shape=(shapes,),
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            compiler_params=PARAMS, interpret=interpret, name=f"delta_net_{name}",
        )(reads)[0]
