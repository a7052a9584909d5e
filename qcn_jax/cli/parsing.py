"""Command lines of the verbs: absl flags in a FlagValues of their own, errors as one line, and --help.

A verb's module looks like this:

  def main(argv):
      values = flags.FlagValues()
      flags.DEFINE_string("out", None, "Where to write.", flag_values=values, required=True)
      config = define_config(values, argv)          # only verbs that read a config file
      parse(values, "verify", __doc__, argv)
"""

import math
import os
import pathlib
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

import qcn_jax
from qcn_jax import files
from qcn_jax.config import MeshConfig, RunConfig, from_config_dict, new_name, to_config_dict
from qcn_jax.config_values import described, refusals
from qcn_jax.errors import UserError

_HERE = pathlib.Path(qcn_jax.__file__).parent
# What --config=NAME reaches, as nano does: a part of the installed package, a folder beside it in a clone.
_PACKAGED = next(folder for folder in (_HERE / "configs", _HERE.parent / "configs") if folder.is_dir())


class HelpShown(Exception):
    """--help was given and printed; the verb ends with status 0."""


def parse(values: flags.FlagValues, verb: str, explanation: str, argv: Sequence[str], words: str = "") -> list[str]:
    """Parses `argv` (without program and verb) into `values`; returns what is no flag.

    Args:
      words: what may stand beside flags, for messages; empty where nothing may.

    Raises:
      HelpShown: --help or -h was among the arguments; the help text is on stdout.
      UserError: an unknown flag, a bad value, a missing flag or a stray argument; the line names it.
    """
    if _asks_for_help(argv):
        print(_help(values, verb, explanation))
        raise HelpShown
    values.set_gnu_getopt(True)  # flags may stand behind words, and a stray word is named as what it is
    try:
        rest = values([f"qcn {verb}", *_arranged(values, argv)])[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown_flag(values, verb, error.flagname)) from error
    except (flags.Error, ValueError, TypeError) as error:
        missing = re.search(r"Flag (--\w+) must have a value other than None", str(error))
        line = f"{missing.group(1)} is required, see qcn {verb} --help" if missing else one_line(error)
        raise UserError(line) from error
    for name, flag in ((name, values[name]) for name in values if "." not in name):
        # Where nothing is the default, an empty value is a shell variable that was not set.
        empty = flag.value in ("", []) or isinstance(flag.value, list) and "" in flag.value
        if flag.present and flag.default is None and empty:
            raise UserError(f"--{name}: is empty; leave it out or give a value")
        if isinstance(flag.value, float) and not math.isfinite(flag.value):  # which no bound refuses
            raise UserError(f"--{name}={flag.value}: must be finite")
    if rest and not words:
        raise UserError(f"unexpected argument {rest[0]!r}; every option is a flag, see qcn {verb} --help")
    return rest


def refuse_given(values: flags.FlagValues, names: Iterable[str], why: str) -> None:
    """Raises UserError where one of the flags `names` was given: it would say something, and nothing would follow."""
    for name in sorted(names):
        if values[name].present:
            raise UserError(f"--{name}: {why}; leave it out")


def define_config(values: flags.FlagValues, argv: Sequence[str]) -> Callable[[], RunConfig]:
    """Defines --config with `--config.key=value` overrides; call the result after `parse` for the RunConfig.

    The config file is read while flags are parsed, so its errors are raised by whichever comes first:
    this function (the file is missing or broken, an override names no key) or `parse` (a value that does not fit).
    """
    arguments = [] if _asks_for_help(argv) else _arranged(values, argv)
    _check_overrides(arguments)
    config_flags.DEFINE_config_file(
        "config", None, "Python config file with get_config(), or the name of a packaged one, e.g. nano; override "
        "values with --config.key=value.",
        flag_values=values, sys_argv=arguments)
    values["config"].parser = _ConfigFile()

    def config() -> RunConfig:
        if values.config is None:
            raise UserError("--config is required, e.g. --config=nano")
        return from_config_dict(RunConfig, values.config)

    return config


