"""Claim: which corrections keep asynchronous updates of a small mixture-of-experts policy stable, and how stale is too stale.

    python benchmarks/staleness_grid.py --out=benchmarks/results/staleness_grid
    python benchmarks/staleness_grid.py --out=DIR --staleness=16 --seeds=10

A policy of two layers and eight experts, from random weights, plays a game of four tokens: it earns the share of them
that are, modulo four, what the prompt and the place ask for (chance earns a quarter, the optimum one). The loop is the
package's own (pipeline.rl.learner), with an environment whose verdicts come exactly `staleness` updates after the
episode was opened, so that every update but the first few learns from tokens that are as old as allowed. Cells:

  staleness    0, 1, 4, 16 updates
  correction   none: the policy gradient as if the tokens were new; truncated: importance weights up to 2;
               masked: PPO's clip, and tokens whose ratio is outside of 0.5 to 2 left out
  routing      free, or replay: tokens are learned from through the experts that they went to

One JSON a cell and seed, and a table; cells that are there are not run again. A cell has collapsed where the mean reward
of its last tenth is 0.2 or more below the best tenth on the way, or a number was not finite.
"""

import dataclasses
import json
import pathlib
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from qcn_jax import files
from qcn_jax.config import ExpertsConfig, ModelConfig, OptimizerConfig, RolloutConfig
from qcn_jax.errors import UserError
from qcn_jax.inference.engine import Engine
from qcn_jax.model import Qwen3Next
from qcn_jax.pipeline.rl.learner import Learner
from qcn_jax.pipeline.rl.policy import make_trainer
from qcn_jax.pipeline.rl.records import Outcome, Reply
from qcn_jax.pipeline.train.fingerprint import fingerprint

OUT = flags.DEFINE_string("out", None, "Folder for results.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 3, "Of each cell.")
STALENESS = flags.DEFINE_list("staleness", ["0", "1", "4", "16"], "Updates.")
UPDATES = flags.DEFINE_integer("updates", 120, "Of a cell.")
CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {"objective": "cispo", "clip_low": 0.0, "clip_high": 0.0},  # its weights are clipped to one
    "truncated": {"objective": "reinforce", "ratio_cap": 2.0},
    "masked": {"objective": "clipped", "ratio_bounds": (0.5, 2.0)},
}
ROUTINGS = ("free", "replay")
EVERY = 6  # updates between two that a result's curve holds
PROMPTS, GROUP, TOKENS, ANSWERS, STOP = 4, 8, 4, 4, 1
MODEL = ModelConfig(
    vocab_size=16, hidden_size=32, num_hidden_layers=2, full_attention_interval=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64, linear_num_key_heads=2, linear_key_head_dim=8,
    linear_num_value_heads=4, linear_value_head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, initializer_range=0.1, dtype="float32", chunk_size=8,
)  # fmt: skip


class Gate:
    """Lets verdicts through once the update that they are for has begun."""

    def __init__(self) -> None:
        self._changed, self.update = threading.Condition(), -1

    def open(self, update: int) -> None:
        """The update behind `update` others begins."""
        with self._changed:
            self.update = update
            self._changed.notify_all()

    def wait(self, update: int) -> None:
        """Returns when it has begun, or every update has."""
        with self._changed:
            self._changed.wait_for(lambda: self.update >= update)


@dataclasses.dataclass
class Game:
    """One turn of tokens after a prompt; see the module's text."""

    prompt: int
    gate: Gate
    update: int
    share: float = 0.0

    def opening(self) -> list[int]:
        """The prompt's token."""
        return [2, 4 + self.prompt]

    def reply(self, tokens: list[int], stopped: bool) -> Reply:
        """Ends the episode."""
        wanted = (self.prompt + np.arange(TOKENS)) % ANSWERS
        said = np.full(TOKENS, -1)
        said[: len(tokens)] = np.asarray(tokens[:TOKENS]) % ANSWERS
        self.share = float(np.mean(said == wanted))
        return Reply(done=True)

    def outcome(self, truncated: bool) -> Outcome:
        """The share of right tokens, when it is time."""
        self.gate.wait(self.update)
        return Outcome(self.share, self.share == 1.0, finished=True)

    def close(self) -> None:
        """Nothing is held."""


