"""A checkpoint folder as an engine with its tokenizer, for `qcn generate` and `qcn serve`."""

import dataclasses
import os
import pathlib

import jax

from qcn_jax import hub
from qcn_jax.chat.tokenizer import END_OF_TEXT, TURN_END, Tokenizer
from qcn_jax.errors import UserError
from qcn_jax.hub import description
from qcn_jax.inference.engine import Engine


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An engine over a checkpoint's weights; `stop_ids` end a turn."""

    engine: Engine
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    name: str


def load_engine(folder: str | os.PathLike[str], *, slots: int, max_length: int, max_new_tokens: int) -> Loaded:
    """Reads weights and tokenizer from a Hugging Face folder.

    A turn ends with the ids that config.json or generation_config.json name as eos_token_id, or with the chat
    template's; ids without a token are never generated.

    Args:
      folder: holds config.json, *.safetensors and a tokenizer.
      slots: sequences side by side.
      max_length: tokens of a sequence, cut to what the model was made for.
      max_new_tokens: the most that one call of the engine generates.

    Raises:
      UserError: something is missing, or tokenizer and model do not belong together.
    """
    config, params = hub.load(folder)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}"
        )
    added = tokenizer.added_tokens
    ends = {added[name] for name in (TURN_END, END_OF_TEXT) if name in added}
    stop_ids = sorted(ends | description.eos_ids(folder, config.vocab_size))
    engine = Engine(
        config, jax.device_put(params), slots=slots, max_length=min(max_length, config.max_position_embeddings),
        max_new_tokens=max_new_tokens, stop_ids=stop_ids, drawable=tokenizer.known_ids(config.vocab_size),
    )  # fmt: skip
    return Loaded(engine, tokenizer, frozenset(stop_ids), pathlib.Path(folder).absolute().name)
