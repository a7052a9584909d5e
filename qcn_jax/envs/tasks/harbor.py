"""Task folders of Harbor (Terminal-Bench 2): written from our tasks, and any such folder read.

A folder holds task.toml, instruction.md, environment/Dockerfile, tests/test.sh and solution/solve.sh; the verifier
leaves its reward in /logs/verifier/reward.json (key "reward") or reward.txt.
"""

import dataclasses
import json
import os
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any

from qcn_jax import files
from qcn_jax.envs import patches
from qcn_jax.envs.tasks.formats import test_files
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.errors import UserError

# Defaults of Harbor's own documentation, used where task.toml is silent.
AGENT_SECONDS, VERIFIER_SECONDS, BUILD_SECONDS, CPUS, MEMORY_MB, STORAGE_MB = 600.0, 600.0, 600.0, 1, 2048, 10240

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
import pathlib
import re
import subprocess
import sys

config = json.loads(pathlib.Path("/tests/config.json").read_text())
command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", "console_output_style=progress",
           "--continue-on-collection-errors", "--tb=no", *config["test_files"]]
output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
print(output)
line = re.compile(r"^(\\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?: \\(.*\\))? +\\[ *\\d+%\\]$", re.MULTILINE)
outcomes = {name: outcome for name, outcome in line.findall(output)}
passed = all(outcomes.get(name) in ("PASSED", "XFAIL") for name in config["FAIL_TO_PASS"])
kept = all(outcomes.get(name) in ("PASSED", "XFAIL", "SKIPPED") for name in config["PASS_TO_PASS"])
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
    """Reads a Harbor task folder, ours or anybody's.

    Raises:
      UserError: a file is missing or a field ill-typed; names it.
    """
    folder = pathlib.Path(folder)
    for name in ("task.toml", "instruction.md", "tests/test.sh"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: is no Harbor task: {name} is missing")
    if not any((folder / "environment" / name).is_file() for name in ("Dockerfile", "docker-compose.yaml")):
        raise UserError(f"{folder}: is no Harbor task: environment/Dockerfile is missing")
    try:
        config = tomllib.loads((folder / "task.toml").read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / 'task.toml'}: is not valid TOML: {error}") from error

    def number(section: str, field: str, default: float) -> Any:
        value = config.get(section, {}).get(field, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise UserError(f"{folder / 'task.toml'}: {section}.{field} must be a positive number, got {value!r}")
        return value

    ours = folder / "tests" / "config.json"
    row = files.read_json(ours).get("task") if ours.is_file() else None
    return HarborTask(
        name=str(config.get("task", {}).get("name", folder.name)),
        instruction=(folder / "instruction.md").read_text(encoding="utf-8"),
        agent_seconds=number("agent", "timeout_sec", AGENT_SECONDS),
        verifier_seconds=number("verifier", "timeout_sec", VERIFIER_SECONDS),
        build_seconds=number("environment", "build_timeout_sec", BUILD_SECONDS),
        cpus=number("environment", "cpus", CPUS),
        memory_mb=number("environment", "memory_mb", MEMORY_MB),
        storage_mb=number("environment", "storage_mb", STORAGE_MB),
        metadata=config.get("metadata", {}),
        task=Task.from_json(row, str(ours)) if row else None,
    )


def read_reward(logs: str | os.PathLike[str]) -> float | None:
    """The reward in a verifier's log folder: reward.json's "reward", or reward.txt; None where there is neither.

    Raises:
      UserError: the file holds no number.
    """
    logs = pathlib.Path(logs)
    try:
        if (logs / "reward.json").is_file():
            return float(files.read_json(logs / "reward.json")["reward"])
        if (logs / "reward.txt").is_file():
            return float((logs / "reward.txt").read_text().strip())
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{logs}: holds no reward: {error}") from error
    return None
