"""RL from token to weights: hand-made losses, learning on a bandit, resumption, filters."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.config import ExpertsConfig, OptimizerConfig, RolloutConfig
from qcn_jax.errors import UserError
from qcn_jax.inference.engine import Engine
from qcn_jax.model import Qwen3Next
from qcn_jax.pipeline.rl import online
from qcn_jax.pipeline.rl.learner import Learner, policy_loss
from qcn_jax.pipeline.rl.rollout import Outcome, Reply, RolloutRecord, Turn
from qcn_jax.pipeline.train.loop import Interrupted, TrainState
from qcn_jax.pipeline.train.metrics import read_metrics
from qcn_jax.pipeline.train.optimizer import make_optimizer
from qcn_jax.pipeline.train.update import Updater
from tests.pipeline.micro import MODEL, STOP, micro_params

CONFIG = ExpertsConfig(
    prompts=4, group_size=8, rows=4, sequence_length=64, malformed_penalty=0.5, checkpoint_every=2,
    optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=0, weight_decay=0.0),
    rollout=RolloutConfig(slots=16, max_length=16, max_new_tokens=4),
)  # fmt: skip


@dataclasses.dataclass
class Bandit:
    """One turn of tokens after a prompt token k; its reward is the share of them that have k's parity."""

    k: int
    first: int = -1
    share: float = 0.0

    def opening(self) -> list[int]:
        return [2, 8 + self.k]

    def reply(self, tokens: list[int], stopped: bool) -> Reply:
        self.first = tokens[0]
        self.share = float(np.mean([token % 2 == self.k % 2 for token in tokens]))
        return Reply(done=True, malformed=self.first >= 30)

    def outcome(self, truncated: bool) -> Outcome:
        return Outcome(self.share, self.share > 0.5, finished=True)


def make_engine(params) -> Engine:
    return Engine(
        MODEL, params, slots=16, max_length=16, max_new_tokens=4, stop_ids=(STOP,), prefill_rows=4, prefill_chunk=4,
        unrolled=False,
    )  # fmt: skip


def make_learner(engine: Engine, updater: Updater, config: ExpertsConfig = CONFIG, **kwargs) -> Learner:
    return Learner(config, 0, engine, updater, prompts=list(range(8)), converse=Bandit, **kwargs)


@pytest.fixture(scope="module")
def params():
    return micro_params()


@pytest.fixture(scope="module")
def engine(params):
    return make_engine(params)


@pytest.fixture(scope="module")
def optimizer():
    return make_optimizer(CONFIG.optimizer, 1000)


@pytest.fixture(scope="module")
def updater(optimizer):
    return Updater(policy_loss(MODEL, CONFIG), optimizer, CONFIG.rows)


def fresh(params, optimizer) -> TrainState:
    return TrainState.create(jax.tree.map(jnp.copy, params), optimizer)


def make_record(prompt: int, opening: list[int], tokens: list[int], logprobs, reward: float, malformed=False):
    n, m = len(opening), len(tokens)
    return RolloutRecord(
        prompt, 0, np.asarray(opening + tokens, np.int32), np.asarray([False] * n + [True] * m),
        np.asarray([0.0] * n + list(logprobs), np.float32), (Turn(n, n + m, malformed, True),),
        Outcome(reward, reward > 0.5, True),
    )  # fmt: skip


