"""Command lines of the verbs: absl flags in a FlagValues of their own, errors as one line, and --help.

A verb's module looks like this:

  def main(argv):
      values = flags.FlagValues()
      flags.DEFINE_string("out", None, "Where to write.", flag_values=values, required=True)
      config = define_config(values, argv)          # only verbs that read a config file
      parse(values, "verify", __doc__, argv)
"""

import pathlib
import re
import sys
import textwrap
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from qcn_jax.config import RunConfig, from_config_dict
from qcn_jax.errors import UserError


class HelpShown(Exception):
    """--help was given and printed; the verb ends with status 0."""


def parse(values: flags.FlagValues, verb: str, explanation: str, argv: Sequence[str]) -> None:
    """Parses `argv` (without program and verb) into `values`.

    Raises:
      HelpShown: --help or -h was among the arguments; the help text is on stdout.
      UserError: an unknown flag, a bad value, a missing flag or a stray argument; the line names it.
    """
    if any(argument in ("--help", "-help", "-h") for argument in argv):
        print(_help(values, verb, explanation))
        raise HelpShown
    try:
        rest = values([f"qcn {verb}", *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(_unknown_flag(values, verb, error.flagname)) from error
    except (flags.Error, ValueError, TypeError) as error:
        missing = re.search(r"Flag (--\w+) must have a value other than None", str(error))
        line = f"{missing.group(1)} is required, see qcn {verb} --help" if missing else one_line(error)
        raise UserError(line) from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; every option is a flag, see qcn {verb} --help")


def define_config(values: flags.FlagValues, argv: Sequence[str],
                  default: str | None = None) -> Callable[[], RunConfig]:
    """Defines --config with `--config.key=value` overrides; call the result after `parse` for the RunConfig.

    The config file is read while flags are parsed, so its errors are raised by whichever comes first:
    this function (the file is missing or broken) or `parse` (an override that does not fit).
    """
    _check_config_file(argv, default)
    config_flags.DEFINE_config_file(
        "config", default, "Python config file with get_config(); override values with --config.key=value.",
        flag_values=values, sys_argv=list(argv))
    _check_overrides(argv, default)

    def config() -> RunConfig:
        if values.config is None:
            raise UserError("--config is required, e.g. --config=configs/nano.py")
        return from_config_dict(RunConfig, values.config)

    return config


def one_line(error: BaseException) -> str:
    """The message of `error` on a single line."""
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__


def _config_argument(argv: Sequence[str], default: str | None) -> str | None:
    """The value of --config in `argv` (the last one wins, as absl has it)."""
    found = default
    for index, argument in enumerate(argv):
        if argument in ("--config", "-config") and index + 1 < len(argv):
            found = argv[index + 1]
        elif match := re.match(r"--?config=(.*)", argument, re.DOTALL):
            found = match.group(1)
    return found


def _load(argument: str) -> object:
    """What get_config() of the file named by --config returns; every failure names the file."""
    path = argument.split(":", 1)[0]
    if not pathlib.Path(path).is_file():
        raise UserError(f"--config={argument}: there is no file {path}")
    sys.modules.pop("config_config", None)  # ml_collections loads into this module, on top of an earlier file's names
    try:
        return config_flags.config_flags.ConfigFileFlagParser("config").parse(argument)
    except UserError:
        raise
    except AttributeError as error:
        raise UserError(f"--config={argument}: {one_line(error)}") from error
    except Exception as error:  # the file is the user's own Python: whatever it raises is reported by name
        detail = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise UserError(f"--config={argument}: cannot be loaded: {detail[0]}") from error


def _check_config_file(argv: Sequence[str], default: str | None) -> None:
    argument = _config_argument(argv, default)
    if argument is not None and "--help" not in argv:
        _load(argument)


def _check_overrides(argv: Sequence[str], default: str | None) -> None:
    """Refuses overrides of keys that the config does not have, naming the nearest group that it has."""
    argument = _config_argument(argv, default)
    overrides = [m.group(1) for a in argv if (m := re.match(r"--?(?:no)?config\.([^=]+)", a))]
    if overrides and argument is None:
        raise UserError(f"--config.{overrides[0]} was given without --config=FILE")
    if not overrides:
        return
    config = _load(argument)
    for override in overrides:
        group, prefix = config, "config"
        for key in override.split("."):
            allowed = list(group.keys()) if hasattr(group, "keys") else []
            if key not in allowed:
                choice = f"allowed: {', '.join(sorted(allowed))}" if allowed else f"{prefix} is a single value"
                raise UserError(f"--config.{override}: unknown key {key!r} in {prefix}; {choice}")
            group, prefix = group[key], f"{prefix}.{key}"


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
    return "\n".join(lines)
