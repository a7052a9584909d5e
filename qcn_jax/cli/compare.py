"""Compares evaluations of the same tasks, paired: won, lost, exact p, intervals.

  qcn compare evaluated/one evaluated/other
  qcn compare before after third --common --out=compared.json

Each folder is one that `qcn evaluate --out=DIR` wrote. A task is won by the first of a pair where a larger share of its
attempts resolves it. With single attempts p is McNemar's exact one, else a sign-flip test's over tasks; the interval of
a difference is a bootstrap's over tasks. Of several pairs p is also given as Holm adjusts it. Folders with different
tasks are refused, unless --common asks for the tasks that all have.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from qcn_jax import files
from qcn_jax.agents import comparing
from qcn_jax.cli import parsing
from qcn_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Parses flags, compares, prints a table."""
    values = flags.FlagValues()
    flags.DEFINE_bool("common", False, "Compare on the tasks that all folders have.", flag_values=values)
    flags.DEFINE_string("out", None, "JSON file for all numbers, ids of won and lost tasks among them.",
                        flag_values=values)
    folders = parsing.parse(values, "compare", __doc__, argv, words="DIR DIR [DIR ...]")
    if len(folders) < 2:
        raise UserError("give two or more folders: qcn compare DIR DIR")
    places = [pathlib.Path(folder).resolve() for folder in folders]
    if twice := next((folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1), None):
        raise UserError(f"{twice}: is given twice")
    if values.out:
        files.check_file(values.out, "out")
    found = comparing.compare([comparing.read(folder) for folder in folders], values.common)
    print(comparing.table(found))
    if values.out:
        files.write_json(values.out, found)
    return 0
