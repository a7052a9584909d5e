"""Optimizers through optax: AdamW, or Muon for matrices with AdamW for the rest, and one schedule.

Weight decay reaches every matrix and, as the Qwen3-Next blog describes, the zero-centred norm weights (it keeps
them from growing without bound). It never reaches A_log and dt_bias, whose zero is no natural centre, nor the
DeltaNet output norm, whose weight is initialised to one and is not zero-centred.
"""

import jax
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


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer that `config.name` chooses, over `steps` steps.

    Raises:
      UserError: an unknown name.
    """
    rate = schedule(config, steps)
    if config.name == "adamw":
        update = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decay_mask)
    elif config.name == "muon":
        update = optax.chain(
            contrib.muon(1.0, adam_b1=config.b1, adam_b2=config.b2, consistent_rms=_MUON_RMS,
                         muon_weight_dimension_numbers=muon_dimensions),
            # Both branches above already carry the minus sign of descent, so decay is subtracted here once.
            optax.add_decayed_weights(-config.weight_decay, mask=decay_mask),
            optax.scale_by_schedule(rate))
    else:
        raise UserError(f"--config.*.optimizer.name: unknown optimizer {config.name!r}; allowed: adamw, muon")
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
