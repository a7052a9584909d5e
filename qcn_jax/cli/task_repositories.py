"""Flags that say where the repositories of given tasks are, and what finds them; for verbs that execute tasks."""

import dataclasses
import pathlib
from collections.abc import Iterable

from absl import flags

from qcn_jax import files
from qcn_jax.envs import names as names_of_rows
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
    names = sorted({task.repo for task in tasks})
    described = pathlib.Path(values.tasks).with_name("repositories.json")  # where qcn run leaves them
    hashes = {row["name"]: row["sha256"] for row in files.read_json(described)} if described.exists() else {}
    beside = pathlib.Path(f"{values.tasks}.work", "archives")  # where qcn synthesize leaves those of mined tasks
    mined = [str(path) for name in names if (path := beside / f"{name}.tar.gz").exists()]
    found = {spec.name: spec for spec in (sources.locate(source) for source in [*values.repo, *mined])}
    for name in names:
        if name in found:
            continue
        try:
            if not sources.is_requirement(name):  # names of rows never become paths
                raise UserError(f"field repo: {names_of_rows.shown(name)} is not name==version and not given by --repo")
            found[name] = sources.locate(f"{name}#sha256={hashes[name]}" if hashes.get(name) else name, as_path=False)
        except UserError as error:
            if faults is None:
                raise
            faults.append(f"{values.tasks}: {error}")
    return [dataclasses.replace(spec, setup=tuple(values.setup)) for spec in found.values()]