class Delayed(Learner):
    """The learner, whose groups are finished in the update of their number and not before."""

    gate: Gate

    def next(self, step, state, stop=lambda: False):
        """See Learner."""
        self.gate.open(step)
        return super().next(step, state, stop)

    def _group(self, number):
        group = super()._group(number)
        update, prompt = number // PROMPTS, number % PROMPTS
        return dataclasses.replace(group, open=lambda sample: Game(prompt, self.gate, update))


def settings(staleness: int, correction: str, routing: str) -> ExpertsConfig:
    """The configuration of a cell."""
    return ExpertsConfig(
        updates=UPDATES.value, prompts=PROMPTS, group_size=GROUP, rows=32, sequence_length=16, max_staleness=staleness,
        burst=TOKENS, routing=routing, optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=0, weight_decay=0.0),
        rollout=RolloutConfig(slots=(staleness + 1) * PROMPTS * GROUP, max_length=16, max_new_tokens=TOKENS),
        **CORRECTIONS[correction])


def play(engine: Engine, trainer: Any, config: ExpertsConfig, seed: int) -> dict[str, Any]:
    """One cell of one seed: its curve."""
    params = jax.jit(Qwen3Next(MODEL).init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]
    learner = Delayed(config, seed, engine, trainer, prompts=list(range(PROMPTS)), converse=lambda prompt: None)
    learner.gate = Gate()
    engine.reset(range(engine.slots))
    state, curve, began = trainer.create(params), [], time.perf_counter()
    for update in range(config.updates):
        work, found = learner.next(update, state), {}
        for batch in work.batches:
            state, found = trainer.step(state, batch)
        row = work.metrics | {name: float(value) for name, value in found.items()}
        curve.append({name: row.get(name) for name in (
            "reward", "staleness", "kl_old", "entropy", "clipped", "masked", "rerouted", "grad_norm", "finite")})
    learner.gate.open(10**9)
    learner.close()
    return {"seconds": round(time.perf_counter() - began, 1), "weights": fingerprint(state.params), "curve": curve}


def judged(curve: list[dict[str, Any]]) -> dict[str, Any]:
    """Reward in the end and at best, and whether the cell collapsed."""
    rewards = np.asarray([row["reward"] for row in curve])
    tenth = max(1, len(rewards) // 10)
    means = np.convolve(rewards, np.ones(tenth) / tenth, "valid")
    broken = any(row["finite"] == 0.0 for row in curve)
    return {"last": round(float(means[-1]), 4), "best": round(float(means.max()), 4),
            "collapsed": bool(broken or means[-1] < means.max() - 0.2)}


def main(argv: list[str]) -> None:
    """Plays what is missing, prints the table."""
    out, rows = pathlib.Path(OUT.value), []
    files.check_folder(out, "out")
    for staleness in map(int, STALENESS.value):
        engine = None
        for correction in CORRECTIONS:
            for routing in ROUTINGS:
                config, trainer, results = settings(staleness, correction, routing), None, []
                for seed in range(SEEDS.value):
                    path = out / f"{staleness}_{correction}_{routing}_{seed}.json"
                    if not path.exists():
                        if engine is None:
                            params = jax.jit(Qwen3Next(MODEL).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
                            engine = Engine(MODEL, params["params"], slots=config.rollout.slots, max_length=16,
                                            max_new_tokens=TOKENS, stop_ids=(STOP,), prefill_rows=32, prefill_chunk=4,
                                            with_routes=True)
                        trainer = trainer or make_trainer(MODEL, config, None)
                        found = play(engine, trainer, config, seed)
                        found |= judged(found["curve"]) | {"curve": found["curve"][::EVERY], "curve_every": EVERY}
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_text(json.dumps({"staleness": staleness, "correction": correction,
                                                    "routing": routing, "seed": seed, **found}) + "\n")
                    results.append(files.read_json(path))
                line = [staleness, correction, routing, *(f"{row['last']:.2f}" for row in results),
                        f"{sum(row['collapsed'] for row in results)} of {len(results)}"]
                rows.append(line)
                print(json.dumps(line), flush=True)
    print(f"\n| staleness | correction | routing | {' | '.join(f'seed {n}' for n in range(SEEDS.value))} | collapsed |")
    print("|" + "---|" * (4 + SEEDS.value))
    for line in rows:
        print(f"| {' | '.join(map(str, line))} |")


def _run(argv: list[str]) -> None:
    try:
        main(argv)
    except UserError as error:
        raise SystemExit(f"staleness_grid: {error}") from error


if __name__ == "__main__":
    app.run(_run)
