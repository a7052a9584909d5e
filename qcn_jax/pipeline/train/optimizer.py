"""Optimizers through optax: AdamW, or Muon for matrices with AdamW for the rest, and one schedule.

Updates are computed in float32 whatever the dtypes of parameters, gradients and kept moments. `eps` and the betas are
AdamW's, also where Muon takes the matrices: Muon's momentum is 0.95, Nesterov's, and its own eps guards a division.

Weight decay reaches every matrix and, as the Qwen3-Next blog describes, the zero-centred norm weights (it keeps
them from growing without bound). It never reaches A_log and dt_bias, whose zero is no natural centre, nor the
DeltaNet output norm, whose weight is initialised to one and is not zero-centred.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from qcn_jax.config import OptimizerConfig
from qcn_jax.errors import UserError

Params = dict

# Share of AdamW's root-mean-square update that Muon's orthogonal update gets (arXiv 2502.16982, section 2.2), so
# that one learning rate fits both.
_MUON_RMS = 0.2


def parameter_name(path: tuple) -> str:
    """The slash-joined name of a leaf, e.g. blocks/full/self_attn/q_proj/kernel."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak over `warmup_steps`, then cosine to `final_fraction` of it at `steps`."""
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate, peak_value=config.learning_rate, warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1), end_value=config.final_fraction * config.learning_rate)


def decay_mask(params: Params) -> Params:
    """True for every leaf that weight decay reaches."""

    def decays(path: tuple, _: jax.Array) -> bool:
        name = parameter_name(path)
        return not name.endswith(("A_log", "dt_bias", "linear_attn/norm/weight"))

    return jax.tree_util.tree_map_with_path(decays, params)


def muon_dimensions(params: Params) -> Params:
    """MuonDimensionNumbers of the leaves that Muon updates, None for those left to AdamW.

    Muon takes the projections of mixers and experts; leading axes (scanned blocks, experts) are separate
    matrices. Embedding, head, router, convolution and everything with one axis stay with AdamW: their rows are
    tokens, experts or channels, not directions of one linear map.
    """

    def dimensions(path: tuple, leaf: jax.Array) -> contrib.MuonDimensionNumbers | None:
        name = parameter_name(path)
        outside = name.startswith(("embed_tokens", "lm_head"))
        vectors = ("mlp/gate/kernel", "shared_expert_gate/kernel", "conv1d/kernel", "in_proj_ba/kernel")
        matrix = name.endswith("/kernel") or "/experts/" in name
        if outside or not matrix or name.endswith(vectors) or leaf.ndim < 2:
            return None
        return contrib.MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _muon_labels(params: Params) -> Params:
    is_leaf = lambda x: x is None or isinstance(x, contrib.MuonDimensionNumbers)
    return jax.tree.map(lambda x: "adam" if x is None else "muon", muon_dimensions(params), is_leaf=is_leaf)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer that `config.name` chooses, over `steps` steps.

    Raises:
      UserError: an unknown name or dtype.
    """
    rate = schedule(config, steps)
    if config.name == "adamw":
        update = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay,
                             mask=decay_mask)
    elif config.name == "muon":
        # optax's own AdamW part of Muon would share Muon's eps and its Nesterov momentum. Both carry the minus sign.
        muon = contrib.muon(-1.0, consistent_rms=_MUON_RMS, muon_weight_dimension_numbers=muon_dimensions)
        adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
        update = optax.chain(
            optax.partition({"muon": muon, "adam": adam}, _muon_labels),
            optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
            optax.scale_by_learning_rate(rate))
    else:
        raise UserError(f"--config.*.optimizer.name: unknown optimizer {config.name!r}; allowed: adamw, muon")
    moments = {"mu": _moment_dtype(config.mu_dtype, "mu_dtype"), "nu": _moment_dtype(config.nu_dtype, "nu_dtype")}
    update = in_float32(optax.chain(optax.clip_by_global_norm(config.clip_norm), update), moments)
    return with_master_copy(update) if config.master_copy else update


def _moment_dtype(name: str, field: str) -> jnp.dtype:
    if name not in ("float32", "bfloat16"):
        raise UserError(f"--config.*.optimizer.{field}: {name!r}; allowed: float32, bfloat16")
    return jnp.dtype(name)


def in_float32(inner: optax.GradientTransformation, moments: dict[str, jnp.dtype]) -> optax.GradientTransformation:
    """`inner` computed in float32, its state fields named in `moments` kept in those dtypes between steps.

    bfloat16 holds 8 binary digits: a moment that decays by 0.1 % a step would be rounded to what it was, for ever. It
    is rounded up or down at random, so that the mean is exact; the bits follow from the optimizer's count of steps.
    """
    to_float32 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def map_moments(
        function: Callable[[jax.Array, jnp.dtype, int], jax.Array], state: optax.OptState
    ) -> optax.OptState:
        """`function` of every moment, the dtype it is kept in, and its number in the tree."""
        leaves, tree = jax.tree_util.tree_flatten_with_path(state)
        for index, (path, leaf) in enumerate(leaves):
            fields = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey) and key.name in moments]
            leaves[index] = function(leaf, moments[fields[-1]], index) if fields else leaf
        return jax.tree.unflatten(tree, leaves)

    def kept(state: optax.OptState) -> optax.OptState:
        step = jax.random.fold_in(jax.random.key(0), optax.tree_utils.tree_get_all_with_path(state, "count")[0][1])
        return map_moments(lambda leaf, dtype, index: rounded(leaf, dtype, jax.random.fold_in(step, index)), state)

    def init(params: Params) -> optax.OptState:
        return map_moments(lambda leaf, dtype, _: leaf.astype(dtype), inner.init(to_float32(params)))

    def update(grads: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        state = map_moments(lambda leaf, *_: leaf.astype(jnp.float32), state)
        updates, state = inner.update(to_float32(grads), state, to_float32(params))
        return updates, kept(state)

    return optax.GradientTransformation(init, update)


def rounded(x: jax.Array, dtype: jnp.dtype, key: jax.Array) -> jax.Array:
    """x float32 in `dtype`: to bfloat16, one of the two nearest numbers at random, such that the mean is x."""
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    # bfloat16 is the upper half of a float32: what is added to the lower half carries with the probability of its size.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16)
    up = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), up, x.astype(dtype))


class MasterCopyState(NamedTuple):
    """float32 parameters, of which the model's are the rounded form, and the state of the optimizer that moves them."""

    master: Params
    inner: optax.OptState