def test_loss_of_packed_rows_is_the_formula_token_by_token(params, engine, updater) -> None:
    """The jitted loss against a loop over episodes, each passed through the model on its own, in float64."""
    rng = np.random.default_rng(0)
    specs = [(0, [2, 8], [4, 5, 1], 1.0, False), (0, [2, 8], [9, 31], 0.0, True), (1, [2, 9, 3], [7], 1.0, False),
             (1, [2, 9, 3], [8, 8, 8, 1], 0.3, False)]  # fmt: skip
    records = [
        make_record(g, opening, tokens, -rng.random(len(tokens)) * 4 - 1, reward, malformed)
        for g, opening, tokens, reward, malformed in specs
    ]
    learner = make_learner(engine, updater)
    rows = learner.rows([records[:2], records[2:]])
    assert rows["tokens"].shape == (4, 64) and rows["weights"].sum() == 10
    batch = {name: jnp.asarray(array) for name, array in rows.items()}
    value, sums = jax.jit(policy_loss(MODEL, CONFIG))(params, batch, None)

    want, clipped, apply = 0.0, 0, jax.jit(Qwen3Next(MODEL).apply)
    advantages = [1.0, -1.0, 1.0, -1.0]  # two samples a group: standard scores are plus and minus one
    for record, advantage in zip(records, advantages):
        padded = np.pad(record.tokens, (0, 8 - len(record.tokens)))[None]
        logits = np.asarray(apply({"params": params}, padded).logits[0], np.float64)
        scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        start, stop = record.turns[0].start, record.turns[0].stop
        for t in range(start, stop):
            ratio = np.exp(scores[t - 1, record.tokens[t]] - record.logprobs[t])
            a = advantage - (0.5 if record.turns[0].malformed else 0.0)
            surrogate = min(ratio * a, np.clip(ratio, 0.8, 1.28) * a)
            clipped += np.clip(ratio, 0.8, 1.28) * a < ratio * a
            want -= surrogate
    assert float(value) == pytest.approx(want, rel=1e-4)
    assert float(sums["clipped"]) == clipped > 0


def test_episodes_weigh_alike_and_failures_less(engine, updater) -> None:
    group = [make_record(0, [2, 8], [4, 5, 1], [-1.0] * 3, 1.0), make_record(0, [2, 8], [9], [-1.0], 0.0)]
    plain = make_learner(engine, updater).rows([group])["advantages"]
    assert sorted(plain[plain != 0].tolist()) == [-1, 1, 1, 1]
    config = dataclasses.replace(CONFIG, average="episode", negative_weight=0.25)
    rows = make_learner(engine, updater, config).rows([group])["advantages"]
    np.testing.assert_allclose(sorted(rows[rows != 0].tolist()), [-0.25 * 2, *[2 / 3] * 3], rtol=1e-6)


def test_kl_term_holds_the_policy_to_its_reference(params, engine, updater) -> None:
    config = dataclasses.replace(CONFIG, kl_coef=0.5)
    rows = make_learner(engine, updater).rows([[
        make_record(0, [2, 8], [4, 5, 1], [-3.0] * 3, 1.0), make_record(0, [2, 8], [9, 3], [-3.0] * 2, 0.0),
    ]])  # fmt: skip
    batch = {name: jnp.asarray(array) for name, array in rows.items()}
    loss = jax.jit(policy_loss(MODEL, config))
    same, sums = loss(params, batch, params)
    other = jax.tree.map(lambda x: x * 0.5, params)
    apart, held = loss(params, batch, other)
    assert float(sums["kl_reference"]) == pytest.approx(0.0, abs=1e-5) and float(held["kl_reference"]) > 0.01
    assert float(apart - same) == pytest.approx(0.5 * float(held["kl_reference"]), rel=1e-4)


def test_reward_rises_on_a_bandit(params, engine, optimizer, updater) -> None:
    learner = make_learner(engine, updater, dataclasses.replace(CONFIG, prompts=2, group_size=16))
    learner.prompts = [0, 1]
    state, curve = fresh(params, optimizer), []
    for update in range(40):
        state, metrics = learner.step(update, state)
        curve.append(metrics)
    assert np.mean([m["reward"] for m in curve[:3]]) < 0.7
    assert np.mean([m["reward"] for m in curve[-3:]]) > 0.9
    assert curve[0]["kl_old"] < 1e-6  # decoding and training agree on the policy that acted
    learned = [metrics for metrics in curve if metrics["groups"]]
    assert learned[-1]["entropy"] < learned[0]["entropy"]


def test_groups_of_one_mind_and_broken_sandboxes_teach_nothing(params, engine, optimizer, updater) -> None:
    class Hopeless(Bandit):
        def outcome(self, truncated: bool) -> Outcome:
            return Outcome(-0.2 * self.first, False, finished=False)

    class Broken(Bandit):
        def outcome(self, truncated: bool) -> Outcome:
            return Outcome(0.0, False, False, infrastructure=True)

    learner = make_learner(engine, updater)
    for kind, count in ((Hopeless, 0.0), (Broken, 32.0)):
        learner.converse = kind
        state = fresh(params, optimizer)
        state, metrics = learner.step(0, state)
        assert metrics["groups"] == 0 and metrics["infrastructure"] == count and int(state.step) == 0
        jax.tree.map(np.testing.assert_array_equal, state.params, params)


