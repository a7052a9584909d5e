"""Environments stand alone: tasks are made, checked and graded where neither JAX nor Flax can be imported."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.envs.synthesis.small import write_repository

BLOCK = '''
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax"):
            raise ImportError(f"{name} is not here")


sys.meta_path.insert(0, Blocked())
'''


@pytest.fixture(name="qcn")
def _qcn(tmp_path):
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "sitecustomize.py").write_text(BLOCK)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "block"), str(ROOT)])}

    def run(*arguments, module="qcn_jax"):
        return subprocess.run([sys.executable, "-m", module, *arguments], cwd=tmp_path, env=environment, text=True,
                              capture_output=True, timeout=900, check=False)

    return run


@pytest.mark.slow
def test_synthesize_verify_and_evaluate(qcn, tmp_path):
    assert "not here" in qcn("x", module="jax").stderr  # the blockade holds
    place = ["--sandbox=local", f"--repo={write_repository(tmp_path)}"]
    done = qcn("synthesize", *place, "--out=tasks.jsonl", "--count=2", "--candidates_per_repo=12")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text().splitlines()]
    assert rows
    done = qcn("verify", *place, "--tasks=tasks.jsonl", "--isolation=shared")
    assert done.returncode == 0 and f"{len(rows)} of {len(rows)} tasks are valid" in done.stdout, done.stderr[-3000:]
    predictions = [{"instance_id": row["instance_id"], "model_name_or_path": "gold", "model_patch": row["patch"]}
                   for row in rows]
    (tmp_path / "preds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in predictions))
    done = qcn("evaluate", *place, "--tasks=tasks.jsonl", "--predictions=preds.jsonl", "--isolation=shared", "--out=out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["rate"] == 1.0