def with_master_copy(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` applied to float32 parameters, so that updates too small for the model's dtype add up all the same."""

    def init(params: Params) -> MasterCopyState:
        # A copy even where the dtype is float32 already: both are donated.
        master = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
        return MasterCopyState(master, inner.init(params))

    def update(grads: Params, state: MasterCopyState, params: Params | None = None) -> tuple[Params, MasterCopyState]:
        updates, inner_state = inner.update(grads, state.inner, state.master)
        master = optax.apply_updates(state.master, updates)
        # What is added to the rounded parameters in float32 gives the master copy, which is then rounded.
        difference = jax.tree.map(lambda m, p: m - p.astype(jnp.float32), master, params)
        return difference, MasterCopyState(master, inner_state)

    return optax.GradientTransformation(init, update)


def state_like(optimizer: optax.GradientTransformation, params: Params, of_params: Any, other: Any) -> Any:
    """A tree of the optimizer state's structure with the leaf of `of_params` for every parameter's, else `other`.

    Args:
      optimizer: whose state.
      params: parameters or their ShapeDtypeStructs.
      of_params: a tree of params' structure, e.g. of shardings.
      other: the leaf of counters and the like.
    """
    by_name = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(of_params)[0]}
    shapes = {parameter_name(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}

    def choose(path: tuple, leaf: jax.ShapeDtypeStruct) -> Any:
        keys = [key for key in path if isinstance(key, jax.tree_util.DictKey)]
        name = parameter_name(tuple(keys))
        # Wrappers put their own dictionary keys ("muon", "adam") in front of a parameter's.
        while name not in by_name and "/" in name:
            name = name.split("/", 1)[1]
        return by_name[name] if name in by_name and shapes[name] == leaf.shape else other

    return jax.tree_util.tree_map_with_path(choose, jax.eval_shape(optimizer.init, params))
