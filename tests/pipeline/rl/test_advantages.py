"""Which groups teach, and what each token of an episode earns."""

import dataclasses

import numpy as np
import pytest

from qcn_jax.config import ExpertsConfig
from qcn_jax.pipeline.rl import advantages, lessons
from qcn_jax.pipeline.rl.records import Outcome, RolloutRecord, Turn


def record(prompt: int, reward: float, solved: bool, infrastructure: bool = False, malformed=(False,)):
    turns = tuple(Turn(2 + 3 * i, 4 + 3 * i, flag, True) for i, flag in enumerate(malformed))
    n = 1 + 3 * len(malformed)
    sampled = np.zeros(n, bool)
    for turn in turns:
        sampled[turn.start : turn.stop] = True
    outcome = Outcome(reward, solved, finished=reward >= 0, infrastructure=infrastructure, penalty=max(0.0, -reward))
    return RolloutRecord(prompt, 0, np.arange(n, dtype=np.int32), sampled, np.zeros(n, np.float32), turns, outcome)


def test_groups_that_teach() -> None:
    records = [
        record(0, 1, True), record(0, -0.2, False), record(1, 1, True), record(1, 1, True), record(2, 0, False),
        record(2, -0.2, False), record(3, 1, True), record(3, 0, False, infrastructure=True),
    ]  # fmt: skip
    assert list(advantages.informative_groups(records)) == [0]
    # All in the right format, one of them resolved: there is something to learn.
    parts = [record(4, 0.5, True), record(4, 1, True), record(5, 0.5, True), record(5, 0.5, True)]
    assert list(advantages.informative_groups(parts)) == [4]
    summary = advantages.summarize(records)
    assert summary["infrastructure"] == 1 and summary["episodes"] == 7
    assert summary["pass_rate"] == pytest.approx(4 / 7) and summary["reward"] == pytest.approx(3.6 / 7)
    assert advantages.summarize([])["reward"] == 0.0 and not any(name.startswith("guard/") for name in summary)
    records[0].outcome.detail["guard"] = {"allowed": 4, "blocked": 2, "blocked/git_remote": 2, "unseen": 1}
    summary = advantages.summarize([records[0], *records])
    assert {name: value for name, value in summary.items() if name.startswith("guard/")} == {
        "guard/blocked/git_remote": 4.0, "guard/unseen": 2.0}


def test_right_at_once_is_better_than_right_in_the_end() -> None:
    """With a discount groups that are always solved teach, unless their attempts were as many."""
    def tried(episode, failed):
        turns = tuple(dataclasses.replace(turn, failing=i < failed) for i, turn in enumerate(episode.turns))
        return dataclasses.replace(episode, turns=turns)

    three = (False, False, False)
    first, third = tried(record(0, 1, True, malformed=three), 0), tried(record(0, 1, True, malformed=three), 2)
    assert [advantages.earned(one, 0.5) for one in (first, third)] == [1.0, 0.25]
    assert advantages.earned(tried(record(0, -0.2, False), 1), 0.5) == -0.2
    assert not advantages.informative_groups([first, third]) and not advantages.informative_groups([third, third], 0.5)
    assert list(advantages.informative_groups([first, third], 0.5)) == [0]
    config = ExpertsConfig(attempt_discount=0.5, negative_weight=1.0)
    soon, late = lessons.documents([[first, third]], config)[0]
    assert soon["advantages"].max() == pytest.approx(1.0, abs=1e-4)
    # The turn that was right in the end is less than expected, and those that failed are not worse than it.
    assert late["advantages"].min() == pytest.approx(-1.0, abs=1e-4) and late["advantages"].max() <= 0.0


def test_only_the_tokens_of_malformed_turns_are_penalised() -> None:
    config = ExpertsConfig(malformed_penalty=0.5)
    got = advantages.token_advantages(record(0, 1, True, malformed=(False, True)), 2.0, config)
    np.testing.assert_array_equal(got, [0, 0, 2, 2, 0, 1.5, 1.5])


def test_refuted_turns_are_never_reinforced() -> None:
    good, bad = record(0, 1, True, malformed=(False, False)), record(0, 0, False, malformed=(False, False))
    for episode, advantage, want in ((good, 2.0, [0, 0, 0, 0, 0, 2, 2]), (bad, -1.0, [0, 0, -1, -1, 0, -1, -1])):
        first, *rest = episode.turns
        failing = dataclasses.replace(episode, turns=(dataclasses.replace(first, failing=True), *rest))
        np.testing.assert_array_equal(advantages.token_advantages(failing, advantage, ExpertsConfig()), want)


def test_repeating_what_tests_refuted_is_penalised() -> None:
    episode = record(0, 1, True, malformed=(False, False))
    first, second = (dataclasses.replace(turn, failing=True) for turn in episode.turns)
    episode = dataclasses.replace(episode, turns=(first, dataclasses.replace(second, repeated=True)))
    got = advantages.token_advantages(episode, 1.0, ExpertsConfig(repeat_penalty=0.5))
    np.testing.assert_array_equal(got, [0, 0, 0, 0, 0, -0.5, -0.5])
