"""A short soak of agents on the local back end: the benchmark's own accounting, with all that can be killed killed."""

import pathlib
import subprocess
import sys

import pytest

from tests.sandboxes import make_provider

SOAK = pathlib.Path(__file__).parents[2] / "benchmarks" / "agent_soak.py"


@pytest.mark.slow
def test_kills_lose_and_double_no_episode_and_change_no_outcome(tmp_path):
    make_provider("local", tmp_path / "state").close()  # or skip
    done = subprocess.run([sys.executable, str(SOAK), "--kind=local", "--episodes=20", "--every=2",
                           f"--out={tmp_path}/out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.count("lost 0, doubled 0, wrong 0, without a conversation 0; left behind: 0 processes") == 2
    assert all(f"| {what} |" in done.stdout for what in ("worker", "endpoint", "engine", "run")), done.stdout
