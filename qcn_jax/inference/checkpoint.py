"""A checkpoint folder as an engine with its tokenizer, for `qcn generate` and `qcn serve`."""

import dataclasses
import os
import pathlib
from typing import Any

import jax

from qcn_jax import hub
from qcn_jax.chat.tokenizer import END_OF_TEXT, TURN_END, Tokenizer
from qcn_jax.config import MeshConfig, ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.hub import description
from qcn_jax.inference.engine import Engine
from qcn_jax.inference.memory import Budget
from qcn_jax.inference.placement import Placement, acting
from qcn_jax.sharding.mesh import make_parallel
from qcn_jax.sharding.parallel import Parallel


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An engine over a checkpoint's weights; `stop_ids` end a turn."""

    engine: Engine
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    name: str


def load_to_act(folder: str | os.PathLike[str], mesh: MeshConfig | None
                ) -> tuple[ModelConfig, dict[str, Any], Parallel | None]:
    """Reads a folder's weights onto one device, or onto a mesh of all devices as acting wants them (see placement).

    Raises:
      UserError: something is missing or damaged, or sizes do not divide by the mesh.
    """
    if mesh is None:
        config, params = hub.load(folder)
        return config, jax.device_put(params), None
    config, parallel = hub.inspect(folder), make_parallel(mesh)
    config, params = hub.load(folder, shardings=Placement(acting(parallel, config)).shardings(config))
    return config, params, parallel


def check_budget(folder: str | os.PathLike[str], mesh: MeshConfig | None, *, slots: int, max_length: int,
                 block_size: int | None, num_blocks: int | None) -> None:
    """Raises UserError where an Engine would refuse its blocks; reads no weights."""
    config = hub.inspect(folder)
    parts = 1 if mesh is None else Placement(acting(make_parallel(mesh), config)).parts
    length = min(max_length, config.max_position_embeddings)
    try:
        Budget.of(parts, -(-slots // parts), length, block_size, num_blocks)
    except UserError as error:
        raise UserError(f"--{error}") from error


def load_engine(folder: str | os.PathLike[str], *, slots: int, max_length: int, max_new_tokens: int,
                mesh: MeshConfig | None = None, snapshots: int = 0, max_num_seqs: int | None = None,
                block_size: int | None = None, num_blocks: int | None = None) -> Loaded:
    """Reads weights and tokenizer from a Hugging Face folder.

    A turn ends with the ids that config.json or generation_config.json name as eos_token_id, or with the chat
    template's; ids without a token are never generated.

    Args:
      folder: holds config.json, *.safetensors and a tokenizer.
      slots: sequences side by side.
      max_length: tokens of a sequence, cut to what the model was made for.
      max_new_tokens: the most that one call of the engine generates.
      mesh: of all devices, to act on; None is one device.
      snapshots: states that are saved, for prompts that begin alike.
      max_num_seqs, block_size, num_blocks: see Engine.

    Raises:
      UserError: something is missing, or tokenizer and model do not belong together.
    """
    check_budget(folder, mesh, slots=slots, max_length=max_length, block_size=block_size, num_blocks=num_blocks)
    config, params, parallel = load_to_act(folder, mesh)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}"
        )
    added = tokenizer.added_tokens
    ends = {added[name] for name in (TURN_END, END_OF_TEXT) if name in added}
    stop_ids = sorted(ends | description.eos_ids(folder, config.vocab_size))
    engine = Engine(
        config, params, slots=slots, max_length=min(max_length, config.max_position_embeddings),
        max_new_tokens=max_new_tokens, stop_ids=stop_ids, drawable=tokenizer.known_ids(config.vocab_size),
        parallel=parallel, snapshots=snapshots, several_shapes=True, max_num_seqs=max_num_seqs, block_size=block_size,
        num_blocks=num_blocks,
    )  # fmt: skip
    return Loaded(engine, tokenizer, frozenset(stop_ids), pathlib.Path(folder).absolute().name)
