"""Second opinions on states that are right: how often does one attempt by itself call them wrong?

    python benchmarks/second_opinions.py --out=DIR [--repos=pluggy==1.6.0,...] [--attempts=40]

Each repository's pristine state is taught and then asked, with all its passing tests (at most --tests of them, drawn with a
seed) where a verdict draws some, and every attempt by itself where a verdict asks twice: what is rare in verdicts shows
here. The exit status is 0 if no attempt finds anything. Repositories that were asked are not asked again.
"""

import collections
import dataclasses
import random
import sys
import time

import tqdm
from absl import app, flags

from qcn_jax.envs.sandbox import make_provider
from qcn_jax.envs.sandbox.base import sandbox
from qcn_jax.envs.synthesis import sources
from qcn_jax.envs.tasks import opinion
from qcn_jax.envs.tasks.grading import Layered
from qcn_jax.errors import UserError
from qcn_jax.journal import Rows

REPOS = ("parse==1.22.4", "simpleeval==1.0.8", "h11==0.16.0", "isodate==0.7.2", "schema==0.7.8", "voluptuous==0.16.0",
         "xmltodict==1.0.4", "pluggy==1.6.0", "packaging==24.2", "tabulate==0.10.0", "boltons==26.2.0", "inflection==0.5.1",
         "webob==1.8.11", "bottle==0.13.4", "PyJWT==2.15.1", "configobj==5.0.9", "marko==2.2.4", "toolz==1.2.0",
         "sqlparse==0.6.1", "tinydb==4.9.0", "webcolors==25.10.0", "mistune==3.4.0", "tomlkit==0.15.2",
         "geographiclib==2.1", "itsdangerous==2.2.0", "humanize==4.9.0", "mistletoe==1.6.0", "tenacity==9.2.1",
         "num2words==0.5.14")
LIMIT = 120.0  # seconds of a run
_OUT = flags.DEFINE_string("out", "bench/opinions", "Folder of rows and prepared repositories.")
_REPOS = flags.DEFINE_list("repos", list(REPOS), "Requirements.")
_ATTEMPTS = flags.DEFINE_integer("attempts", 40, "Of each repository.", lower_bound=1)
_TESTS = flags.DEFINE_integer("tests", 400, "At most so many of each.", lower_bound=1)
_SANDBOX = flags.DEFINE_enum("sandbox", "local", ["auto", "docker", "local"], "Where code runs.")


def asked(provider, name):
    """What came of a repository's attempts, as a row."""
    spec, started = sources.locate(name), time.monotonic()
    base = provider.prepare(spec).baseline
    tests = [one for one, outcome in base.outcomes.items() if outcome == "passed" and "::" in one]
    if len(tests) > _TESTS.value:
        tests = random.Random(0).sample(tests, _TESTS.value)

    def run_tests(changes, names, blind):
        with sandbox(provider, spec.name, changes, role="grading") as place:
            run = place.run_tests(names, LIMIT, False, "blind" if blind else True)
        return dataclasses.replace(run, tampered=tuple(one for one in run.tampered if one not in base.tampered))

    state, secret = Layered(provider.files(spec.name), {}), random.SystemRandom()
    reference = opinion.learn(tests, state, {}, (), run_tests, secret)
    found, words = collections.Counter(), []
    for _ in tqdm.trange(_ATTEMPTS.value, desc=name, file=sys.stderr, leave=False):
        said = opinion.ask(reference, state, {}, run_tests, secret, attempts=1)
        found["forged" if said.forged else "failed" if said.failed else said.status] += 1
        words += [*said.forged, *said.failed][:3]
    return {"tests": len(tests), "asked": len(reference.tests), "as they are": len(reference.plain),
            "inside": len(reference.inside), "found": dict(found), "words": words[:10],
            "seconds": round(time.monotonic() - started)}


def main(argv):
    """Asks, and prints a table."""
    del argv
    with Rows(f"{_OUT.value}/rows.jsonl") as rows, make_provider(_SANDBOX.value, f"{_OUT.value}/state") as provider:
        for name in _REPOS.value:
            if name not in rows.known:
                try:
                    rows.add(name, asked(provider, name))
                except UserError as error:
                    print(error, file=sys.stderr)
        known = {name: rows.known[name] for name in _REPOS.value if name in rows.known}
    print("| repository | tests | with a second opinion | functions as they are | compared inside | attempts | forged | failed "
          "| timeout or killed | seconds |\n" + "|---" * 10 + "|")
    bad = 0
    for name, row in known.items():
        found = collections.Counter(row["found"])
        rest = found.total() - found["ok"] - found["forged"] - found["failed"]
        bad += found.total() - found["ok"]
        print(f"| {name} | {row['tests']} | {row['asked']} | {row['as they are']} | {row['inside']} | {found.total()} | "
              f"{found['forged']} | {found['failed']} | {rest} | {row['seconds']} |")
    print("\n".join(f"{name}: {words}" for name, row in known.items() for words in row["words"]))
    return 1 if bad else 0


if __name__ == "__main__":
    app.run(main)
