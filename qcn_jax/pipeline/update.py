"""One optimizer step over any number of packed rows, through one compiled shape.

RL and distillation pack a different number of rows in every update, so the step of pipeline.train, which takes
a whole batch of fixed size, does not fit. Here a fixed number of rows goes in at a time; gradients add up, and
the optimizer moves with the last of them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qcn_jax.errors import UserError
from qcn_jax.pipeline.train import TrainState

Arrays = Mapping[str, np.ndarray]
# (params, batch, *extra) -> (weighted sum of token losses, dict of sums); summed, not averaged.
SumLoss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


class Updater:
    """Compiles `loss` and the optimizer into one function and feeds it rows."""

    def __init__(self, loss: SumLoss, optimizer: optax.GradientTransformation, rows: int) -> None:
        """Args:
          loss: see SumLoss; `batch` has [rows, T] arrays, among them `weights`.
          optimizer: see pipeline.optimizer.
          rows: rows that go through the model at a time.
        """
        self._rows = rows

        def step(state, gradient, batch, total, last, *extra):
            (value, sums), new = jax.value_and_grad(loss, has_aux=True)(state.params, batch, *extra)
            gradient = jax.tree.map(lambda old, g: old + g / total, gradient, new)

            def move(state, gradient):
                norm = optax.global_norm(gradient)
                finite = jnp.isfinite(norm)
                updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
                params = optax.apply_updates(state.params, updates)
                keep = lambda a, b: jax.tree.map(lambda x, y: jnp.where(finite, x, y), a, b)
                moved = TrainState(state.step + 1, keep(params, state.params), keep(opt_state, state.opt_state))
                return moved, jax.tree.map(jnp.zeros_like, gradient), norm

            stay = lambda state, gradient: (state, gradient, jnp.zeros(()))
            state, gradient, norm = jax.lax.cond(last, move, stay, state, gradient)
            return state, gradient, sums | {"loss": value, "grad_norm": norm}

        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._gradient = None

    def __call__(self, state: TrainState, arrays: Arrays, *extra: Any) -> tuple[TrainState, dict[str, float]]:
        """One optimizer step over all rows of `arrays`, the loss averaged over their total weight.

        Args:
          state: donated.
          arrays: [R, T] numpy arrays with R a multiple of `rows`.
          *extra: further arguments of the loss (a teacher's parameters), not differentiated.

        Returns:
          The new state and the metrics: `grad_norm`, and every sum of the loss divided by the total weight.

        Raises:
          UserError: the gradient is not finite; nothing has been changed.
        """
        total = max(float(arrays["weights"].sum()), 1e-6)
        if self._gradient is None:
            self._gradient = jax.tree.map(jnp.zeros_like, state.params)
        sums: dict[str, float] = {}
        batches = list(_slices(arrays, self._rows))
        for index, batch in enumerate(batches):
            last = np.bool_(index == len(batches) - 1)
            state, self._gradient, values = self._step(state, self._gradient, batch, np.float32(total), last, *extra)
            for name, value in jax.device_get(values).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        norm = sums.pop("grad_norm")
        if not np.isfinite(norm):
            raise UserError(f"update {int(state.step)}: gradient norm {norm} is not finite; lower the learning rate")
        return state, {name: value / total for name, value in sums.items()} | {"grad_norm": norm}


def _slices(arrays: Arrays, rows: int) -> Iterator[dict[str, np.ndarray]]:
    for first in range(0, len(arrays["tokens"]), rows):
        yield {name: array[first : first + rows] for name, array in arrays.items()}