def test_prompt_filter_keeps_what_is_solved_sometimes(params, engine, updater) -> None:
    class Mixed(Bandit):
        def outcome(self, truncated: bool) -> Outcome:
            solved = self.k == 0 or (self.k > 4 and self.first % 2 == 0)
            return Outcome(float(solved), solved, finished=True)

    learner = make_learner(engine, updater)
    learner.converse = Mixed
    assert learner.useful(params, 16) == [5, 6, 7]


def test_resumed_updates_equal_uninterrupted_ones(tmp_path, params, engine, optimizer, updater) -> None:
    learner = make_learner(engine, updater)
    run = lambda folder, updates: online.run_updates(
        tmp_path / folder, fresh(params, optimizer), learner.step, updates, log=lambda line: None,
        line=lambda metrics: "", checkpoint_every=2,
    )  # fmt: skip
    whole = run("whole", 5)

    class Killed(Exception):
        pass

    def dies(update, state, stop):
        if update == 3:
            raise Killed  # after the checkpoint of update 2, as a kill in the middle of update 3 would leave it
        return learner.step(update, state, stop)

    with pytest.raises(Killed):
        online.run_updates(
            tmp_path / "part", fresh(params, optimizer), dies, 5, log=lambda line: None, line=lambda metrics: "",
            checkpoint_every=2,
        )  # fmt: skip
    resumed = run("part", 5)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    read = lambda folder: [line.split('"seconds')[0] for line in open(tmp_path / folder / "metrics.jsonl")]
    assert read("whole") == read("part") and len(read("part")) == 5


def test_sigterm_in_a_rollout_saves_and_the_rest_follows_later(tmp_path, params, engine, optimizer, updater) -> None:
    learner = make_learner(engine, updater)
    run = lambda folder, step, updates: online.run_updates(
        tmp_path / folder, fresh(params, optimizer), step, updates, log=lambda line: None,
        line=lambda metrics: "", checkpoint_every=100,
    )  # fmt: skip
    whole = run("whole", learner.step, 3)

    def interrupted(update, state, stop):
        if update == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return learner.step(update, state, stop)

    with pytest.raises(Interrupted) as stopped:
        run("part", interrupted, 3)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [row["step"] for row in read_metrics(tmp_path / "part" / "metrics.jsonl")] == [1]
    jax.tree.map(np.testing.assert_array_equal, whole, run("part", learner.step, 3))


def test_a_signal_in_the_last_update_is_not_swallowed(tmp_path) -> None:
    def step(update, state, stop):
        if update == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return state, {}

    lines = []
    run = lambda step: online.run_updates(
        tmp_path, TrainState(jnp.zeros((), jnp.int32), {}, ()), step, 3, log=lines.append, line=lambda metrics: "",
        checkpoint_every=100,
    )  # fmt: skip
    with pytest.raises(Interrupted) as stopped:
        run(step)
    assert stopped.value.code == 128 + signal.SIGTERM and "stopped by a signal after update 3" in lines[-1]
    run(None)  # nothing is left to do


def test_minibatches_are_optimizer_steps(params, engine, optimizer, updater) -> None:
    learner = make_learner(engine, updater, dataclasses.replace(CONFIG, minibatches=2))
    state, _ = learner.step(0, fresh(params, optimizer))
    assert int(state.step) == 2


def test_prompts_come_once_each_before_any_comes_again() -> None:
    items = list(range(10))
    drawn = [item for update in range(5) for item in online.choose(items, 4, update, seed=3)]
    assert sorted(drawn[:10]) == items and sorted(drawn[10:]) == items and drawn[:10] != drawn[10:]
    assert drawn[:10] != [i for u in range(5) for i in online.choose(items, 4, u, seed=4)][:10]
    with pytest.raises(UserError, match="no prompts"):
        online.choose([], 4, 0, 0)
