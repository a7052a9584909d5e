"""Verified tasks in any language that has an environment: defects tried in warm containers by the environment's
verifier.

The counterpart of validate.py and synthesize.py for repositories whose tests are no pytest's. Only defects in code
that the tests reach are tried; coverage says which that is. Tasks carry release 5's eval_script, log_parser and image.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import docker

from qcn_jax.envs.synthesis import inject, plan, quality, validate
from qcn_jax.envs.synthesis.build import Environment, verifier
from qcn_jax.envs.synthesis.build.container import ROOT, Container
from qcn_jax.envs.synthesis.languages import LANGUAGES, check, go_module
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.journal import Rows

_COVERAGE = "/opt/qcn-coverage"
Log = Callable[[str], None]


def covered(container: Container, environment: Environment, files: Mapping[str, str]) -> Callable[[str, int], bool]:
    """Whether the tests reach a character of a file: (path, offset) -> bool."""
    if environment.recipe.language == "go":
        container.exec(f"go test -coverpkg=./... -coverprofile={_COVERAGE} ./...", 600.0)
        return _go_coverage(container.exec(f"cat {_COVERAGE}", 10.0).output, files)
    container.exec(environment.recipe.test, 600.0, env={"NODE_V8_COVERAGE": _COVERAGE})
    return _node_coverage(container.read_all(_COVERAGE).values(), files)


def _go_coverage(profile: str, files: Mapping[str, str]) -> Callable[[str, int], bool]:
    module = go_module(files)
    prefix = f"{module}/" if module else ""
    lines: dict[str, set[int]] = collections.defaultdict(set)
    # Tests could have written it: numbers that no file has are none.
    for match in re.finditer(r"(?m)^(\S+):(\d{1,9})\.\d+,(\d{1,9})\.\d+ \d+ [1-9]\d*$", profile):
        path = match[1].removeprefix(prefix)
        lines[path].update(range(int(match[2]), min(int(match[3]), files.get(path, "").count("\n") + 1) + 1))
    return lambda path, offset: files[path].count("\n", 0, offset) + 1 in lines[path]


def _node_coverage(reports: Iterable[bytes], files: Mapping[str, str]) -> Callable[[str, int], bool]:
    ranges: dict[str, list[list[tuple[int, int, int]]]] = collections.defaultdict(list)
    for data in reports:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):  # not V8's
            for script in json.loads(data).get("result", []):
                path = script["url"].removeprefix(f"file://{ROOT}/")
                if path in files:
                    ranges[path].append([(int(part["startOffset"]), int(part["endOffset"]), int(part["count"]))
                                         for function in script["functions"] for part in function["ranges"]])

    def reached(path: str, offset: int) -> bool:
        for found in ranges[path]:  # one process's; the smallest range around a character is the one that counts
            around = [(end - start, count) for start, end, count in found if start <= offset < end]
            if around and min(around)[1] > 0:
                return True
        return False

    return reached


def synthesize(
    client: docker.DockerClient, name: str, files: Mapping[str, bytes], environment: Environment,
    settings: plan.Settings, workdir: str | os.PathLike[str], log: Log, workers: int = 2,
) -> tuple[list[Task], list[validate.Verdict]]:
    """Makes verified tasks of one repository; resumes from the journal in `workdir`.

    Args:
      client: of a Docker engine.
      name: the tasks' `repo`.
      files: the repository's files.
      environment: built from them.
      settings: `target`, `kinds` (those that the language has), `candidates_per_repo`, `per_function`, `reruns`,
      `seed`. workdir: of the journal.
      log: takes progress lines.
      workers: containers side by side.

    Raises:
      SandboxError: the engine failed.
    """
    texts = {path: data.decode("utf-8", "replace") for path, data in files.items()}
    speaks = LANGUAGES[environment.recipe.language]
    judge = verifier.Verifier(environment.recipe.test, environment.recipe.parser)
    with Container(client, environment.image) as container:
        again = verifier.run(container, judge)
        reached = covered(container, environment, texts)
    expected = tuple(test for test in environment.passing if again.outcomes.get(test) == "passed")
    rng = random.Random(f"{settings.seed}/{name}")
    kinds = [kind for kind in settings.kinds or speaks.kinds if kind in speaks.kinds]
    found = [injection for path, text in sorted(texts.items()) if speaks.is_source(path)
             for injection in speaks.candidates(text, path, kinds, settings.max_function_lines, rng=rng)
             if reached(path, injection.start)]
    chosen = _choose(found, settings, rng)
    log(f"{name}: {len(expected)} stable tests, {len(found)} candidates in code that they reach, {len(chosen)} tried")
    place = check.Place(name, environment, texts, expected, settings)
    verdicts: list[validate.Verdict] = []
    sieve = quality.Sieve(settings.near_duplicates)
    idle: queue.SimpleQueue[Container] = queue.SimpleQueue()
    containers = [Container(client, environment.image) for _ in range(workers)]
    for container in containers:
        idle.put(container)

    def work(injection: inject.Injection) -> validate.Verdict:
        container = idle.get()
        try:
            return check.check(container, place, injection)
        finally:
            idle.put(container)

    try:
        path = pathlib.Path(workdir, f"{check.slug(name)}.journal.jsonl")
        with Rows(path) as journal, ThreadPoolExecutor(workers) as threads:
            keys = [check.key(place, injection) for injection in chosen]
            futures = {key: threads.submit(work, injection) for key, injection in zip(keys, chosen)
                       if key not in journal.known}
            for number, key in enumerate(keys, 1):
                if key not in journal.known:
                    journal.add(key, futures[key].result().to_json())
                verdict = validate.Verdict.from_json(journal.known[key])
                reason = sieve.refuses(verdict.task) if verdict.task else ""
                verdicts.append(dataclasses.replace(verdict, outcome=reason, task=None) if reason else verdict)
                kept = sum(verdict.task is not None for verdict in verdicts)
                if number % 20 == 0 or number == len(keys):
                    log(f"{name}: {kept} verified, {number} of {len(keys)} candidates executed")
                if settings.target and kept >= settings.target:
                    threads.shutdown(cancel_futures=True)
                    break
    finally:
        for container in containers:
            container.destroy()
    return [verdict.task for verdict in verdicts if verdict.task is not None], verdicts


def _choose(found: Sequence[inject.Injection], settings: plan.Settings, rng: random.Random) -> list[inject.Injection]:
    """Candidates by turns of the kinds, few of one function."""
    cells: dict[str, list[inject.Injection]] = collections.defaultdict(list)
    for injection in found:
        cells[injection.kind].append(injection)
    for cell in cells.values():
        rng.shuffle(cell)
    taken: collections.Counter[tuple[str, str]] = collections.Counter()
    chosen: list[inject.Injection] = []
    while any(cells.values()) and len(chosen) < settings.candidates_per_repo:
        for kind in sorted(cells):
            while cells[kind]:
                injection = cells[kind].pop()
                place = (injection.path, injection.qualname)
                if taken[place] < settings.per_function:
                    taken[place] += 1
                    chosen.append(injection)
                    break
    return chosen[: settings.candidates_per_repo]
