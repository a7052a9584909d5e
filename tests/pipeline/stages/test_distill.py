"""Distillation: the three losses token by token, and a student that takes on two teachers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax.config import DistillConfig, ExpertsConfig, OptimizerConfig, RolloutConfig, RunConfig
from qcn_jax.inference.engine import Engine
from qcn_jax.model import Qwen3Next
from qcn_jax.pipeline.rl import episodes
from qcn_jax.pipeline.rl.records import Outcome, Reply
from qcn_jax.pipeline.stages.distill import Distiller, deal, distill_loss, make_trainer
from tests.pipeline.micro import MODEL, STOP, micro_params

CONFIG = DistillConfig(
    updates=1000, prompts=4, group_size=2, rows=4, sequence_length=64,
    optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=0, weight_decay=0.0),
    rollout=RolloutConfig(slots=16, max_length=16, max_new_tokens=4),
)  # fmt: skip


@dataclasses.dataclass
class Ask:
    """One turn after an opening of two tokens; solved if the answer's first token is even."""

    start: tuple[int, int]
    first: int = 0

    def opening(self) -> list[int]:
        return list(self.start)

    def reply(self, tokens: list[int], stopped: bool) -> Reply:
        self.first = tokens[0]
        return Reply(done=True)

    def outcome(self, truncated: bool) -> Outcome:
        return Outcome(0.0, self.first % 2 == 0, True, infrastructure=self.start[1] == 9 and self.first % 3 == 0)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def params():
    return micro_params()


@pytest.fixture(scope="module")
def teachers():
    """Models that differ from the student and from each other."""
    return {"swe": micro_params(1), "single_turn": micro_params(2)}


@pytest.fixture(scope="module")
def engine(params):
    return Engine(
        MODEL, params, slots=16, max_length=16, max_new_tokens=4, stop_ids=(STOP,), prefill_rows=4, prefill_chunk=4,
        unrolled=False,
    )  # fmt: skip


def make_distiller(engine, teachers, name: str = "reverse_kl") -> Distiller:
    config = dataclasses.replace(CONFIG, loss=name)
    run = RunConfig(model=MODEL, experts=ExpertsConfig(names=("swe", "single_turn")), distill=config)
    prompts = {"swe": [(2, k) for k in range(8, 12)], "single_turn": [(3, k) for k in range(8, 12)]}
    return Distiller(config, 0, engine, make_trainer(run, None), teachers, prompts, Ask)


def log_softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "rejection_sft"])
def test_losses_token_by_token(name, engine, params, teachers) -> None:
    """The packed loss against one pass per episode and the definition in float64."""
    distiller = make_distiller(engine, teachers, name)
    records = distiller._rollout(params, [(2, 8), (2, 9)], 0, 0)
    rows = episodes.pack_rows([episodes.document(record) for record in records], 64, 4)
    value, sums = jax.jit(distill_loss(MODEL, name))(params, rows | {"weight_sum": 1.0}, teachers["swe"])
    apply, want, same, count = jax.jit(Qwen3Next(MODEL).apply), 0.0, 0, 0
    for record in records:
        padded = np.pad(record.tokens, (0, 8 - len(record.tokens)))[None]
        student, teacher = (log_softmax(apply({"params": p}, padded).logits[0]) for p in (params, teachers["swe"]))
        for t in np.flatnonzero(record.sampled):
            p, q = student[t - 1], teacher[t - 1]
            want += {
                "reverse_kl": (np.exp(p) * (p - q)).sum(),
                "forward_kl": (np.exp(q) * (q - p)).sum(),
                "rejection_sft": -p[record.tokens[t]],
            }[name]
            same += p.argmax() == (record.tokens[t] if name == "rejection_sft" else q.argmax())
            count += 1
    assert rows["weights"].sum() == count and count > 4
    assert float(value) == pytest.approx(want, rel=1e-4)
    assert float(sums["agreement"]) == same


def test_one_student_takes_on_both_teachers(engine, params, teachers) -> None:
    distiller = make_distiller(engine, teachers)
    state, curve = distiller.trainer.create(jax.tree.map(jnp.copy, params)), []
    for update in range(25):
        work = distiller.next(update, state)
        state, metrics = distiller.trainer.step(state, *work.batches, tuple(teachers.values()))
        curve.append({**work.metrics, **jax.device_get(metrics)})
    for domain in ("swe", "single_turn"):
        assert np.mean([m[f"loss/{domain}"] for m in curve[-3:]]) < 0.6 * curve[0][f"loss/{domain}"]
    assert 4 <= curve[0]["episodes"] <= 8 and distiller.trainer.step._cache_size() == 1


def test_rejection_learns_from_solved_episodes_of_the_teachers_alone(engine, params, teachers) -> None:
    distiller = make_distiller(engine, teachers, "rejection_sft")
    acted, act = [], distiller._rollout

    def watched(weights, prompts, *rest):
        acted.append((weights, prompts, act(weights, prompts, *rest)))
        return acted[-1][2]

    distiller._rollout = watched
    work = distiller.next(0, distiller.trainer.create(jax.tree.map(jnp.copy, params)))
    assert [weights is teachers[d] for (weights, *_), d in zip(acted, teachers, strict=True)] == [True, True]
    assert all(prompt[0] == opening for (_, prompts, _), opening in zip(acted, (2, 3)) for prompt in prompts)
    kept = [[r for r in records if r.outcome.solved and not r.outcome.infrastructure] for _, _, records in acted]
    assert 0 < sum(map(len, kept)) < 8
    (batch,) = work.batches
    live = np.asarray(batch["weights"].sum((1, 2)) > 0)
    for section, (name, episodes_of) in enumerate(zip(teachers, kept, strict=True)):
        own = live & (np.asarray(batch["section"]) == section)
        assert batch["weights"][own].sum() == sum(record.sampled.sum() for record in episodes_of)
        assert batch["segment_ids"][own].max(2).sum() == len(episodes_of)
        assert (name in work.absent) == (not episodes_of)


def test_prompts_are_dealt_out() -> None:
    assert deal(16, ["swe", "single_turn", "tool_format"]) == {"swe": 6, "single_turn": 5, "tool_format": 5}
    assert deal(2, ["a", "b", "c"]) == {"a": 1, "b": 1, "c": 0}
