"""One optimizer step, a pure function (state, batch, frozen) -> (state, metrics), for every stage that trains.

A batch is one or more slices that go through the model one after the other; their gradients add up and the optimizer
moves once. Mid-training and SFT fill every slice; reinforcement learning and distillation have other numbers of rows
in every update, leave the last slices empty, and each slice may be of a domain of its own, with a teacher of its own.
One shape, and so one compilation, serves all updates; empty slices cost nothing.

Axes: S slices, R rows of a slice, T positions.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

Params = Any
Batch = Mapping[str, jax.Array]
# (params, slice) or, where a step has frozen parameters, (params, slice, frozen) -> (loss, metrics): the slice's
# contributions to the mean over the whole batch, scalars and a dict of scalars.
LossFn = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
DeriveFn = Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]]  # metrics of a whole batch -> those that are kept
WholeFn = Callable[[Params, Batch], Any]  # (params, slice) -> sums over the slice's tokens, a pytree of float32

SECTION = "section"  # name of the array [S] that says of which section a slice is


@flax.struct.dataclass
class TrainState:
    """What a step changes: the number of steps done, parameters and optimizer state."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> "TrainState":
        """Returns a fresh state. The first step donates `params`; copy them first if they are needed later."""
        return _committed(cls(jnp.zeros((), jnp.int32), params, optimizer.init(params)))


def _committed(state: TrainState) -> TrainState:
    """Binds every leaf to devices: those that are not go where the parameters are, replicated.

    A compiled step returns bound arrays; a first call with free ones would have another signature, and the step
    would be compiled twice.
    """
    bound = [leaf for leaf in jax.tree.leaves(state.params) if getattr(leaf, "committed", False)]
    place = bound[0].sharding if bound else jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
    if isinstance(place, jax.sharding.NamedSharding):
        place = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
    bind = lambda leaf: leaf if getattr(leaf, "committed", False) else jax.device_put(leaf, place)
    return jax.tree.map(bind, state)


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The arrays of one step: [S, R, T] int32 tokens, segment_ids and positions, float32 `floats`, int16 `routes`.

    Attributes:
      slices, rows, length: S, R and T.
      floats: names of the float32 arrays; `weights` is among them.
      sections: names of what metrics are told apart by, as `<metric>/<section>`. With several, an array `section` [S]
        int32 says which one a slice is of.
      padded: the last slices may be empty (without weight); they are left out.
      routes: (L, k) of an array `routes` [S, R, T, L, k], experts to replay; empty where there is none.
    """

    slices: int
    rows: int
    length: int
    floats: tuple[str, ...] = ("weights",)
    sections: tuple[str, ...] = ()
    padded: bool = False
    routes: tuple[int, ...] = ()

    def arrays(self) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
        """Returns shape and dtype of every array, by name."""
        whole = (self.slices, self.rows, self.length)
        found = {name: (whole, jnp.dtype(jnp.int32)) for name in ("tokens", "segment_ids", "positions")}
        found |= {name: (whole, jnp.dtype(jnp.float32)) for name in self.floats}
        found |= {"routes": ((*whole, *self.routes), jnp.dtype(jnp.int16))} if self.routes else {}
        return found | ({SECTION: ((self.slices,), jnp.dtype(jnp.int32))} if self.sections else {})


def make_step(
    loss: LossFn, optimizer: optax.GradientTransformation, shape: BatchShape, shardings: TrainState | None = None,
    batch_shardings: Mapping[str, jax.sharding.Sharding] | None = None, frozen: int = 0, whole: WholeFn | None = None,
    derive: DeriveFn = dict,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:  # fmt: skip
    """Compiles one optimizer step.

    Args:
      loss: see LossFn. A slice holds `weight_sum`, the loss weight of the whole batch, and `fraction`, one over its
        number of slices, beside its arrays [R, T]: sums over tokens are divided by the former and means multiplied by
        the latter, so that the slices' values add up to those of the undivided batch.
      optimizer: see pipeline.train.optimizer.
      shape: of a batch.
      shardings: of the state (see pipeline.train.layout), in and out; leaves in host memory travel to the device within
        the step. None leaves the layout to the arguments.
      batch_shardings: of the batch's arrays, given with `shardings`.
      frozen: how many trees of frozen parameters (a reference, teachers) there are, laid out as the state's. With one,
        all slices are given it; with several, a slice of section i is given the i-th.
      whole: what the loss of a slice must know of all of them, being no sum over tokens. With several slices its sums
        over the batch are taken first, and every slice is given them as `whole`, without gradient.
      derive: see DeriveFn; for metrics that are no sums over slices.

    Returns:
      (state, batch, frozen=()) -> (state, metrics), `state` donated, `frozen` a tuple of trees. metrics holds the
      loss's own, `loss`, `grad_norm` and `finite`; those of sections are means over their own weight. When the loss or
      a gradient is not finite, params and optimizer state stay as they were.
    """
    gradient = make_gradient(loss, shape, shardings, whole)

    def step(state: TrainState, batch: Batch, frozen: tuple[Params, ...] = ()):
        grads, metrics = gradient(state.params, batch, frozen)
        norm = global_norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        state = updated(state, grads, finite, optimizer, shardings)
        return state, derive(metrics) | {"grad_norm": norm, "finite": finite}

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step),
                   in_shardings=(shardings, dict(batch_shardings), (shardings.params,) * frozen))


def make_gradient(loss: LossFn, shape: BatchShape, shardings: TrainState | None = None, whole: WholeFn | None = None
                  ) -> Callable[[Params, Batch, tuple[Params, ...]], tuple[Params, dict[str, jax.Array]]]:
    """Returns (params, batch, frozen) -> (gradient of a batch's loss, its metrics); see `make_step`."""
    gradient = jax.value_and_grad(loss, has_aux=True)

    def batch_gradient(params: Params, batch: Batch, frozen: tuple[Params, ...]
                       ) -> tuple[Params, dict[str, jax.Array]]:
        weights = batch["weights"].sum((1, 2))
        total = jnp.maximum(weights.sum(), 1e-6)
        live = _live(weights) if shape.padded else shape.slices
        scalars = {"weight_sum": total, "fraction": jnp.float32(1) / live}

        cut = lambda index: {name: array[index] for name, array in batch.items()}
        if whole is not None and shape.slices > 1:
            with jax.named_scope("whole"):
                scalars["whole"] = _summed(lambda index: whole(params, cut(index)), live)

        def one(index: int | jax.Array) -> tuple[Params, dict[str, jax.Array]]:
            """Gradient and metrics of one slice."""
            arrays = cut(index)
            section = arrays.pop(SECTION, None)
            (value, metrics), grads = gradient(params, arrays | scalars, *_chosen(frozen, section))
            metrics = metrics | {"loss": value}
            return grads, metrics if section is None else _placed(metrics, section, len(shape.sections))

        def laid_out(total: tuple[Params, dict[str, jax.Array]]) -> tuple[Params, dict[str, jax.Array]]:
            if shardings is None:
                return total
            return jax.lax.with_sharding_constraint(total[0], shardings.params), total[1]

        grads, metrics = one(0) if shape.slices == 1 else _summed(one, live, laid_out)
        if shape.sections:
            metrics = _by_section(metrics, shape.sections, weights, batch[SECTION])
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        return grads, metrics

    return batch_gradient


def _live(weights: jax.Array) -> jax.Array:
    """The number of slices up to the last one with a weight; at least one."""
    return jnp.max(jnp.where(weights > 0, jnp.arange(1, len(weights) + 1), 1))


def _chosen(frozen: tuple[Params, ...], section: jax.Array | None) -> tuple[Params, ...]:
    """The frozen parameters of a slice, as further arguments of the loss."""
    if len(frozen) < 2:
        return frozen
    return (jax.lax.switch(section, [lambda tree=tree: tree for tree in frozen]),)


def _summed(one: Callable, live: int | jax.Array, laid_out: Callable[[Any], Any] = lambda x: x) -> Any:
    """Sums of `one` over the first `live` slices, in float32 whatever the precision of the parts."""

    one = jax.jit(one, inline=True)  # traced once, for its shapes and in the loop: a gradient takes long to trace

    def body(index: jax.Array, total: Any) -> Any:
        return laid_out(jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, one(index)))

    index = jax.ShapeDtypeStruct((), jnp.int32)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(one, index))
    return jax.lax.fori_loop(0, live, body, zeros)


