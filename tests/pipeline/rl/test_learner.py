"""RL from token to weights: hand-made losses, learning on a bandit, resumption, filters."""

import dataclasses
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.config import ExpertsConfig, OptimizerConfig, RolloutConfig
from qcn_jax.errors import UserError
from qcn_jax.inference.engine import Engine
from qcn_jax.model import Qwen3Next
from qcn_jax.pipeline.rl import episodes, lessons
from qcn_jax.pipeline.rl.counterfactuals import Gradients, Variant, compared
from qcn_jax.pipeline.rl.learner import Learner, lesson, make_trainer, policy_loss
from qcn_jax.pipeline.rl.recorded import Journals
from qcn_jax.pipeline.rl.records import Outcome, Reply, RolloutRecord, Turn
from qcn_jax.pipeline.train.fingerprint import fingerprint
from qcn_jax.pipeline.train.metrics import read_metrics
from qcn_jax.pipeline.train.signals import Interrupted
from qcn_jax.pipeline.train.step import TrainState
from qcn_jax.pipeline.train.trainer import Trainer
from tests.pipeline.micro import MODEL, STOP, micro_params

CONFIG = ExpertsConfig(
    updates=1000, prompts=4, group_size=8, rows=4, sequence_length=64, malformed_penalty=0.5, checkpoint_every=2,
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


def make_record(prompt: int, opening: list[int], tokens: list[int], logprobs, reward: float, malformed=False):
    n, m = len(opening), len(tokens)
    return RolloutRecord(
        prompt, 0, np.asarray(opening + tokens, np.int32), np.asarray([False] * n + [True] * m),
        np.asarray([0.0] * n + list(logprobs), np.float32), (Turn(n, n + m, malformed, True),),
        Outcome(reward, reward > 0.5, True),
    )  # fmt: skip


def test_loss_of_packed_rows_is_the_formula_token_by_token(params) -> None:
    """The jitted loss against a loop over episodes, each passed through the model on its own, in float64."""
    rng = np.random.default_rng(0)
    specs = [(0, [2, 8], [4, 5, 1], 1.0, False), (0, [2, 8], [9, 31], 0.0, True), (1, [2, 9, 3], [7], 1.0, False),
             (1, [2, 9, 3], [8, 8, 8, 1], 0.3, False)]  # fmt: skip
    records = [
        make_record(g, opening, tokens, -rng.random(len(tokens)) * 4 - 1, reward, malformed)
        for g, opening, tokens, reward, malformed in specs
    ]
    rows = lessons.rows([records[:2], records[2:]], CONFIG)
    assert rows["tokens"].shape == (4, 64) and rows["weights"].sum() == 10
    batch = {name: jnp.asarray(array) for name, array in rows.items()}
    value, sums = jax.jit(policy_loss(MODEL, CONFIG))(params, batch | {"weight_sum": 1.0})

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


def _apply(params, tokens):
    """Final hidden states [n, D] of one episode on its own, in float64."""
    padded = np.pad(tokens, (0, 64 - len(tokens)))[None]
    return np.asarray(_hidden(params, padded).hidden[0, : len(tokens)], np.float64)


_hidden = jax.jit(lambda params, tokens: Qwen3Next(MODEL).apply({"params": params}, tokens, with_logits=False))


def _published(params, reference, groups, config):
    """Loss and its gradient by the head's kernel, written out in float64: GRPO's nested means, or DAPO's token mean."""
    kernel, fixed = (np.asarray(tree["lm_head"]["kernel"], np.float64) for tree in (params, reference))
    total, slope = 0.0, np.zeros_like(kernel)
    everything = sum(len(record.tokens) - record.turns[0].start for group in groups for record in group)
    for group in groups:
        rewards = np.asarray([record.outcome.reward for record in group])
        for record, advantage in zip(group, (rewards - rewards.mean()) / rewards.std()):
            advantage *= config.negative_weight if advantage < 0 else 1.0
            start, n = record.turns[0].start, len(record.tokens)
            length = n - start
            share = 1 / (len(groups) * len(group) * length) if config.average == "episode" else 1 / everything
            hidden, held = _apply(params, record.tokens), _apply(reference, record.tokens)
            for t in range(start, n):
                scores = [_log_softmax(h[t - 1] @ k / config.rollout.temperature)
                          for h, k in ((hidden, kernel), (held, fixed))]
                logprob, other = (score[record.tokens[t]] for score in scores)
                ratio = np.exp(logprob - record.logprobs[t])
                clipped = np.clip(ratio, 1 - config.clip_low, 1 + config.clip_high) * advantage
                total += share * (-min(ratio * advantage, clipped)
                                  + config.kl_coef * (np.exp(other - logprob) - (other - logprob) - 1))
                by_logprob = 0.0 if clipped < ratio * advantage else -ratio * advantage
                by_logprob += config.kl_coef * (1 - np.exp(other - logprob))
                by_logits = np.eye(MODEL.vocab_size)[record.tokens[t]] - np.exp(scores[0])
                slope += share * by_logprob * np.outer(hidden[t - 1], by_logits) / config.rollout.temperature
    return total, slope


def _log_softmax(logits):
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


@pytest.mark.parametrize("average,temperature,negative", [("episode", 1.0, 1.0), ("episode", 0.6, 0.2), ("token", 1.5, 1.0)])
def test_gradient_is_that_of_the_published_formulas(params, average, temperature, negative) -> None:
    """Shao et al. 2024, eq. 3 (episode) and Yu et al. 2025, eq. 8 (token), on episodes of very unequal length."""
    rollouts = dataclasses.replace(CONFIG.rollout, temperature=temperature)
    config = dataclasses.replace(CONFIG, average=average, negative_weight=negative, kl_coef=0.1, rollout=rollouts)
    rng, groups = np.random.default_rng(1), []
    for prompt, lengths in enumerate([(5, 50), (3, 1, 9)]):
        group = []
        for sample, length in enumerate(lengths):
            tokens = rng.integers(2, 32, length).tolist()
            record = make_record(prompt, [2, 8 + prompt], tokens, [0.0] * length, float(sample == 0))
            hidden = _apply(params, record.tokens)
            logits = hidden @ np.asarray(params["lm_head"]["kernel"], np.float64) / temperature
            for t in range(2, length + 2):  # near enough for most ratios to lie within the bounds
                record.logprobs[t] = _log_softmax(logits[t - 1])[record.tokens[t]] + rng.normal() * 0.2
            group.append(record)
        groups.append(group)
    reference = jax.tree.map(lambda x: x * 0.9, params)
    rows = lessons.rows(groups, config)
    assert rows["weights"].sum() == pytest.approx(68, rel=1e-6)  # a token weighs 1 on average
    batch = {name: jnp.asarray(array) for name, array in rows.items()} | {"weight_sum": rows["weights"].sum()}
    (value, _), slope = jax.jit(jax.value_and_grad(policy_loss(MODEL, config), has_aux=True))(params, batch, reference)
    want, want_slope = _published(params, reference, groups, config)
    assert float(value) == pytest.approx(want, abs=1e-5)
    error = np.linalg.norm(np.asarray(slope["lm_head"]["kernel"], np.float64) - want_slope)
    assert error < 1e-4 * np.linalg.norm(want_slope)


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


def test_kl_term_holds_the_policy_to_its_reference(params) -> None:
    config = dataclasses.replace(CONFIG, kl_coef=0.5)
    rows = lessons.rows([[
        make_record(0, [2, 8], [4, 5, 1], [-3.0] * 3, 1.0), make_record(0, [2, 8], [9, 3], [-3.0] * 2, 0.0),
    ]], config)  # fmt: skip
    batch = {name: jnp.asarray(array) for name, array in rows.items()} | {"weight_sum": 1.0}
    loss = jax.jit(policy_loss(MODEL, config))
    same, sums = loss(params, batch, params)
    other = jax.tree.map(lambda x: x * 0.5, params)
    apart, held = loss(params, batch, other)
    assert float(sums["kl_reference"]) == pytest.approx(0.0, abs=1e-5) and float(held["kl_reference"]) > 0.01
    assert float(apart - same) == pytest.approx(0.5 * float(held["kl_reference"]), rel=1e-4)


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
        for batch in lesson(records, step, journals.config, trainer, {}).batches:
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
    _, metrics = trainer.step(fresh(params, trainer), lesson(records, 0, config, trainer, {}).batches[0])
    norm = lambda tree: np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(tree)))
    assert norm(whole) == pytest.approx(float(metrics["grad_norm"]), rel=1e-4)

    variant = Variant.parse("average=episode,negative_weight=0.2,kl_coef=0.1", config, journals.with_routes)
    reference = jax.tree.map(lambda x: x * 0.9, params)
    other, _ = Gradients(MODEL, variant.config, None, reference).of(params, records, 0)
    groups = lessons.parts(records, config)[0]
    _, slope = _published(params, reference, groups, variant.config)
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
