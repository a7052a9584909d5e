"""Every reward has a cause."""

import numpy as np
import pytest

from qcn_jax.pipeline.rl import ledger
from qcn_jax.pipeline.rl.records import Outcome, RolloutRecord


def outcome(reason="submitted", verdict="resolved", broken=False):
    return Outcome(1.0, True, True, infrastructure=broken, detail={"reason": reason, "outcome": verdict})


@pytest.mark.parametrize("found, cause", [
    (outcome(), "policy"), (outcome(verdict="unresolved"), "policy"), (outcome(verdict="patch_failed"), "policy"),
    (outcome("turn_limit", "unresolved"), "limit"), (outcome("time_limit"), "limit"), (outcome(verdict="timeout"), "limit"),
    (outcome(verdict="killed"), "limit"), (outcome(verdict="suspected_exploit"), "suspected_exploit"),
    (outcome("turn_limit", "suspected_exploit"), "suspected_exploit"),
    (outcome("infrastructure", "infrastructure", True), "infrastructure"),
    (outcome("submitted", "infrastructure", True), "verifier"),
    (outcome("submitted", "resolved", True), "infrastructure"),  # of a group that was given up
    (Outcome(0.0, False, True), "policy"), (Outcome(0.0, False, True, infrastructure=True), "infrastructure")])
def test_causes(found, cause):
    assert ledger.cause_of(found) == cause and cause in ledger.CAUSES


def test_shares_and_the_length_of_what_is_missing():
    def record(found, length):
        tokens = np.arange(length, dtype=np.int32)
        return RolloutRecord(0, 0, tokens, np.ones(length, bool), np.zeros(length, np.float32), (), found)

    broken = outcome("infrastructure", "infrastructure", True)
    found = ledger.shares([record(outcome(), 10), record(outcome("turn_limit"), 20), record(broken, 45), record(broken, 15)])
    assert found == {"cause/policy": 0.25, "cause/limit": 0.25, "cause/suspected_exploit": 0.0, "cause/verifier": 0.0,
                     "cause/infrastructure": 0.5, "missing_length": 2.0}
    assert ledger.shares([]) == dict.fromkeys([f"cause/{name}" for name in ledger.CAUSES], 0.0) | {"missing_length": 1.0}
