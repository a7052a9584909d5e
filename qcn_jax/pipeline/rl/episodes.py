"""What RL and distillation share: who acts on which prompts, and episodes turned into rows for the model.

An update is: choose prompts, let the policy act on them, learn from what came back. Everything that an update
does follows from the seed, the update's number and the state, so that a run that was killed and resumes from a
checkpoint gives what it would have given.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from qcn_jax.chat.encoder import Encoder
from qcn_jax.config import ModelConfig, RolloutConfig
from qcn_jax.errors import UserError
from qcn_jax.inference.engine import Engine
from qcn_jax.inference.sampling import Sampling
from qcn_jax.pipeline.data.packing import pack
from qcn_jax.pipeline.rl.records import RolloutRecord
from qcn_jax.sharding.parallel import Parallel

T = TypeVar("T")


def make_engine(
    model: ModelConfig, params: Any, encoder: Encoder, config: RolloutConfig, sequence_length: int | None = None,
    parallel: Parallel | None = None, with_routes: bool = False,
) -> Engine:
    """The engine that a stage's rollouts use, on the mesh that the stage learns on.

    Raises:
      UserError: an episode may become longer than the rows that are trained on.
    """
    if sequence_length is not None and config.max_length > sequence_length:
        raise UserError(
            f"rollout.max_length is {config.max_length} and must not exceed sequence_length, {sequence_length}: an "
            "episode is learned from whole"
        )
    return Engine(
        model, params, slots=config.slots, max_length=config.max_length, max_new_tokens=config.max_new_tokens,
        stop_ids=sorted(encoder.stops), prefill_rows=config.prefill_rows, prefill_chunk=config.prefill_chunk,
        drawable=encoder.tokenizer.known_ids(model.vocab_size), parallel=parallel,
        with_routes=with_routes, several_shapes=config.several_shapes, max_num_seqs=config.max_num_seqs or None,
        block_size=config.block_size or None, num_blocks=config.num_blocks or None, preemption=config.preemption,
    )  # fmt: skip


def sampling_of(config: RolloutConfig) -> Sampling:
    """How a stage draws tokens."""
    return Sampling(config.temperature, config.top_p, config.top_k)


def choose(items: Sequence[T], count: int, update: int, seed: int) -> list[T]:
    """The items of one update: consecutive pieces of one shuffled order after another.

    Every item comes once before any comes again; the choice depends on the arguments alone.
    """
    if not items:
        raise UserError("there are no prompts to learn from; stage tasks made too few, or none passed the filter")
    chosen = []
    for position in range(update * count, (update + 1) * count):
        epoch, index = divmod(position, len(items))
        order = np.random.default_rng([seed, epoch]).permutation(len(items))
        chosen.append(items[order[index]])
    return chosen


def document(record: RolloutRecord, weight: float = 1.0, **per_token: np.ndarray) -> dict[str, np.ndarray]:
    """An episode as a document for packing, aligned with predicting positions.

    Args:
      record: the episode.
      weight: in the loss, of the positions whose next token is one that the policy chose; the others have none.
      **per_token: further arrays [n] about each token; shifted to the position that predicts it.
    """
    shift = lambda values: np.append(values[1:], np.zeros(1, values.dtype))
    arrays = {name: shift(np.asarray(values)) for name, values in per_token.items()}
    return {"tokens": record.tokens, "weights": shift(np.float32(weight) * record.sampled), **arrays}


def pack_rows(documents: Sequence[dict[str, np.ndarray]], length: int, rows: int) -> dict[str, np.ndarray]:
    """Documents in as few rows of `length` as best fit finds, a multiple of `rows` of them."""
    return pack(documents, length, rows=rows)


def say_where(parallel: Parallel | None, log: Callable[[str], None]) -> None:
    """Logs how a stage that acts and learns is spread over devices, where there are several."""
    if parallel is not None:
        axes = " x ".join(f"{axis} {size}" for axis, size in parallel.mesh.shape.items() if size > 1)
        log(f"acts and learns on {parallel.mesh.size} devices ({axes})")
