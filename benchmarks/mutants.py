"""Plants fifty faults, one at a time, and counts those that the conformance kit finds.

  python benchmarks/mutants.py --out=mutants.jsonl

Each fault of _mutants.py is one change of text in a copy of the package, never in the package itself. A process of its
own runs `qcn_jax.inference.conformance` on a tiny model with that copy: first the form that is most likely to find it,
then all others, until one does. Killed: a form differed from the reference by more than rounding, or the engine refused
its own logits. Survived: every form held. Broken: the copy did not run, which says nothing. Takes up again where --out
ends; delete that file after changes to the package. Prints a table in Markdown, and exits with 1 where more than two
survive or any is broken. About ten minutes on one free core; compiled programs are kept beside --out.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from _mutants import MUTANTS, Mutant
from absl import app, flags

from qcn_jax.errors import UserError
from qcn_jax.testing.processes import QUICK_FLAGS

OUT = flags.DEFINE_string("out", None, "JSONL, a line for every mutant that ran.", required=True)
LIMIT = flags.DEFINE_float("limit", 1800.0, "Seconds that one may take.", lower_bound=1.0)
PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "qcn_jax"
NOTHING = "(nothing changed)"
MOST = 2  # survivors

CHILD = """
import json, sys
import jax
from qcn_jax import testing
from qcn_jax.errors import UserError
from qcn_jax.inference import conformance

params = jax.tree.map(lambda leaf: leaf * leaf.dtype.type(0.2), testing.random_params(testing.TINY))
forms = sys.argv[1].split(",")
found = conformance.check(testing.TINY, params, count=4, length=64, forms=forms)
for form in forms:
    try:
        one = next(found)
        measured = {"refused": one.refused} if one.refused else {"apart": one.worst / one.bound}
        result = {"form": form, "holds": one.holds, **measured}
    except UserError as error:
        result = {"form": form, "holds": False, "refused": str(error)}
    print(json.dumps(result), flush=True)
    if not result["holds"]:
        break
"""


def source(mutant: Mutant, package: pathlib.Path = PACKAGE) -> str:
    """The file of `mutant` with its fault.

    Raises:
      UserError: the text that it changes is not there exactly once, or it changes nothing.
    """
    text = (package / mutant.file).read_text()
    if (count := text.count(mutant.old)) != 1 or mutant.old == mutant.new:
        raise UserError(f"{mutant.name}: its old text occurs {count} times in {mutant.file}, must be once, and differ "
                        f"from the new: {mutant.old!r}")
    return text.replace(mutant.old, mutant.new)


def run(copy: pathlib.Path, forms: list[str]) -> dict[str, Any]:
    """What a process that imports the package from `copy` finds: outcome, form, seconds and what else there is to say."""
    cache = pathlib.Path(OUT.value).resolve().with_suffix(".xla")
    environment = os.environ | {
        "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_FLAGS,
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "2"}
    began, error = time.monotonic(), ""
    try:
        done = subprocess.run([sys.executable, "-c", CHILD, ",".join(forms)], cwd=copy, env=environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=LIMIT.value, check=False)
        output, error = done.stdout, done.stderr.strip().splitlines()[-1] if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        output, error = (late.stdout or b"").decode(), f"took more than {LIMIT.value:g} s"
    found = [json.loads(line) for line in output.splitlines()]
    result: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
    if found and not found[-1]["holds"]:
        return result | {"outcome": "killed"} | found[-1]
    return result | ({"outcome": "broken", "error": error} if error else {"outcome": "survived"})


def main(argv: list[str]) -> int:
    """Runs what --out lacks, and prints all."""
    del argv
    from qcn_jax.inference.conformance import FORMS, KERNELS

    every = [*FORMS, KERNELS]
    changed = {mutant.name: source(mutant) for mutant in MUTANTS}
    out = pathlib.Path(OUT.value)
    results = {line["name"]: line for line in map(json.loads, out.read_text().splitlines())} if out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        shutil.copytree(PACKAGE, copy / PACKAGE.name)
        for mutant in (None, *MUTANTS):
            name = NOTHING if mutant is None else mutant.name
            if name in results:
                continue
            forms = every
            if mutant is not None:
                forms = [mutant.form, *(form for form in every if form != mutant.form)]
                (copy / PACKAGE.name / mutant.file).write_text(changed[name])
            results[name] = {"name": name} | run(copy, forms)
            if mutant is not None:
                shutil.copy2(PACKAGE / mutant.file, copy / PACKAGE.name / mutant.file)
            elif results[name]["outcome"] != "survived":
                raise UserError(f"the package itself does not keep the contract: {results[name]}")
            with out.open("a") as file:
                file.write(json.dumps(results[name]) + "\n")
            print(json.dumps(results[name]), file=sys.stderr, flush=True)
    return report(results)


def report(results: dict[str, dict[str, Any]]) -> int:
    """Prints the table; returns the exit status."""
    print("| mutant | file | stands for | outcome | by | times the bound | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for mutant in MUTANTS:
        one = results[mutant.name]
        apart = "refused" if "refused" in one else f"{one['apart']:.3g}" if "apart" in one else ""
        print(f"| {mutant.name} | {mutant.file} | {mutant.kind} | {one['outcome']} | {one.get('form', '')} | {apart} "
              f"| {one['seconds']:.0f} |")
    counts = {outcome: sum(results[mutant.name]["outcome"] == outcome for mutant in MUTANTS)
              for outcome in ("killed", "survived", "broken")}
    seconds = sum(one["seconds"] for one in results.values())
    print(f"\n{len(MUTANTS)} mutants: {counts}; {seconds:.0f} s in all.")
    return int(counts["broken"] > 0 or counts["survived"] > MOST)


def _main(argv: list[str]) -> int:
    try:
        return main(argv)
    except UserError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    app.run(_main)
