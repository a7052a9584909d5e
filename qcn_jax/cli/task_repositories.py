"""Flags that say where the repositories of given tasks are, and what finds them; for verbs that execute tasks."""

import dataclasses
import pathlib
from collections.abc import Iterable

from absl import flags

from qcn_jax.envs.sandbox import RepositorySpec
from qcn_jax.envs.synthesis import sources
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.errors import UserError


def define(values: flags.FlagValues) -> None:
    """Defines --repo and --setup."""
    flags.DEFINE_list("repo", [], "Archives or folders of the tasks' repositories; those not given are downloaded.",
                      flag_values=values)
    define_setup(values)


def define_setup(values: flags.FlagValues) -> None:
    """Defines --setup."""
    flags.DEFINE_multi_string(
        "setup", [], "Shell command that installs what the repositories' tests need; run in their image as root with "
        "network. May be given several times; needs Docker.", flag_values=values)


def find(values: flags.FlagValues, tasks: Iterable[Task], faults: list[str] | None = None) -> list[RepositorySpec]:
    """Specs of the tasks' repositories: of --repo, of starting states that stand beside --tasks, or downloaded.

    Raises:
      UserError: a given one is no repository; or a task's, which may only be a requirement, cannot be downloaded. Where
        `faults` is given the latter becomes a line of it instead.
    """
    found, missing = sources.of_tasks({task.repo for task in tasks}, [pathlib.Path(values.tasks)], values.repo)
    for reason in missing.values():
        if faults is None:
            raise UserError(reason)
        faults.append(f"{values.tasks}: {reason}")
    return [dataclasses.replace(spec, setup=tuple(values.setup)) for spec in found.values()]
