"""RL from token to weights: learning on a bandit, resumption, filters, replay."""

import dataclasses
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.config import ExpertsConfig
from qcn_jax.errors import UserError
from qcn_jax.inference.engine import Engine
from qcn_jax.pipeline.rl import episodes, lessons
from qcn_jax.pipeline.rl.counterfactuals import Gradients, Variant, compared
from qcn_jax.pipeline.rl.learner import Learner, lesson
from qcn_jax.pipeline.rl.policy import Batches, make_trainer, policy_loss
from qcn_jax.pipeline.rl.recorded import Journals
from qcn_jax.pipeline.rl.records import Outcome, Reply
from qcn_jax.pipeline.train.fingerprint import fingerprint
from qcn_jax.pipeline.train.metrics import read_metrics
from qcn_jax.pipeline.train.signals import Interrupted
from qcn_jax.pipeline.train.step import TrainState
from qcn_jax.pipeline.train.trainer import Trainer
from tests.pipeline.micro import MODEL, STOP, micro_params
from tests.pipeline.rl.formulas import CONFIG, published


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

    def close(self) -> None:
        pass


def make_engine(params) -> Engine:
    return Engine(
        MODEL, params, slots=16, max_length=16, max_new_tokens=4, stop_ids=(STOP,), prefill_rows=4, prefill_chunk=4,
        unrolled=False, with_routes=True,
    )  # fmt: skip


def make_learner(engine: Engine, trainer: Trainer, config: ExpertsConfig = CONFIG) -> Learner:
    return Learner(config, 0, engine, trainer, prompts=list(range(8)), converse=Bandit)


def advance(learner: Learner, update: int, state: TrainState) -> tuple[TrainState, dict]:
    """One update outside of the loop."""
    work, metrics = learner.next(update, state), {}
    for batch in work.batches:
        state, metrics = learner.trainer.step(state, batch)
    return state, {**work.metrics, **jax.device_get(metrics)}


@pytest.fixture(scope="module")
def params():
    return micro_params()


@pytest.fixture(scope="module")
def engine(params):
    return make_engine(params)


@pytest.fixture(scope="module")
def trainer():
    return make_trainer(MODEL, CONFIG, None)


def fresh(params, trainer) -> TrainState:
    return trainer.create(jax.tree.map(jnp.copy, params))


def test_log_probabilities_of_rollouts_are_those_of_training(params, engine) -> None:
    """Acting and learning agree on the policy at any temperature: before the first step every ratio is one."""
    config = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, temperature=0.5))
    learner = make_learner(engine, make_trainer(MODEL, config, None), config)
    _, metrics = advance(learner, 0, fresh(params, learner.trainer))
    assert metrics["groups"] and metrics["kl_old"] < 1e-6 and metrics["clipped"] == 0


def test_routes_are_replayed(params, engine) -> None:
    """At first they are the routers' own; behind an update the loss is that of the experts which acted."""
    config = dataclasses.replace(CONFIG, routing="replay")
    learner = make_learner(engine, make_trainer(MODEL, config, None), config)
    work = learner.next(0, fresh(params, learner.trainer))
    (batch,) = work.batches
    assert batch["routes"].shape == (*batch["tokens"].shape, MODEL.num_hidden_layers, MODEL.num_experts_per_tok)
    rows = {name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()}
    rows["weight_sum"] = rows["weights"].sum()
    replayed, free = (jax.jit(policy_loss(MODEL, dataclasses.replace(config, routing=name))) for name in ("replay", "free"))
    (value, same), (plain, _) = replayed(params, rows), free(params, rows)
    assert same["rerouted"] < 0.05 and same["kl_old"] < 1e-6 and float(value) == pytest.approx(float(plain), abs=1e-4)
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    moved = jax.tree.map(noise, params)
    (value, apart), (plain, _) = replayed(moved, rows), free(moved, rows)
    assert apart["rerouted"] > 0.2 and abs(float(value) - float(plain)) > 1e-3
    other, _ = replayed(moved, rows | {"routes": (rows["routes"] + 1) % MODEL.num_experts})
    assert abs(float(other) - float(value)) > 1e-3  # a replay that does nothing would not notice
    freed, _ = replayed(moved, rows | {"routes": jnp.full_like(rows["routes"], -1)})
    assert float(freed) == pytest.approx(float(plain), rel=1e-5)
    with pytest.raises(UserError, match="--config.experts.routing: 'replay', but the model has no experts"):
        make_trainer(dataclasses.replace(MODEL, num_experts=0, intermediate_size=8), config, None)


def test_reward_rises_on_a_bandit(params, engine, trainer) -> None:
    learner = make_learner(engine, trainer, dataclasses.replace(CONFIG, prompts=2, group_size=16))
    learner.prompts = [0, 1]
    state, curve = fresh(params, trainer), []
    for update in range(40):
        state, metrics = advance(learner, update, state)
        curve.append(metrics)
    assert np.mean([m["reward"] for m in curve[:3]]) < 0.7
    assert np.mean([m["reward"] for m in curve[-5:]]) > 0.9
    assert curve[0]["kl_old"] < 1e-6  # decoding and training agree on the policy that acted
    learned = [metrics for metrics in curve if metrics["groups"]]
    assert learned[-1]["entropy"] < learned[0]["entropy"]


