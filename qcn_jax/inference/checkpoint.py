"""A checkpoint folder as an engine with its tokenizer, for `qcn generate` and `qcn serve`."""

import dataclasses
import os
import pathlib

import jax

from qcn_jax import hub
from qcn_jax.chat.tokenizer import END_OF_TEXT, TURN_END, Tokenizer
from qcn_jax.errors import UserError
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
    stop_ids = sorted({added[name] for name in (TURN_END, END_OF_TEXT) if name in added})
    engine = Engine(
        config, jax.device_put(params), slots=slots, max_length=min(max_length, config.max_position_embeddings),
        max_new_tokens=max_new_tokens, stop_ids=stop_ids,
    )  # fmt: skip
    return Loaded(engine, tokenizer, frozenset(stop_ids), pathlib.Path(folder).absolute().name)
