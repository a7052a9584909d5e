"""What a folder of weights holds beside them, in either form."""

import pathlib
from typing import Any

from qcn_jax import files
from qcn_jax.chat.jinja_template import CHAT_TEMPLATE_FILE, chat_template
from qcn_jax.chat.tokenizer import END_OF_TEXT, TURN_END, Tokenizer
from qcn_jax.config import ModelConfig
from qcn_jax.hub.configuration import CONFIG_FILE, config_to_hf

GENERATION_FILE = "generation_config.json"


def write_description(folder: pathlib.Path, config: ModelConfig, dtype: str, tokenizer: Tokenizer | None) -> None:
    """Writes all but the weights: config.json and, where there is a tokenizer, what engines need to talk.

    That is tokenizer.json, the chat template, generation_config.json with the ids that end a turn, and the little that
    transformers' AutoTokenizer wants beside them.
    """
    known = tokenizer.added_tokens if tokenizer is not None else {}
    pairs = {"eos_token_id": TURN_END, "pad_token_id": END_OF_TEXT, "bos_token_id": END_OF_TEXT}
    ids = {name: known[token] for name, token in pairs.items() if token in known}
    files.write_json(folder / CONFIG_FILE, config_to_hf(config) | {"dtype": dtype} | ids)
    if tokenizer is None:
        return
    tokenizer.save(folder)
    files.write_text(folder / CHAT_TEMPLATE_FILE, chat_template())
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    values |= {name: token for name, token in (("eos_token", TURN_END), ("pad_token", END_OF_TEXT)) if token in known}
    files.write_json(folder / "tokenizer_config.json", values)
    ends = [known[token] for token in (TURN_END, END_OF_TEXT) if token in known]
    if ends:
        files.write_json(folder / GENERATION_FILE, ids | {"eos_token_id": ends})
