"""Makes problems that one answer solves, verified by execution; or keeps tests that independent solutions agree on.

  qcn problems --out=problems.jsonl --count=200 --kinds=stdio,sql --languages=python,javascript
  qcn problems --data=rows.jsonl --share=0.5 --out=problems.jsonl
  qcn run --config=configs/nano.py --config.problems.data=problems.jsonl --workdir=runs/own
  qcn evaluate --tasks=problems.jsonl --scaffold=answer --endpoint=URL --model=NAME --out=DIR

Kinds: stdio (programs), library (functions by a named part of the standard library), sql, secure (with exploits as
tests), instructions (texts and functions under constraints). Without --data they are made of seeds; each is kept if its
reference solution passes. With --data, rows that have `inputs` and three or more `solutions` get those tests on which
more than --share of the solutions agree, and other rows are verified where they have a solution. Tests are hidden:
prompts show an example at most. A bad row is named; exit status 0 means that at least one problem was written.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tqdm
from absl import flags

from qcn_jax import files
from qcn_jax.cli import parsing
from qcn_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Parses flags, makes or reads rows, writes those that execution verifies."""
    from qcn_jax.envs.problems import schema

    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "JSONL of problems.", flag_values=values, required=True)
    flags.DEFINE_string("data", None, "JSONL of rows of your own.", flag_values=values)
    flags.DEFINE_integer("count", 100, "Problems that are made.", flag_values=values, lower_bound=1)
    flags.DEFINE_list("kinds", [], f"Of those, of {', '.join(schema.KINDS)}; all by default.", flag_values=values)
    flags.DEFINE_list("languages", ["python"], f"Of those, of {', '.join(schema.LANGUAGES)}.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of those.", flag_values=values)
    flags.DEFINE_enum("split", "train", ["train", "heldout"], "Of those; the two share no numbers.", flag_values=values)
    flags.DEFINE_float("share", 0.5, "Of the solutions that must agree on a test, exclusive.", flag_values=values,
                       lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_enum("sandbox", "auto", ["auto", "docker", "local"], "Where code runs.", flag_values=values)
    flags.DEFINE_multi_string("setup", [], "Shell command that installs languages in the sandbox's image; docker.",
                              flag_values=values)
    parsing.parse(values, "problems", __doc__, argv)
    for flag, allowed in (("kinds", schema.KINDS), ("languages", schema.LANGUAGES)):
        for name in values[flag].value:
            if name not in allowed:
                raise UserError(f"--{flag}: unknown {name!r}; allowed: {', '.join(allowed)}")
    if values.data:
        parsing.refuse_given(values, ["count", "kinds", "languages", "seed", "split"], "of problems that are made, and "
                             "with --data none are")
    else:
        parsing.refuse_given(values, ["share"], "only rows of --data have several solutions")
    files.check_file(values.out, "out")
    rows = list(_rows(values))
    kept, counts = [], {"rows": len(rows), "failed": 0, "tests_dropped": 0}
    with _provider(values) as provider:
        for where, row in tqdm.tqdm(rows, desc="verifying", unit="problem", file=sys.stderr):
            made, dropped, fault = _verified(provider, row, values.share, where)
            counts["tests_dropped"] += dropped
            counts["failed"] += bool(fault)
            print(f"{where}: {fault}", file=sys.stderr) if fault else kept.append(made)
    if not kept:
        raise UserError(f"--out={values.out}: no problem was verified")
    files.write_jsonl(values.out, kept)
    print(json.dumps(counts | {"problems": len(kept)}))
    return 0


def _rows(values: flags.FlagValues) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, row) of --data, or rows that are made."""
    from qcn_jax.envs.problems import make, schema, vote

    if not values.data:
        made = make.problems(values.count, values.seed, values.kinds or schema.KINDS, values.languages, values.split)
        yield from ((row["id"], row) for row in made)
        return
    for number, row in files.read_numbered(values.data):
        where = f"{values.data}:{number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
        if "inputs" in row or "solutions" in row:
            if fault := vote.fault(row):
                raise UserError(f"{where}: {fault}")
            tests = [{**one, "output" if "input" in one else "returns": ""} for one in row["inputs"]]
            schema.to_task({key: value for key, value in row.items() if key not in ("inputs", "solutions")}
                           | {"tests": tests}, where)
        else:
            schema.to_task(row, where)
        yield where, row


@contextlib.contextmanager
def _provider(values: flags.FlagValues) -> Iterator[Any]:
    from qcn_jax.envs.problems import schema
    from qcn_jax.envs.sandbox import make_provider

    with make_provider(values.sandbox, state_dir=str(files.cache_folder("sandbox"))) as provider:
        provider.prepare(schema.spec(values.setup))
        yield provider


def _verified(provider: Any, row: dict[str, Any], share: float, where: str) -> tuple[dict[str, Any], int, str]:
    """A row with its tests, how many of them were dropped, and why it is not kept ("" where it is)."""
    from qcn_jax.envs.problems import check, schema, vote

    made, dropped = vote.voted(provider, row, share) if "solutions" in row else (row, 0)
    if not made.get("tests") and not made.get("rules"):
        return made, dropped, "the solutions agree on no test"
    task = schema.to_task(made, where)
    if not task.patch:
        return made, dropped, ""
    verdict = check.grade(provider, task, task.patch)
    message = next(iter(verdict.messages.values()), verdict.outcome)
    return made, dropped, "" if verdict.resolved else f"its solution does not solve it: {message}"