class _ConfigFile(flags.ArgumentParser):
    """FILE or FILE:ARGUMENT as a ConfigDict in which every value has its field's declared type.

    config_flags takes the type of an override from the value that it replaces: a rate that the file writes as 1 could
    not be set to 0.2 otherwise.
    """

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        """Raises UserError, which names the file or the key."""
        return to_config_dict(_load(argument))


class _List(tuple_parser.TupleParser):
    """A Python tuple or list, or its items with commas between: swe,tool_format."""

    def parse(self, argument: Any) -> tuple[Any, ...]:
        """Raises ValueError where a bracket or quote is not closed."""
        if not isinstance(argument, str) or argument.lstrip()[:1] in tuple("([{'\""):
            return super().parse(argument)
        pieces = (piece.strip() for piece in argument.split(","))
        return tuple(item for piece in pieces if piece for item in super(_List, self).parse(piece))


config_flags.register_flag_parser_for_type(tuple, _List())


def define_mesh(values: flags.FlagValues) -> Callable[[], MeshConfig | None]:
    """Adds --mesh; returns what gives the mesh that it asks for after parsing, None for one device.

    Raises:
      UserError: the returned function, of what is no key=value, no key of MeshConfig, or a value that its key does not
        allow.
    """
    flags.DEFINE_list("mesh", None, "Act on all devices, e.g. --mesh=expert=4,tensor=2; keys are those of config.mesh, "
                      "and fsdp takes what the others leave. Default: one device.", flag_values=values)

    def mesh() -> MeshConfig | None:
        if not values.mesh:
            return None
        given = {}
        for pair in values.mesh:
            key, equals, value = pair.partition("=")
            if not equals:
                raise UserError(f"--mesh={','.join(values.mesh)}: {pair!r} is not KEY=VALUE")
            given[key] = int(value) if value.lstrip("-").isdigit() else value
        found = from_config_dict(MeshConfig, given, "mesh")
        for line in refusals(found, "--mesh"):
            raise UserError(line)
        return found

    return mesh


def define_hosts(values: flags.FlagValues) -> Callable[[], None]:
    """Adds --coordinator, --processes and --process_id; returns what joins the processes that they speak of.

    Raises:
      UserError: the returned function, see sharding.distributed.start.
    """
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of a run on several hosts, or auto to ask the "
                        "environment; default: join where a TPU environment names several hosts.", flag_values=values)
    flags.DEFINE_integer("processes", None, "With --coordinator=HOST:PORT: how many.", flag_values=values,
                         lower_bound=1)
    flags.DEFINE_integer("process_id", None, "With --coordinator=HOST:PORT: which one this is, from 0.",
                         flag_values=values, lower_bound=0)

    def join() -> None:
        from qcn_jax.sharding import distributed  # JAX, after flags are parsed

        distributed.start(values.coordinator, values.processes, values.process_id)

    return join


def one_line(error: BaseException) -> str:
    """The message of `error` on a single line."""
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__


def _asks_for_help(argv: Sequence[str]) -> bool:
    return any(argument in ("--help", "-help", "-h") for argument in argv)