def _placed(metrics: dict[str, jax.Array], section: jax.Array, count: int) -> dict[str, jax.Array]:
    """Metrics as arrays [sections] that are zero but at `section`."""
    return {name: jnp.zeros(count, jnp.float32).at[section].set(value) for name, value in metrics.items()}


def _by_section(metrics: dict[str, jax.Array], names: tuple[str, ...], weights: jax.Array, section: jax.Array
                ) -> dict[str, jax.Array]:
    """Sums over sections [sections] as metrics of all, and as means over the weight of each."""
    own = jnp.zeros(len(names), jnp.float32).at[section].add(weights)
    whole = {name: value.sum() for name, value in metrics.items()}
    scaled = {name: value * weights.sum() / jnp.maximum(own, 1e-6) for name, value in metrics.items()}
    return whole | {f"{name}/{of}": value[i] for name, value in scaled.items() for i, of in enumerate(names)}


def global_norm(grads: Params) -> jax.Array:
    """Returns the root of the sum of all squares, in float32 whatever the dtypes."""
    return optax.global_norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))


def updated(state: TrainState, grads: Params, finite: jax.Array, optimizer: optax.GradientTransformation,
            shardings: TrainState | None = None) -> TrainState:
    """Returns the state after one optimizer step with `grads`; its step count alone moves where not `finite`."""
    opt_state = state.opt_state
    if shardings is not None:
        opt_state = jax.tree.map(_on_device, opt_state, shardings.opt_state)
    with jax.named_scope("optimizer"):
        updates, new_opt_state = optimizer.update(grads, opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = lambda new, old: jnp.where(finite, new, old)
        params, new_opt_state = jax.tree.map(keep, (params, new_opt_state), (state.params, opt_state))
    if shardings is not None:
        new_opt_state = jax.tree.map(_stored, new_opt_state, shardings.opt_state)
    return TrainState(state.step + 1, params, new_opt_state)


def _in_host_memory(sharding: jax.sharding.Sharding) -> bool:
    return sharding.memory_kind is not None and sharding.memory_kind.endswith("host")


def _on_device(leaf: jax.Array, sharding: jax.sharding.NamedSharding) -> jax.Array:
    return jax.device_put(leaf, sharding.with_memory_kind("device")) if _in_host_memory(sharding) else leaf


def _stored(leaf: jax.Array, sharding: jax.sharding.NamedSharding) -> jax.Array:
    return jax.device_put(leaf, sharding) if _in_host_memory(sharding) else leaf