def test_groups_of_one_mind_and_broken_sandboxes_teach_nothing(params, engine, trainer) -> None:
    class Hopeless(Bandit):
        def outcome(self, truncated: bool) -> Outcome:
            return Outcome(-0.2 * self.first, False, finished=False, penalty=0.2 * self.first)

    class Broken(Bandit):
        def outcome(self, truncated: bool) -> Outcome:
            return Outcome(0.0, False, False, infrastructure=True)

    learner = make_learner(engine, trainer)
    # A group of 8 is given up when 8 x 8 fresh samples have failed like the first.
    for kind, count in ((Hopeless, 0.0), (Broken, 4 * (8 * 8 + 1.0))):
        learner.converse = kind
        state = fresh(params, trainer)
        state, metrics = advance(learner, 0, state)
        assert metrics["given_up_groups"] == 4 * (kind is Broken)
        assert metrics["groups"] == 0 and metrics["infrastructure"] == count and int(state.step) == 0
        jax.tree.map(np.testing.assert_array_equal, state.params, params)


def test_prompt_filter_keeps_what_is_solved_sometimes(params, engine, trainer) -> None:
    class Mixed(Bandit):
        def outcome(self, truncated: bool) -> Outcome:
            solved = self.k == 0 or (self.k > 4 and self.first % 2 == 0)
            return Outcome(float(solved), solved, finished=True)

    learner = make_learner(engine, trainer)
    learner.converse = Mixed
    assert learner.useful(params, 16) == [5, 6, 7]


def run(folder, params, learner: Learner, updates: int, config: ExpertsConfig = CONFIG, log=lambda line: None):
    result = learner.trainer.run(folder, jax.tree.map(jnp.copy, params), learner, updates, config, log=log,
                                 line=lambda metrics: "")  # fmt: skip
    return result.state


def read(folder):
    """Rows of the curve without what depends on the clock."""
    clock = ("tokens_per_second", "goodput", "seconds", "seconds_per_step", "seconds_rollout", "seconds_waited")
    return [{name: value for name, value in row.items() if name not in clock}
            for row in read_metrics(folder / "metrics.jsonl")]


def test_resumed_updates_equal_uninterrupted_ones(tmp_path, params, engine, trainer) -> None:
    whole = run(tmp_path / "whole", params, make_learner(engine, trainer), 5)

    class Killed(Exception):
        pass

    class Dies(Learner):
        def next(self, step, state, stop):
            if step == 3:
                raise Killed  # after the checkpoint of update 2, as a kill in the middle of update 3 would leave it
            return super().next(step, state, stop)

    with pytest.raises(Killed):
        run(tmp_path / "part", params, Dies(**vars(make_learner(engine, trainer))), 5)
    resumed = run(tmp_path / "part", params, make_learner(engine, trainer), 5)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert read(tmp_path / "whole") == read(tmp_path / "part") and len(read(tmp_path / "part")) == 5
    assert {"loss", "entropy", "reward", "learning_rate", "grad_norm"} <= read(tmp_path / "part")[0].keys()


def test_sigterm_in_a_rollout_saves_and_the_rest_follows_later(tmp_path, params, engine, trainer) -> None:
    config = dataclasses.replace(CONFIG, checkpoint_every=100)
    whole = run(tmp_path / "whole", params, make_learner(engine, trainer), 3, config)

    class Signalled(Learner):
        def next(self, step, state, stop):
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().next(step, state, stop)

    with pytest.raises(Interrupted) as stopped:
        run(tmp_path / "part", params, Signalled(**vars(make_learner(engine, trainer))), 3, config)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [row["step"] for row in read(tmp_path / "part")] == [1]
    jax.tree.map(np.testing.assert_array_equal, whole,
                 run(tmp_path / "part", params, make_learner(engine, trainer), 3, config))


def test_minibatches_are_optimizer_steps(params, engine) -> None:
    config = dataclasses.replace(CONFIG, minibatches=2)
    learner = make_learner(engine, make_trainer(MODEL, config, None), config)
    state, _ = advance(learner, 0, fresh(params, learner.trainer))
    assert int(state.step) == 2


def test_prompts_come_once_each_before_any_comes_again() -> None:
    items = list(range(10))
    drawn = [item for update in range(5) for item in episodes.choose(items, 4, update, seed=3)]
    assert sorted(drawn[:10]) == items and sorted(drawn[10:]) == items and drawn[:10] != drawn[10:]
    assert drawn[:10] != [i for u in range(5) for i in episodes.choose(items, 4, u, seed=4)][:10]
    with pytest.raises(UserError, match="no prompts"):
        episodes.choose([], 4, 0, 0)


