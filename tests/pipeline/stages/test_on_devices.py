"""Every training stage on a mesh: it gives one device's losses, compiles once, and runs what `qcn compile` compiles."""

import json

import numpy as np
import pytest

from qcn_jax import hub
from qcn_jax.pipeline.train.metrics import read_metrics
from tests.pipeline.stages import on_devices

pytestmark = pytest.mark.slow

STAGES = ("midtrain", "sft", "experts", "distill")
STEPS = ("midtrain 1", "midtrain 2", "sft 1", "experts 1", "distill 1")  # mid-training has two phases
CURVES = ("midtrain", "sft", "experts/swe", "experts/single_turn", "distill")


@pytest.fixture(scope="module", name="runs")
def _runs(tmp_path_factory, run_with_devices):
    """{devices: (folder, what on_devices.run returned)}."""
    found = {}
    for devices in (8, 1):
        root = tmp_path_factory.mktemp(f"devices{devices}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QCN_TEST_DIRECTORY", str(root))
            found[devices] = root, json.loads(run_with_devices(on_devices.main, devices).splitlines()[-1])
    return found


def test_losses_are_those_of_one_device(runs):
    for name in CURVES:
        rows = {devices: read_metrics(root / name / "metrics.jsonl") for devices, (root, _) in runs.items()}
        assert len(rows[8]) == len(rows[1]) >= 2
        for many, one in zip(rows[8], rows[1]):
            assert many.keys() == one.keys() and "loss" in one, name
            for metric in ("loss", "grad_norm", "agreement/swe", "kl_reference", "mtp", "entropy"):
                if metric in one:
                    assert many[metric] == pytest.approx(one[metric], rel=2e-3, abs=2e-5), (name, metric)


def test_parameters_move_as_on_one_device(runs):
    for name in ("sft", "experts/swe", "distill"):
        many, one = (hub.load(root / name / "model")[1] for root, _ in (runs[8], runs[1]))
        _, start = hub.load(runs[1][0] / "midtrain" / "model")
        moved = _norm(one, start)
        assert moved > 0.1 and _norm(many, one) < 1e-3 * moved, name


def _norm(a, b) -> float:
    import jax

    squares = jax.tree.map(lambda x, y: float(np.sum((np.asarray(x, np.float64) - y) ** 2)), a, b)
    return sum(jax.tree.leaves(squares)) ** 0.5


def test_results_say_where_the_state_lay(runs):
    for stage in STAGES:
        assert runs[1][1]["results"][stage]["mesh"] == {"devices": 1, "axes": {}}
        axes = {"fsdp": 4, "expert": 2} if stage == "midtrain" else {"fsdp": 2, "expert": 2, "context": 2}
        assert runs[8][1]["results"][stage]["mesh"] == {"devices": 8, "axes": axes}
    assert sum("acts and learns on 8 devices (fsdp 2 x expert 2 x context 2)" in line for line in runs[8][1]["lines"]) == 2


def test_each_stage_compiles_once(runs):
    for _, found in runs.values():
        assert found["shapes"] == dict.fromkeys(STEPS, 1)


@pytest.mark.parametrize("step", STEPS)
def test_the_program_that_runs_is_the_one_that_compiles(runs, step):
    found = runs[8][1]
    assert found["ran"][step] == found["compiles"][step]
    assert len(set(found["ran"].values())) == len(STEPS)
