"""What one traced run of a repository's suite shows: which of its functions each test calls."""

import base64
import collections
import dataclasses
import importlib.resources
import json
import shlex
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from qcn_jax.envs.sandbox.base import PASSING, Provider
from qcn_jax.envs.sandbox.repository import RepositorySpec
from qcn_jax.envs.synthesis import causes
from qcn_jax.envs.testpaths import is_doctest, is_test_path
from qcn_jax.errors import UserError

MAX_TEST_SECONDS = 1.0  # slower tests are not used
# Processes that list a repository's tests. A list made from a set of two types, ordered by their addresses, looks
# the same in all of them once in 2 ** (LISTINGS - 1).
LISTINGS = 4
MAX_LISTING = 64 << 20  # bytes of one, unpacked: that of 100,000 tests with long parameters
_INSIDE = importlib.resources.files("qcn_jax.envs.synthesis.inside")
OBSERVE = "\n".join((_INSIDE / name).read_text() for name in ("clocks.py", "observe.py"))
_COLLECT = (_INSIDE / "collect.py").read_text()


@dataclasses.dataclass(frozen=True)
class Survey:
    """What one traced run of a repository's suite showed; JSON-ready through `dataclasses.asdict`.

    `seconds` is processor time. `callers` maps "path::qualname" to indices into `tests` (passing, fast, stable tests
    in suite order).
    """

    repository: str
    tests: tuple[str, ...]
    seconds: tuple[float, ...]
    callers: dict[str, tuple[int, ...]]
    breadth: tuple[int, ...]  # number of repository functions that each test calls
    failing: int  # tests left out because they failed before any defect
    unstable: int  # tests left out because runs disagreed or their ids do not last
    # Further passing tests, too slow to show a defect, or never traced because time was over.
    slow: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()  # of `tests`: they start processes, open sockets or sleep
    suite_seconds: float = 0.0  # of the whole suite, without tracing
    note: str = ""  # what is lacking, or was left out of pytest's options

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Survey":
        """Reads what `dataclasses.asdict` gave."""
        callers = {name: tuple(found) for name, found in row["callers"].items()}
        lists = {name: tuple(row[name]) for name in ("tests", "seconds", "breadth", "slow", "waiting") if name in row}
        return cls(**{**row, **lists, "callers": callers})


def take_survey(provider: Provider, spec: RepositorySpec, seconds: float = 60.0) -> Survey:
    """Prepares a repository and learns which tests call which functions, in at most `seconds` of processor time.

    Left out are tests that fail, that disagree between the preparing and the traced run, or whose ids mean something
    else in another process (parameters taken from a set, say).

    Raises:
      UserError: the repository's tests cannot run at all or none of them passes; names the repository.
    """
    prepared = provider.prepare(spec)
    baseline, files = prepared.baseline, [*prepared.files]
    with provider.create(spec.name) as sandbox:
        run = sandbox.run_python(OBSERVE, {"mode": "calls", "seconds": seconds}, timeout=10 * seconds)
    if run.status != "ok":
        reason = causes.of_no_passing_test(files, baseline, [run.error] if run.error else [])
        raise UserError(f"{spec.name}: its tests cannot be run: {reason}")
    value = run.value
    good = [name for name in value["calls"] if value["outcomes"].get(name) in PASSING]
    passing = [name for name in good if not is_doctest(name)]
    failing = sum(outcome in ("failed", "error") for outcome in value["outcomes"].values())
    if not passing:
        reason = (causes.ONLY_DOCTESTS if good else
                  causes.of_no_passing_test(files, baseline, value["messages"].values()))
        raise UserError(f"{spec.name}: none of its tests passes before any defect ({failing} fail): {reason}")
    wandering = _wandering(_listings(provider, spec, 10 * seconds))
    stable = [name for name in passing
              if baseline.outcomes.get(name) in PASSING and name.split("[")[0] not in wandering]
    kept = [name for name in stable if value["seconds"].get(name, 0.0) <= MAX_TEST_SECONDS]
    usable, traced = set(kept), set(value["outcomes"])
    slow = [name for name in stable if name not in usable] + [
        name for name, outcome in baseline.outcomes.items()
        if outcome in PASSING and name not in traced and name.split("[")[0] not in wandering and not is_doctest(name)]
    calling: dict[str, list[int]] = collections.defaultdict(list)
    for number, name in enumerate(kept):
        for index in value["calls"][name]:
            path, function = value["functions"][index]
            if not is_test_path(path):
                calling[f"{path}::{function}"].append(number)
    return Survey(
        spec.name,
        tuple(kept),
        tuple(value["seconds"].get(name, 0.0) for name in kept),
        {name: tuple(found) for name, found in sorted(calling.items())},
        tuple(len(value["calls"][name]) for name in kept),
        failing,
        len(passing) - len(stable),
        tuple(slow),
        tuple(name for name in kept if name in value["waiting"]),
        baseline.cpu_seconds,
        "; ".join(filter(None, (prepared.settings.get("without", ""),
                                causes.lacking(files, value["messages"].values())))),
    )


def _listings(provider: Provider, spec: RepositorySpec, timeout: float) -> list[dict[str, str | None]]:
    """Parameters by id of all tests (None: see collect.py), from interpreters whose sets have different orders."""
    collected = "qcn_collected.json"  # in this sandbox alone
    options = shlex.join(provider.prepared[spec.name].settings["pytest_args"])
    command = f"python -c {shlex.quote(_COLLECT)} {collected} {options}"
    found = []
    with provider.create(spec.name) as sandbox:
        for seed in range(LISTINGS):
            ran = sandbox.exec(f"rm -f {collected}; {command}", timeout, env={"PYTHONHASHSEED": str(seed)})
            try:
                found.append(_listing(sandbox.read(collected)))
            except (OSError, ValueError, RecursionError, zlib.error) as error:
                last = ran.output.strip().split("\n")[-1][:300] or f"status {ran.exit_code}"
                raise UserError(
                    f"{spec.name}: its tests cannot be collected in a process of their own: {last}") from error
    return found


def _listing(packed: str) -> dict[str, str | None]:
    """Reads what collect.py wrote, or tests in its place; raises ValueError or zlib.error."""
    unpacking = zlib.decompressobj()
    found = json.loads(unpacking.decompress(base64.b85decode(packed), MAX_LISTING))
    if not isinstance(found, dict) or not all(value is None or isinstance(value, str) for value in found.values()):
        raise ValueError("no list of tests")
    return found


def _wandering(listings: Sequence[Mapping[str, str | None]]) -> set[str]:
    """Test functions of which some id is missing, has other parameters in some process, or numbers members of a set."""
    first = listings[0]
    names = set().union(*listings)
    return {name.split("[")[0] for name in names
            if first.get(name) is None or any(found.get(name) != first[name] for found in listings)}


def callers(known: Survey, path: str, qualname: str) -> tuple[int, ...]:
    """Tests that call a function; of a class, those that call any of its methods."""
    exact = known.callers.get(f"{path}::{qualname}")
    if exact is not None:
        return exact
    prefix = f"{path}::{qualname}."
    callers = (found for name, found in known.callers.items() if name.startswith(prefix))
    return tuple(sorted({number for found in callers for number in found}))
