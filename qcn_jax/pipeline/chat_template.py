"""The chat template under which a run's conversations are written and its agents act, in every stage the same."""

import dataclasses
import pathlib

from qcn_jax import files
from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.chat import jinja_template
from qcn_jax.chat.encoder import ChatEncoder, Encoder
from qcn_jax.chat.folder_template import FolderTemplate
from qcn_jax.chat.template_encoder import TemplateEncoder
from qcn_jax.chat.templates import NATIVE
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import RunConfig
from qcn_jax.errors import UserError
from qcn_jax.hub import description
from qcn_jax.pipeline import models

OURS = "native"  # of config.sft.chat_template
_WAY_OUT = f"--config.sft.chat_template={OURS} is Qwen3-Coder's"


def chat_template(config: RunConfig) -> FolderTemplate | None:
    """The template of other people that a run uses; None for Qwen3-Coder's.

    Raises:
      UserError: `config.sft.chat_template` names none, or one is no valid Jinja.
    """
    name = config.sft.chat_template
    if name == OURS or not name and config.init == "random":
        return None
    template = FolderTemplate.from_folder(name or models.initial_folder(config))
    if name and template is None and not (pathlib.Path(name) / jinja_template.CHAT_TEMPLATE_FILE).exists():
        raise UserError(f"--config.sft.chat_template={name}: holds no chat template; allowed: {OURS}, a folder with "
                        "one, or a .jinja file")
    return template


def written_with(config: RunConfig) -> str | None:
    """The template that a run's models are saved with; None for that of the folder that it begins from."""
    if not config.sft.chat_template:
        return None
    template = chat_template(config)
    return jinja_template.chat_template() if template is None else template.source


def encoder_of(config: RunConfig, tokenizer: Tokenizer) -> Encoder:
    """What writes and reads conversations; all ids that the folder of `config.init` ends with end turns as well."""
    template = chat_template(config)
    encoder = ChatEncoder(tokenizer) if template is None else TemplateEncoder(tokenizer, template)
    return encoder if config.init == "random" else stopping(encoder, models.initial_folder(config))


def stopping(encoder: Encoder, folder: files.Path) -> Encoder:
    """`encoder` with the ids that a model's folder says its texts end with among its `stops`."""
    encoder.stops |= description.eos_ids(pathlib.Path(folder), encoder.tokenizer.vocab_size)
    return encoder


def fitted(scaffold: Scaffold, encoder: Encoder, field: str) -> Scaffold:
    """`scaffold` as its agent acts under an encoder's template: it writes tool calls as that does.

    Args:
      field: that named the scaffold, for messages.

    Raises:
      UserError: nobody can act so under the template: it ends no turn with a token, writes calls in a form that is not
        known, or has no place for what the scaffold says.
    """
    if not encoder.ends:
        raise UserError(f"{field}={scaffold.name}: the chat template ends no turn with a token of its own, so that an "
                        f"agent's turn has no end; {_WAY_OUT}")
    if scaffold.describe_tools and scaffold.template == NATIVE != encoder.calls:
        if encoder.calls is None:
            raise UserError(f"{field}={scaffold.name}: the chat template writes tool calls in a form that is not "
                            f"known, or has no place for them; mini_swe_agent does without, and {_WAY_OUT}")
        scaffold = dataclasses.replace(scaffold, template=encoder.calls)
    said = [{"role": "system", "content": "?"}] if scaffold.system or scaffold.framed else []
    try:
        encoder.encode_prompt([*said, {"role": "user", "content": "?"}], scaffold.schemas())
        encoder.encode_turn([{"role": scaffold.result_role, "content": "?"}])
    except UserError as error:
        raise UserError(f"{field}={scaffold.name}: {error}; {_WAY_OUT}") from error
    return scaffold
