"""A short soak on the local back end: the benchmark's own accounting, with workers killed on the way."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.sandboxes import make_provider

SOAK = pathlib.Path(__file__).parents[3] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_short_soak_loses_doubles_and_leaves_nothing_and_resumes(tmp_path):
    make_provider("local", tmp_path / "state").close()  # or skip
    out = tmp_path / "out"

    def soak(executions):
        done = subprocess.run([sys.executable, str(SOAK), "--kind=local", f"--executions={executions}", f"--out={out}",
                               "--workers=2", "--fault_seconds=2"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        assert "lost 0, doubled 0, wrong 0; left behind: 0 processes, 0 files" in done.stdout
        return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]

    first = soak(20)
    with open(out / "results.jsonl", "a") as stream:
        stream.write('{"number": 20, "ki')  # what a killed writer leaves
    both = soak(30)
    assert both[:20] == first and sorted(row["number"] for row in both) == list(range(30))