def _arranged(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """`argv` with what --flagfile=FILE hold in their places, and the last --config, which counts, before the rest."""
    try:
        words = iter(values.read_flags_from_files(list(argv), force_gnu=False))
    except flags.Error as error:
        raise UserError(f"--flagfile: {one_line(error).removeprefix('ERROR:: ')}") from error
    config, rest = [], []
    for word in words:
        if word in ("--config", "-config"):
            config = [f"--config={next(words, '')}"]
        elif re.match("--?config=", word):
            config = [word]
        else:
            rest.append(word)
    return [*config, *rest]


def _load(argument: str) -> RunConfig:
    """What get_config() of the file named by --config returns; every failure names the file."""
    path, *phase = argument.split(":", 1)
    if not files.is_file(path):
        packaged = {file.stem: file for file in sorted(_PACKAGED.glob("*.py"))}
        if path not in packaged:
            raise UserError(f"--config={argument}: there is no file {path}; packaged: {', '.join(packaged)}")
        path = packaged[path]
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UserError(f"--config={argument}: cannot be read: no permission to read {path}")
    sys.modules.pop("config_config", None)  # ml_collections loads into this module, on top of an earlier file's names
    try:
        found = config_flags.config_flags.ConfigFileFlagParser("config").parse(":".join([str(path), *phase]))
        if isinstance(found, RunConfig):
            found = to_config_dict(found)  # whose types nobody has checked yet
        if hasattr(found, "items"):
            return from_config_dict(RunConfig, found)
    except UserError:
        raise
    except AttributeError as error:
        raise UserError(f"--config={argument}: {one_line(error)}") from error
    except Exception as error:  # the file is the user's own Python: whatever it raises is reported by name
        detail = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise UserError(f"--config={argument}: cannot be loaded: {detail[0]}") from error
    raise UserError(f"--config={argument}: get_config() returned {found!r:.80}; it must return a RunConfig or "
                    "to_config_dict(RunConfig(...))")


def _check_overrides(argv: Sequence[str]) -> None:
    """Refuses a config file that cannot be read, and overrides of keys that no configuration has.

    Args:
      argv: from `_arranged`.
    """
    first = re.match("--?config=(.*)", argv[0], re.DOTALL) if argv else None
    config = to_config_dict(_load(first.group(1))) if first else None
    for override in (m.group(1) for a in argv if (m := re.match(r"--?(?:no)?config\.([^=]+)", a))):
        if config is None:
            raise UserError(f"--config.{override} was given without --config=FILE")
        if new := new_name(f"config.{override}"):
            raise UserError(f"--config.{override}: is called --{new} now")
        group, prefix = config, "config"
        for key in re.findall(r"\[\d+\]|[^.\[]+|\[", override):  # midtrain.phases[0].steps
            allowed = _members(group)
            if key not in allowed:
                single = "it has none" if hasattr(group, "keys") else f"{prefix} is a single value"
                choice = f"allowed: {', '.join(sorted(allowed))}" if allowed else single
                raise UserError(f"--config.{override}: unknown key {key!r} in {prefix}; {choice}")
            group, prefix = allowed[key], f"{prefix}{key}" if key.startswith("[") else f"{prefix}.{key}"
        if hasattr(group, "keys"):  # the keys that the value leaves out would silently get their defaults
            raise UserError(f"--config.{override} is a group; give its keys: "
                            f"{', '.join(f'--config.{override}.{key}' for key in sorted(group))}")


def _members(group: Any) -> dict[str, Any]:
    """What a group, or a tuple of groups, holds, by the key that an override gives."""
    if isinstance(group, tuple):
        return {f"[{index}]": item for index, item in enumerate(group) if hasattr(item, "keys")}
    return dict(group.items()) if hasattr(group, "keys") else {}


def _unknown_flag(values: flags.FlagValues, verb: str, name: str) -> str:
    names = ", ".join(f"--{known}" for known in values)
    return f"unknown flag --{name}; qcn {verb} knows {names}"


def _help(values: flags.FlagValues, verb: str, explanation: str) -> str:
    lines = [f"qcn {verb}", "", textwrap.dedent(explanation).strip(), "", "Flags:"]
    for name in values:
        flag = values[name]
        note = "" if flag.default in (None, "", [], False) else f" [default: {flag.default_as_str}]"
        choices = getattr(flag.parser, "enum_values", None)
        if choices:
            note = f" ({' | '.join(choices)}){note}"
        text = textwrap.fill(f"{flag.help}{note}", 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines.append(f"  --{name}\n{text}")
    if "config" in values:
        lines += ["", "Keys of the configuration, with their defaults and what is allowed:",
                  *(f"  {line}" for line in described(RunConfig(), "--config"))]
    return "\n".join(lines)