def test_a_journal_goes_on_in_the_middle_of_an_update(tmp_path, params, engine, trainer) -> None:
    """Killed while the policy acts, a run learns in the end from the same episodes, those that had ended among them."""
    config = dataclasses.replace(CONFIG, checkpoint_every=2)
    kept = lambda name: dataclasses.replace(make_learner(engine, trainer, config), journal=tmp_path / name / "journal")
    whole = run(tmp_path / "whole", params, kept("whole"), 4, config)

    class Killed(Exception):
        pass

    class Dies(Bandit):
        left = 70  # verdicts: the third update's first few, of 32 each

        def outcome(self, truncated: bool) -> Outcome:
            Dies.left -= 1
            if Dies.left < 0:
                raise Killed
            return super().outcome(truncated)

    learner = kept("part")
    learner.converse = Dies
    with pytest.raises(Killed):
        run(tmp_path / "part", params, learner, 4, config)
    learner.close()
    resumed = run(tmp_path / "part", params, kept("part"), 4, config)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert read(tmp_path / "whole") == read(tmp_path / "part")


def test_asynchronous_updates_learn_say_how_stale_they_were_and_are_learned_again_from_the_journal(
        tmp_path, params, engine, trainer) -> None:
    config = dataclasses.replace(CONFIG, max_staleness=2, burst=2, checkpoint_every=10)
    make = lambda: dataclasses.replace(make_learner(engine, trainer, config), journal=tmp_path / "journal" / "0")
    learner = make()
    whole = run(tmp_path / "run", params, learner, 60, config)
    learner.close()
    curve = read(tmp_path / "run")
    assert np.mean([row["reward"] for row in curve[-5:]]) > np.mean([row["reward"] for row in curve[:5]]) + 0.1
    assert max(row["staleness_most"] for row in curve) in (1, 2)
    assert all(row["staleness_most"] <= 2 and "put_back" in row for row in curve)
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # all updates are to be done again
    generated = engine.generate
    try:
        engine.generate = None  # nothing is generated again
        learner = make()
        again = run(tmp_path / "again", params, learner, 60, config)
    finally:
        engine.generate = generated
    learner.close()
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert read(tmp_path / "again") == curve
    _replayed(Journals(tmp_path / "journal", config), params, trainer, whole.params)


def _replayed(journals, params, trainer, whole) -> None:
    """Without an engine: each update's episodes are those that it learned from, and so are all weights on the way."""
    state = fresh(params, trainer)
    for step in range(journals.updates):
        records, weights = journals.next()
        assert weights == fingerprint(state.params) and records
        for batch in lesson(records, step, Batches(trainer, journals.config), state.params, {}).batches:
            state, _ = trainer.step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, whole, state.params)
    journals.close()


def test_other_settings_on_the_same_episodes_give_the_gradient_of_the_formulas(tmp_path, params, engine, trainer):
    config = dataclasses.replace(CONFIG, malformed_penalty=0.0, prompts=2)
    learner = dataclasses.replace(make_learner(engine, trainer, config), journal=tmp_path / "0")
    learner.next(0, fresh(params, trainer))
    learner.close()
    journals = Journals(tmp_path, config)
    records, _ = journals.next()
    assert (journals.updates, len(records), journals.with_routes) == (1, 16, True)
    own = Gradients(MODEL, config, None, params)
    whole, weight = own.of(params, records, 0)
    assert weight == sum(int(record.sampled.sum()) for record in records)
    _, metrics = trainer.step(fresh(params, trainer), lesson(records, 0, Batches(trainer, config), params, {}).batches[0])
    norm = lambda tree: np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(tree)))
    assert norm(whole) == pytest.approx(float(metrics["grad_norm"]), rel=1e-4)

    variant = Variant.parse("average=episode,negative_weight=0.2,kl_coef=0.1", config, journals.with_routes)
    reference = jax.tree.map(lambda x: x * 0.9, params)
    other, _ = Gradients(MODEL, variant.config, None, reference).of(params, records, 0)
    groups = lessons.parts(records, config)[0]
    _, slope = published(params, reference, groups, variant.config)
    error = np.linalg.norm(np.asarray(other["lm_head"]["kernel"], np.float64) - slope)
    assert error < 1e-4 * np.linalg.norm(slope)
    flat = [np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
            for tree in (whole, other)]
    found = compared(whole, other)
    lengths = [np.linalg.norm(values) for values in flat]
    assert found["cosine"] == pytest.approx(flat[0] @ flat[1] / np.prod(lengths), abs=1e-4)
    assert found["norm"] == pytest.approx(lengths[1] / lengths[0], rel=1e-4) and compared(whole, whole)["norm"] == 1.0

    shares = own.shares(params, records, 0, whole)
    assert [row["group"] for row in shares] == [0, 1] and sum(row["share"] for row in shares) == pytest.approx(1, abs=1e-4)
    for words, problem in [("updates=3", "is not NAME=VALUE of objective"), ("objective=best", "objective"),
                           ("clip_low=2", "clip_low"), ("gspo", "is not NAME=VALUE")]:
        with pytest.raises(UserError, match=problem):
            Variant.parse(words, config, True)
    with pytest.raises(UserError, match="holds no routes"):
        Variant.parse("routing=replay", config, False)
    assert Variant.parse("ratio_bounds=(0.5, 2),objective=gspo", config, True).config.ratio_bounds == (0.5, 2)
