"""What a folder of weights holds beside them, in either form."""

import pathlib
import re
import shutil
from typing import Any

from qcn_jax import files
from qcn_jax.chat.jinja_template import CHAT_TEMPLATE_FILE, chat_template
from qcn_jax.chat.tokenizer import END_OF_TEXT, TOKENIZER_FILE, TURN_END, Tokenizer
from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.hub import vision
from qcn_jax.hub.configuration import CONFIG_FILE, MODEL_TYPES, config_to_hf, succeeding
from qcn_jax.hub.stored import INDEX_FILE, SINGLE_FILE

GENERATION_FILE = "generation_config.json"
ACTING_FILE = "acting.json"  # how the run that made a model lets it act (pipeline.evaluate.settings)
# What transformers, the engines and `qcn evaluate` read beside config.json and the weights.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "qwen.tiktoken", CHAT_TEMPLATE_FILE, "chat_template.json", GENERATION_FILE,
    ACTING_FILE,
)  # fmt: skip
# What they read to see images.
_OF_VISION = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_OWN_FILES = {CONFIG_FILE, SINGLE_FILE, INDEX_FILE, vision.FILE, *COMPANIONS, *_OF_VISION}
_STORE = "params"  # of Orbax form, and what Orbax names in it
_IN_STORE = re.compile(r"_\w+|d|manifest\.ocdbt|ocdbt\.process_\d+|commit_success\.txt|array_metadatas")


def surplus(folder: pathlib.Path) -> str | None:
    """The first thing in `folder` that is not part of a model as `save` writes it; None for a model and nothing else.

    Raises:
      OSError: it cannot be read.
    """
    for path in sorted(folder.iterdir()):
        if path.name == _STORE and path.is_dir() and not path.is_symlink():
            other = next((part for part in sorted(path.iterdir()) if not _IN_STORE.fullmatch(part.name)), None)
            if other is not None:
                return f"{_STORE}/{other.name}"
        elif not path.is_file() or not (path.name in _OWN_FILES or _SHARD.fullmatch(path.name)):
            return path.name
    try:
        kind = files.read_object(folder / CONFIG_FILE).get("model_type")
    except UserError as error:
        return f"files without a readable {CONFIG_FILE} ({error})"
    return None if kind in MODEL_TYPES else f"a {CONFIG_FILE} of model_type {kind!r}"


def eos_ids(folder: files.Path, vocab_size: int) -> set[int]:
    """Ids that end a text: those of config.json and of generation_config.json, each one id or a list.

    Raises:
      UserError: one of them is no id; the line names the file.
    """
    found = set()
    for path in (pathlib.Path(folder) / CONFIG_FILE, pathlib.Path(folder) / GENERATION_FILE):
        values = files.read_object(path) if files.is_file(path) else {}
        text = values.get("text_config")
        given = values.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if not all(isinstance(id_, int) and not isinstance(id_, bool) for id_ in ids):
            raise UserError(f"{path}: eos_token_id must be an id or a list of ids, got {given!r}")
        found |= {id_ for id_ in ids if 0 <= id_ < vocab_size}  # others cannot be drawn
    return found


def write_description(folder: pathlib.Path, config: ModelConfig, dtype: str, tokenizer: Tokenizer | None,
                      source: files.Path | None = None, within: bool = False,
                      template: str | None = None) -> None:
    """Writes all but the weights: config.json and, where there is a tokenizer, what engines need to talk.

    That is tokenizer.json, the chat template, generation_config.json with the ids that end a turn, and the little that
    transformers' AutoTokenizer wants beside them. With `source`, a folder of the same model, its own files are copied
    instead, byte for byte, and config.json keeps its special ids.

    Args:
      folder: to write into.
      config: of the text model.
      dtype: of the weights.
      tokenizer: makes what `source` lacks; None makes nothing.
      source: see above.
      within: keep also what `source` says of its encoder of images.
      template: the chat template, in place of that of `source` or ours.
    """
    values = config_to_hf(config) | {"dtype": dtype}
    known = tokenizer.added_tokens if tokenizer is not None else {}
    pairs = {"bos_token_id": END_OF_TEXT, "eos_token_id": TURN_END, "pad_token_id": END_OF_TEXT}
    ids = {name: known[token] for name, token in pairs.items() if token in known}
    if source is None:
        files.write_json(folder / CONFIG_FILE, values | ids)
    else:
        earlier = files.read_object(pathlib.Path(source) / CONFIG_FILE)
        files.write_json(folder / CONFIG_FILE, succeeding(values | ids, earlier, within))
        for name in (*COMPANIONS, *(_OF_VISION if within else ())):
            if files.is_file(pathlib.Path(source) / name):
                shutil.copyfile(pathlib.Path(source) / name, folder / name)
    if template is not None:
        files.write_text(folder / CHAT_TEMPLATE_FILE, template)
    if tokenizer is not None:
        _describe_tokenizer(folder, tokenizer, ids)


def _describe_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer, ids: dict[str, int]) -> None:
    """Writes whichever of the tokenizer's files is not there yet."""
    known = tokenizer.added_tokens
    described: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    named = {"eos_token": TURN_END, "pad_token": END_OF_TEXT}
    described |= {name: token for name, token in named.items() if token in known}
    ends = [known[token] for token in (TURN_END, END_OF_TEXT) if token in known]
    if not files.is_file(folder / TOKENIZER_FILE):
        tokenizer.save(folder)
    if not files.is_file(folder / CHAT_TEMPLATE_FILE):
        files.write_text(folder / CHAT_TEMPLATE_FILE, chat_template())
    if not files.is_file(folder / "tokenizer_config.json"):
        files.write_json(folder / "tokenizer_config.json", described)
    if ends and not files.is_file(folder / GENERATION_FILE):
        files.write_json(folder / GENERATION_FILE, ids | {"eos_token_id": ends})
