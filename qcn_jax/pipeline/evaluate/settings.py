"""How the models of a run act when they are evaluated, kept in their folders: later evaluations do as the run did."""

import dataclasses
import os
import pathlib
from typing import Any

from qcn_jax import files
from qcn_jax.config import RunConfig
from qcn_jax.errors import UserError
from qcn_jax.hub.description import ACTING_FILE
from qcn_jax.pipeline.context import stage_seed


@dataclasses.dataclass(frozen=True)
class ActingSettings:
    """What stage `evaluate` goes by.

    scaffold, network, seed: as in the configuration.
    max_turns, max_new_tokens, max_length: limits of a turn and an episode.
    slots: episodes side by side.
    temperature, top_p, top_k: of samples; a single attempt is greedy.
    dtype, chunk_size: how the model is computed.
    tasks: file of held-out tasks, relative to the model's folder, of which `count` are chosen (bench.balanced).
    redraws, redraw_temperature: how often a turn that comes again to files on which tests failed is drawn once more.
    max_num_seqs, block_size, num_blocks: of the engine; 0 where the run leaves them to it.
    """

    scaffold: str
    network: str
    seed: int
    max_turns: int
    max_new_tokens: int
    max_length: int
    slots: int
    temperature: float
    top_p: float
    top_k: int
    dtype: str
    chunk_size: int
    tasks: str
    count: int
    redraws: int = 0
    redraw_temperature: float = 1.0
    max_num_seqs: int = 0
    block_size: int = 0
    num_blocks: int = 0

    def to_json(self) -> dict[str, Any]:
        """What `read` reads."""
        return dataclasses.asdict(self)

    def flags(self, sampled: bool) -> dict[str, Any]:
        """Values by the flags of `qcn evaluate` that give them; with `sampled` those of samples too."""
        names = ["scaffold", "network", "seed", "max_turns", "max_new_tokens", "max_length", "redraws",
                 "redraw_temperature"]
        names += ["temperature", "top_p", "top_k"] if sampled else []
        given = {name: value for name in ("max_num_seqs", "block_size", "num_blocks") if (value := getattr(self, name))}
        return {name: getattr(self, name) for name in names} | {"parallel": self.slots} | given


def of_run(config: RunConfig, root: pathlib.Path, folder: pathlib.Path) -> ActingSettings:
    """The settings of the models of a run; `folder` is where one of them lies below the work directory `root`."""
    evaluate, rollout = config.evaluate, config.evaluate.rollout
    return ActingSettings(
        evaluate.scaffold, config.network, stage_seed(config, "evaluate"), rollout.max_turns, rollout.max_new_tokens,
        rollout.max_length, rollout.slots, float(evaluate.temperature), float(rollout.top_p), rollout.top_k,
        config.model.dtype, config.model.chunk_size, os.path.relpath(root / "tasks" / "heldout.jsonl", folder),
        evaluate.tasks, evaluate.redraws, float(evaluate.temperature), rollout.max_num_seqs, rollout.block_size,
        rollout.num_blocks)


def read(folder: str | os.PathLike[str]) -> ActingSettings | None:
    """The settings that a model's folder holds; None where it holds none.

    Raises:
      UserError: they are damaged; the line names the file and the field.
    """
    path = pathlib.Path(folder, ACTING_FILE)
    if not files.is_file(path):
        return None
    row = files.read_object(path)
    for field in dataclasses.fields(ActingSettings):
        if field.name not in row and field.default is not dataclasses.MISSING:
            row[field.name] = field.default  # of a model that is older than the field
        value = row.get(field.name)
        if isinstance(value, bool) or not isinstance(value, (int, float) if field.type is float else field.type):
            raise UserError(f"{path}: {field.name} must be of type {field.type.__name__}, got {value!r:.60}; put the "
                            "file back, or remove it")
    return ActingSettings(**{field.name: row[field.name] for field in dataclasses.fields(ActingSettings)})
