"""The chat template that a model's folder holds, rendered as transformers renders it.

A template is Jinja in chat_template.jinja, chat_template.json or tokenizer_config.json; of several with names,
`tool_use` is taken where there are tools. The date is not given to it: what a model sees must not depend on the day.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from qcn_jax import files
from qcn_jax.chat.jinja_template import CHAT_TEMPLATE_FILE, chat_template
from qcn_jax.errors import UserError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_DEFAULT, _TOOL_USE = "default", "tool_use"


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, with which a template marks what an assistant wrote."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """Puts the variables `_opening` and `_closing` around what stands between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [jinja2.nodes.Name(name, "load") for name in ("_opening", "_closing")]
        return jinja2.nodes.CallBlock(self.call_method("_between", marks), [], [], body).set_lineno(line)

    def _between(self, opening: str, closing: str, caller: Any) -> str:
        return f"{opening}{caller()}{closing}"


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


class FolderTemplate:
    """Chat templates by name, `default` among them.

    Attributes:
      where: the folder or file, for messages.
      source: of the one that is used without tools.
      marked: whether {% generation %} marks what assistants wrote.
    """

    def __init__(self, sources: Mapping[str, str], where: str, special: Mapping[str, str] | None = None) -> None:
        """Compiles the templates; raises UserError for one that is no valid Jinja.

        Args:
          special: names such as eos_token and the tokens that templates may write under them.
        """
        self.where, self._special = where, dict(special or {})
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        self.source, self._templates = sources[_DEFAULT], {}
        for name, source in sources.items():
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateError as error:
                raise UserError(f"{where}: its chat template is no valid Jinja: {_line(error)}") from error
        self.marked = all("endgeneration" in source for source in sources.values())

    @classmethod
    def from_folder(cls, path: files.Path) -> "FolderTemplate | None":
        """Reads the template of a Hugging Face folder, None where it has none or has ours, or that of a .jinja file.

        Raises:
          UserError: it is missing, damaged or no valid Jinja.
        """
        path = pathlib.Path(path)
        if path.is_file():
            return cls({_DEFAULT: _text(path)}, str(path))
        config = _object(path / "tokenizer_config.json")
        sources = _named(config.get("chat_template"), path / "tokenizer_config.json")
        sources |= _named(_object(path / "chat_template.json").get("chat_template"), path / "chat_template.json")
        if files.is_file(path / CHAT_TEMPLATE_FILE):
            sources[_DEFAULT] = _text(path / CHAT_TEMPLATE_FILE)
        if _DEFAULT not in sources or sources[_DEFAULT].strip() == chat_template().strip():
            return None
        special = _object(path / "special_tokens_map.json") | config
        found = {name: token.get("content") if isinstance(token, dict) else token
                 for name in _SPECIAL if (token := special.get(name)) is not None}
        return cls(sources, str(path), {name: token for name, token in found.items() if isinstance(token, str)})

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None,
               add_generation_prompt: bool = False, marks: tuple[str, str] = ("", "")) -> str:
        """Renders a conversation.

        Args:
          messages: OpenAI's, a call's arguments taken apart.
          tools: OpenAI's function descriptions.
          add_generation_prompt: end with the opening of an assistant's turn.
          marks: what to put before and behind what {% generation %} marks.

        Raises:
          UserError: the template refuses the conversation, or fails on it.
        """
        template = self._templates.get(_TOOL_USE if tools else _DEFAULT) or self._templates[_DEFAULT]
        try:
            return template.render(
                messages=messages, tools=tools or None, documents=None, add_generation_prompt=add_generation_prompt,
                _opening=marks[0], _closing=marks[1], **self._special)
        except Exception as error:  # templates are programs: whatever they do wrong concerns this conversation alone
            raise UserError(f"the chat template of {self.where} refuses it: {_line(error)}") from error


def _named(value: Any, path: pathlib.Path) -> dict[str, str]:
    """Templates by name of a file's chat_template: one text, or a list of names and texts."""
    rows = [{"name": _DEFAULT, "template": value}] if isinstance(value, str) else value or []
    if not isinstance(rows, list) or not all(
            isinstance(row, dict) and isinstance(row.get("name"), str) and isinstance(row.get("template"), str)
            for row in rows):
        raise UserError(f"{path}: chat_template must be text, or a list of objects with name and template")
    return {row["name"]: row["template"] for row in rows}


def _object(path: pathlib.Path) -> dict[str, Any]:
    return files.read_object(path) if files.is_file(path) else {}


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text") from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
