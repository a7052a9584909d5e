"""Task folders of Harbor (Terminal-Bench 2): written from our tasks, and any such folder read (harbor_runs runs them).

A folder holds task.toml, instruction.md, environment/Dockerfile, tests/test.sh and solution/solve.sh; the verifier
leaves its reward in /logs/verifier/reward.json (key "reward") or reward.txt.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from qcn_jax import files
from qcn_jax.envs import names, patches
from qcn_jax.envs.tasks.formats import test_files
from qcn_jax.envs.tasks.schema import FOLDER_GRADER, MAX_TIMEOUT, Task, read_rows
from qcn_jax.errors import UserError

# Defaults of Harbor's own documentation, used where task.toml is silent.
AGENT_SECONDS, VERIFIER_SECONDS, BUILD_SECONDS, CPUS, MEMORY_MB, STORAGE_MB = 600.0, 600.0, 600.0, 1, 2048, 10240
_MIB = {"G": 1024.0, "M": 1.0, "K": 1 / 1024}
_DEFINITIONS = ("Dockerfile", "docker-compose.yaml")
_DESCRIPTION = "task.toml"  # makes a folder a task
_TESTS = "tests/test.sh"

_DOCKERFILE = """FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir pytest
COPY repo /testbed
WORKDIR /testbed
ENV PYTHONPATH={path} PYTHONDONTWRITEBYTECODE=1
RUN git init -q && git add -A && git -c user.name=task -c user.email=task@localhost commit -q -m start
"""
_TEST = """#!/bin/bash
# Puts the pristine tests back, runs them, and writes the reward.
mkdir -p /logs/verifier
echo '{"reward": 0}' > /logs/verifier/reward.json
cp -r /tests/files/. /testbed/
cd /testbed && python /tests/grade.py
"""
_GRADE = '''"""Reward 1 if every FAIL_TO_PASS and every PASS_TO_PASS test passes (SWE-bench's semantics), else 0."""

import json
import os
import pathlib
import sys

import pytest

BAD = ("failed", "error")


class Outcomes:
    """What pytest itself reports, whatever the repository's settings make it print."""

    def __init__(self):
        self.found = {}

    def pytest_runtest_logreport(self, report):
        expected = hasattr(report, "wasxfail")
        outcome = ("xfailed" if expected else "skipped") if report.skipped else (
            "failed" if report.failed else "xpassed" if expected and report.when == "call" else "passed")
        known = self.found.get(report.nodeid, "passed")  # subtests report under their test's id
        if known not in BAD and outcome != "passed":
            known = outcome
        self.found[report.nodeid] = known


config = json.loads(pathlib.Path("/tests/config.json").read_text(encoding="utf-8"))
sys.path[0] = os.getcwd()  # as python -m pytest has it
arguments = ["-v", "-p", "no:cacheprovider", "--maxfail=0", "--continue-on-collection-errors", "--tb=short",
             *config["test_files"]]
outcomes = Outcomes()
status = pytest.main([*arguments], plugins=[outcomes])  # which puts the repository's options into its list
if status == pytest.ExitCode.USAGE_ERROR:  # options of plugins that are not here
    outcomes = Outcomes()
    pytest.main(["-o", "addopts=", *arguments], plugins=[outcomes])
found = outcomes.found
passed = all(found.get(name) in ("passed", "xfailed") for name in config["FAIL_TO_PASS"])
kept = all(found.get(name) in ("passed", "xfailed", "skipped") for name in config["PASS_TO_PASS"])
pathlib.Path("/logs/verifier/reward.json").write_text(json.dumps({"reward": int(passed and kept)}))
'''


@dataclasses.dataclass(frozen=True)
class HarborTask:
    """What any Harbor task folder says; `task` only where the folder is one of ours (it names its tests)."""

    name: str
    instruction: str
    agent_seconds: float
    verifier_seconds: float
    build_seconds: float
    cpus: float
    memory_mb: int
    storage_mb: int
    metadata: dict[str, Any]
    docker_image: str = ""
    task: Task | None = None


def write_folder(
    folder: str | os.PathLike[str], task: Task, pristine: Mapping[str, str], python_path: str = "."
) -> None:
    """Writes a task as a Harbor folder.

    Args:
      folder: made if missing.
      task: ours; its repository's pristine text files are `pristine`.
      python_path: where the package lies below the root, as PYTHONPATH.
    """
    folder = pathlib.Path(folder)
    start = patches.apply_diff(pristine, task.bug_patch) if task.bug_patch else dict(pristine)
    tested = patches.apply_diff(start, task.test_patch) if task.test_patch else dict(pristine)
    path = ":".join(os.path.normpath(f"/testbed/{part}") for part in python_path.split(":"))
    for name, text in start.items():
        files.write_text(folder / "environment" / "repo" / name, text)
    for name in sorted({*test_files(task), *(n for n in tested if n.endswith("conftest.py"))}):
        files.write_text(folder / "tests" / "files" / name, tested[name])
    files.write_text(folder / "environment" / "Dockerfile", _DOCKERFILE.format(path=path))
    files.write_text(folder / "instruction.md", f"{task.problem_statement}\n\nThe repository is in /testbed.\n")
    files.write_text(folder / "tests" / "test.sh", _TEST)
    files.write_text(folder / "tests" / "grade.py", _GRADE)
    config = {"FAIL_TO_PASS": list(task.FAIL_TO_PASS), "PASS_TO_PASS": list(task.PASS_TO_PASS),
              "test_files": test_files(task), "task": task.to_json()}  # fmt: skip
    files.write_json(folder / "tests" / "config.json", config)
    end = "EOF_QCN_GOLD_PATCH"
    solution = f"#!/bin/bash\nset -e\ncd /testbed\ngit apply - <<'{end}'\n{task.patch.rstrip(chr(10))}\n{end}\n"
    files.write_text(folder / "solution" / "solve.sh", solution)
    for script in ("tests/test.sh", "solution/solve.sh"):
        os.chmod(folder / script, 0o755)
    files.write_text(folder / "task.toml", _toml(task))


def _toml(task: Task) -> str:
    quoted = {
        name: json.dumps(str(value)) for name, value in
        (("id", task.instance_id), ("repo", task.repo), ("kind", task.kind), ("strategy", task.strategy))
    }  # fmt: skip
    return (
        'version = "1.0"\n\n[metadata]\n'
        f'instance_id = {quoted["id"]}\nrepo = {quoted["repo"]}\n'
        f'kind = {quoted["kind"]}\nstrategy = {quoted["strategy"]}\n'
        'category = "software-engineering"\n\n'
        f"[agent]\ntimeout_sec = {AGENT_SECONDS}\n\n[verifier]\ntimeout_sec = {max(VERIFIER_SECONDS, task.timeout)}\n\n"
        f"[environment]\nbuild_timeout_sec = {BUILD_SECONDS}\ncpus = {CPUS}\nmemory_mb = {MEMORY_MB}\n"
        f"storage_mb = {STORAGE_MB}\n"
    )  # fmt: skip


def read_folder(folder: str | os.PathLike[str]) -> HarborTask:
    """Reads a Harbor task folder of one step, ours or anybody's, as Harbor 0.26 does.

    Raises:
      UserError: a file is missing or no text, or a field ill-typed; names it.
    """
    folder = pathlib.Path(folder)
    path = folder / _DESCRIPTION
    try:
        config = tomllib.loads(_text(folder, _DESCRIPTION))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is not valid TOML: {error}") from error
    sections = {name: config.get(name, {}) for name in ("task", "metadata", "agent", "verifier", "environment")}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{path}: {name} must be a table, got {section!r}")
    if config.get("steps"):
        raise UserError(f"{path}: steps: tasks of several steps are not read")
    number = functools.partial(_number, path, sections)
    image, system = (sections["environment"].get(name, default) for name, default in
                     (("docker_image", ""), ("os", "linux")))
    if not isinstance(image, str):
        raise UserError(f"{path}: environment.docker_image must be text, got {image!r}")
    if str(system).lower() != "linux":
        raise UserError(f"{path}: environment.os must be linux, got {system!r}")
    if not image and not any(files.is_file(folder / "environment" / name) for name in _DEFINITIONS):
        raise UserError(f"{folder}: is no Harbor task: environment/Dockerfile is missing, and environment.docker_image")
    instruction = _text(folder, "instruction.md")
    _text(folder, _TESTS)
    ours = folder / "tests" / "config.json"
    row = files.read_json(ours) if files.is_file(ours) else None
    row = row.get("task") if isinstance(row, dict) else None  # others' folders may hold such a file, too
    return HarborTask(
        name=str(sections["task"].get("name", folder.name)),
        instruction=instruction,
        agent_seconds=number("agent", "timeout_sec", AGENT_SECONDS),
        verifier_seconds=number("verifier", "timeout_sec", VERIFIER_SECONDS),
        build_seconds=number("environment", "build_timeout_sec", BUILD_SECONDS),
        cpus=number("environment", "cpus", CPUS),
        memory_mb=_size(path, sections, "memory", MEMORY_MB),
        storage_mb=_size(path, sections, "storage", STORAGE_MB),
        metadata=sections["metadata"],
        docker_image=image,
        task=Task.from_json(row, str(ours)) if isinstance(row, dict) else None,
    )


def folders(path: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The task folders at and below `path`, sorted."""
    return sorted(file.parent for file in pathlib.Path(path).rglob(_DESCRIPTION))


def read_task(folder: str | os.PathLike[str]) -> Task:
    """A folder as a task: of ours the one that it was written from, else one that its own tests decide, in its image.

    Raises:
      UserError: as `read_folder`; or it needs several containers.
    """
    return read_folder(folder).task or folder_task(folder)


def folder_task(folder: str | os.PathLike[str]) -> Task:
    """A folder, whoever has written it, as a task that its own tests decide; raises as `read_task`."""
    folder = pathlib.Path(folder).resolve()
    found = read_folder(folder)
    if files.is_file(folder / "environment" / "docker-compose.yaml"):
        raise UserError(f"{folder}: environment/docker-compose.yaml: tasks of several containers are not acted on")
    if not found.instruction.strip():
        raise UserError(f"{folder}: instruction.md is empty")
    row = {"instance_id": names.file_stem(found.name.replace("/", "__")), "repo": str(folder), "base_commit": "",
           "patch": "", "test_patch": "", "problem_statement": found.instruction, "FAIL_TO_PASS": [_TESTS],
           "PASS_TO_PASS": [], "strategy": "harbor", "image_name": found.docker_image or _own_image(folder),
           "timeout": min(found.verifier_seconds, MAX_TIMEOUT), "eval_script": f"/{_TESTS}",
           "log_parser": FOLDER_GRADER}
    return Task.from_json(row, str(folder))


def read_tasks(path: str | os.PathLike[str], faults: list[str]) -> list[Task]:
    """The tasks of all folders at and below `path`; folders that are none become lines of `faults`."""
    return read_rows(path, ((number, {"folder": folder}) for number, folder in enumerate(folders(path), 1)),
                     lambda row, _: read_task(row["folder"]), faults)


def _own_image(folder: pathlib.Path) -> str:
    """The name under which an image of environment/Dockerfile is kept: by what goes into it."""
    digest, place = hashlib.sha256(), folder / "environment"
    for path in sorted(place.rglob("*")):
        data = os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        digest.update(repr((path.relative_to(place).as_posix(), path.lstat().st_mode, len(data))).encode() + data)
    return f"qcn-harbor:{digest.hexdigest()[:20]}"


def _text(folder: pathlib.Path, name: str) -> str:
    if not files.is_file(folder / name):
        raise UserError(f"{folder}: is no Harbor task: {name} is missing")
    try:
        return (folder / name).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder / name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{folder / name}: is not valid UTF-8") from error


def _number(path: pathlib.Path, sections: Mapping[str, Any], section: str, field: str, default: float) -> Any:
    value = sections[section].get(field, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{path}: {section}.{field} must be a positive number, got {value!r}")
    return value


def _size(path: pathlib.Path, sections: Mapping[str, Any], field: str, default: int) -> int:
    """MiB: of `field`_mb, or of the older `field` in words such as 8G; Harbor refuses both where they disagree."""
    words = sections["environment"].get(field)
    stated = f"{field}_mb" in sections["environment"]
    number = int(_number(path, sections, "environment", f"{field}_mb", default))
    if not isinstance(words, str):
        return number
    size = re.fullmatch(r"\s*(\d+(?:\.\d*)?)([GMK])\s*", words.upper())
    if not size:
        raise UserError(f"{path}: environment.{field} must be a size such as 8G, 512M or 1024K, got {words!r}")
    found = int(float(size[1]) * _MIB[size[2]])
    if stated and found != number:
        raise UserError(f"{path}: environment.{field} is {words!r}, and environment.{field}_mb {number}")
    return found


def read_reward(logs: str | os.PathLike[str]) -> float | None:
    """The reward in a verifier's log folder: reward.json's "reward", or reward.txt; None where there is neither.

    Raises:
      UserError: the file holds no number.
    """
    logs = pathlib.Path(logs)
    try:
        if files.is_file(logs / "reward.json"):
            found = files.read_json(logs / "reward.json")
            reward = found["reward"] if isinstance(found, dict) else found
            if not isinstance(reward, int | float):
                raise TypeError(f"{reward!r} is no number")
        elif files.is_file(logs / "reward.txt"):
            reward = float((logs / "reward.txt").read_text(encoding="utf-8").strip())
        else:
            return None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{logs}: holds no reward: {error}") from error
    if not math.isfinite(reward):
        raise UserError(f"{logs}: holds no reward: {reward} is not finite")
    return float(reward)
