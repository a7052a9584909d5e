"""Flags that say where the repositories of given tasks are, and what finds them; for verbs that execute tasks."""

import dataclasses
import pathlib
from collections.abc import Iterable

from absl import flags

from qcn_jax.envs import names
from qcn_jax.envs.sandbox import RepositorySpec
from qcn_jax.envs.synthesis import sources
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.envs.web import vendored
from qcn_jax.errors import UserError


def define(values: flags.FlagValues) -> None:
    """Defines --repo, --setup, --python_path and --modules."""
    flags.DEFINE_list("repo", [], "Archives or folders of the tasks' repositories; those not given are downloaded.",
                      flag_values=values)
    define_needs(values)


def define_needs(values: flags.FlagValues) -> None:
    """Defines --setup, --python_path and --modules."""
    flags.DEFINE_multi_string(
        "setup", [], "Shell command that installs what the repositories' tests need; run in their image as root with "
        "network. May be given several times; needs Docker.", flag_values=values)
    flags.DEFINE_list("python_path", [], "Folders of the repositories, relative to their roots, from which Python "
                      "imports; by default the root, and src, lib and python where they are.", flag_values=values)
    flags.DEFINE_string("modules", "", "Folder whose node_modules hold vite, react, react-dom and what else pages "
                        "are built from; by default npm installs those three once.", flag_values=values)


def python_path(values: flags.FlagValues) -> tuple[str, ...] | None:
    """The folders of --python_path; None where it is not given.

    Raises:
      UserError: one that is not inside the repository.
    """
    for folder in values.python_path:
        if folder != "." and (fault := names.path_fault(folder)):
            raise UserError(f"--python_path: {names.shown(folder)} {fault}")
    return tuple(values.python_path) or None


def modules(values: flags.FlagValues) -> str:
    """The folder of --modules; raises UserError where nothing can be built from it."""
    if values.modules:
        vendored.check(values.modules, "--modules")
    return values.modules


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
    needs = {"setup": tuple(values.setup), "python_path": python_path(values), "modules": modules(values)}
    return [dataclasses.replace(spec, **needs) for spec in found.values()]
