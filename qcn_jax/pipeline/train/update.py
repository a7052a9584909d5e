"""One optimizer step over any number of packed rows, through one compiled shape.

RL and distillation pack a different number of rows in every update, so the step of pipeline.train.loop, which takes
a whole batch of fixed size, does not fit. Here a fixed number of rows goes in at a time; gradients add up, and
the optimizer moves with the last of them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qcn_jax.errors import UserError
from qcn_jax.pipeline.train.loop import TrainState, global_norm, updated

Arrays = Mapping[str, np.ndarray]
# (params, batch, *extra) -> (weighted sum of token losses, dict of sums); summed, not averaged.
SumLoss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def make_update(
    loss: SumLoss, optimizer: optax.GradientTransformation, shardings: TrainState | None = None,
    batch_sharding: jax.sharding.Sharding | None = None, judged: bool = False,
) -> Callable[..., tuple[TrainState, Any, dict[str, jax.Array]]]:  # fmt: skip
    """Compiles one pass of some rows through the model, which ends in an optimizer step where it is the last.

    Args:
      loss: see SumLoss; `batch` has [rows, T] arrays, among them `weights`.
      optimizer: see pipeline.train.optimizer.
      shardings, batch_sharding: of the state and of a batch's arrays on a mesh; None leaves the layout to the
        arguments.
      judged: with `shardings`: the loss's last argument is a tree of parameters, laid out as the state's.

    Returns:
      (state, gradient, batch, total, last, *extra) -> (state, gradient, metrics). `gradient`, the float32 sum so far
      of gradients over `total`, and `state` are donated; where `last`, the optimizer moves and the sum begins anew.
    """

    def step(state, gradient, batch, total, last, *extra):
        (value, sums), new = jax.value_and_grad(loss, has_aux=True)(state.params, batch, *extra)
        gradient = jax.tree.map(lambda old, g: old + g.astype(old.dtype) / total, gradient, new)
        if shardings is not None:
            gradient = jax.lax.with_sharding_constraint(gradient, shardings.params)

        def move(state, gradient):
            norm = global_norm(gradient)
            moved = updated(state, gradient, jnp.isfinite(norm), optimizer, shardings)
            return moved, jax.tree.map(jnp.zeros_like, gradient), norm

        stay = lambda state, gradient: (state, gradient, jnp.zeros(()))
        state, gradient, norm = jax.lax.cond(last, move, stay, state, gradient)
        return state, gradient, sums | {"loss": value, "grad_norm": norm}

    if shardings is None:
        return jax.jit(step, donate_argnums=(0, 1))
    whole, params = shardings.step, shardings.params
    return jax.jit(
        step, donate_argnums=(0, 1), out_shardings=(shardings, params, whole),
        in_shardings=(shardings, params, batch_sharding, whole, whole, params if judged else None))


class Updater:
    """Compiles `loss` and the optimizer into one function and feeds it rows."""

    def __init__(self, loss: SumLoss, optimizer: optax.GradientTransformation, rows: int) -> None:
        """Args:
          loss, optimizer: see `make_update`.
          rows: rows that go through the model at a time.
        """
        self._rows = rows
        self._step = make_update(loss, optimizer)
        self._gradient = None

    def __call__(self, state: TrainState, *parts: "Part") -> tuple[TrainState, dict[str, float]]:
        """One optimizer step over all rows of all parts, the loss averaged over their total weight.

        Args:
          state: donated.
          *parts: rows, each with further arguments of the loss.

        Returns:
          The new state and the metrics: `grad_norm`, and every sum of the loss divided by the total weight; the
          same for each part that has a name, under `<metric>/<name>`, divided by its own weight.

        Raises:
          UserError: the gradient is not finite; parameters and optimizer state have not been changed.
        """
        if self._gradient is None:
            self._gradient = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), state.params)
        batches = [(part, batch) for part in parts for batch in _slices(part.arrays, self._rows)]
        weights = {part.name: float(part.arrays["weights"].sum()) for part in parts}
        total = max(sum(float(part.arrays["weights"].sum()) for part in parts), 1e-6)
        metrics: dict[str, float] = {}

        def add(name: str, value: float) -> None:
            metrics[name] = metrics.get(name, 0.0) + value

        norm = 0.0
        for index, (part, batch) in enumerate(batches):
            last = np.bool_(index == len(batches) - 1)
            state, self._gradient, values = self._step(
                state, self._gradient, batch, np.float32(total), last, *part.extra
            )
            values = {name: float(value) for name, value in jax.device_get(values).items()}
            norm += values.pop("grad_norm")
            for name, value in values.items():
                add(name, value / total)
                if part.name:
                    add(f"{name}/{part.name}", value / max(weights[part.name], 1e-6))
        if not np.isfinite(norm):
            raise UserError(f"update {int(state.step)}: gradient norm {norm} is not finite; lower the learning rate")
        return state, metrics | {"grad_norm": norm}


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows that the same further arguments of the loss go with.

    arrays: [R, T] numpy arrays, R a multiple of the updater's rows.
    extra: further arguments of the loss (a teacher's parameters), not differentiated.
    name: under which its metrics are told apart; unique among the parts of an update, or empty.
    """

    arrays: Arrays
    extra: tuple[Any, ...] = ()
    name: str = ""


def _slices(arrays: Arrays, rows: int) -> Iterator[dict[str, np.ndarray]]:
    for first in range(0, len(arrays["tokens"]), rows):
        yield {name: array[first : first + rows] for name, array in arrays.items()}
