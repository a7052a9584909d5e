"""Stage `experts`: group-relative policy optimisation from execution rewards, one sub-run per expert."""

import contextlib
import dataclasses
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

from qcn_jax import files
from qcn_jax.agents.services import Services
from qcn_jax.chat.encoder import Encoder
from qcn_jax.config import RunConfig
from qcn_jax.errors import UserError
from qcn_jax.inference.engine import Engine
from qcn_jax.pipeline import models
from qcn_jax.pipeline.context import StageContext
from qcn_jax.pipeline.data.splits import split_tasks
from qcn_jax.pipeline.experts import reward_of
from qcn_jax.pipeline.experts.expert import Expert, Prompt
from qcn_jax.pipeline.names import needs_sandbox
from qcn_jax.pipeline.rl import episodes, policy, settings
from qcn_jax.pipeline.rl.learner import Learner
from qcn_jax.pipeline.rl.records import sequence_seed
from qcn_jax.pipeline.stages import rejection
from qcn_jax.pipeline.train import layout
from qcn_jax.pipeline.train.fingerprint import fingerprint
from qcn_jax.pipeline.train.metrics import read_metrics
from qcn_jax.pipeline.train.trainer import Trainer, mesh_here
from qcn_jax.sharding import distributed
from qcn_jax.sharding.parallel import Parallel


def make_trainer(config: RunConfig, parallel: Parallel | None) -> Trainer:
    """Builds the step of the stage on `parallel`.

    Raises:
      UserError: rows that the mesh does not divide.
    """
    return policy.make_trainer(config.model, config.experts, parallel)


def run_stage(context: StageContext) -> dict[str, Any]:
    """Trains every expert of `config.experts.names` from the SFT model, or from what there is instead of one.

    Returns:
      {"experts": {name: {"seconds", "prompts", "first", "last", "mesh"}}} with the metrics of the first and last
      updates, "start" (the model that they begin from) and "mesh".
    """
    config = settings.settled(context.config.experts, context.config.model)
    experts = context.experts()
    parallel = mesh_here(context.config.mesh)
    trainer = make_trainer(context.config, parallel)
    start = context.start("experts")
    services, encoder = context.services(), context.encoder()
    _, params = models.load(context, start, parallel)
    engine = episodes.make_engine(trainer.model, params, encoder, config.rollout, config.sequence_length,
                                  parallel, with_routes=config.routing in settings.ACTED)
    episodes.say_where(parallel, context.log)
    results = {}
    for expert in experts:
        done = context.workdir / expert.name / "DONE.json"
        if not done.exists():
            distributed.write_json(done, _train_expert(context, expert, start, params, engine, trainer, encoder,
                                                       services))
        results[expert.name] = files.read_json(done)
    line = ", ".join(f"{n} {r['first']['pass_rate']:.0%} to {r['last']['pass_rate']:.0%}" for n, r in results.items())
    return {"experts": results, "start": start, "mesh": results[experts[-1].name]["mesh"], "line": f"pass rate {line}"}


def _train_expert(context: StageContext, expert: Expert, start: str, params: Any, engine: Engine, trainer: Trainer,
                  encoder: Encoder, services: Services) -> dict[str, Any]:
    config, directory, reward = context.config.experts, context.workdir / expert.name, reward_of(context.config)
    log = lambda line: context.log(f"{expert.name}: {line}")
    prompts = training_prompts(context, expert, "experts")
    if not prompts:
        raise UserError(f"--config.experts.names: {expert.name!r} has no training task; pages are expert web's, and "
                        "other tasks are not")
    if all(prompt.scaffold.single_turn for prompt in prompts):  # taken greedily, the only turn would teach nothing
        config = dataclasses.replace(config, greedy_turns=())
    feed = Learner(
        config=config, seed=sequence_seed(context.seed, zlib.crc32(expert.name.encode())), engine=engine,
        trainer=trainer, prompts=prompts,
        converse=lambda prompt: expert.conversation(
            prompt, encoder, services, max_turns=config.rollout.max_turns,
            unfinished_penalty=config.unfinished_penalty, reward=reward, redraws=config.redraws,
        ),
        journal=directory / "journal" / str(distributed.place()[0]), log=log,
    )  # fmt: skip
    if config.filter_samples:
        feed.prompts = _filtered(feed, params, directory / "prompts.json", log)
    survived = None
    if expert.rejection[0]:
        survived = rejection.imitate_survivors(context, expert, start, engine, params, feed.prompts, feed.converse, log)
        if survived is not None:
            _, params = models.load(context, rejection.model_name(expert), trainer.parallel)
    frozen = (trainer.place_params(params),) * trainer.frozen
    with contextlib.closing(feed):
        result = trainer.run(directory, layout.copied(params), feed, config.updates, config, log=log, line=_line,
                             frozen=frozen)
    models.save(context, start, directory / "model", trainer.model, result.state.params)
    rows = read_metrics(directory / "metrics.jsonl")
    return {
        "seconds": round(sum(max(row["seconds_per_step"], row["seconds_rollout"]) for row in rows), 2),
        "prompts": len(feed.prompts), "first": rows[0], "last": rows[-1], "mesh": layout.mesh_of(result.state),
        "weights": fingerprint(result.state.params), **({"rejection": survived} if survived else {}),
    }  # fmt: skip


def _filtered(feed: Learner, params: Any, path: pathlib.Path, log: Callable[[str], None]) -> list[Any]:
    """The prompts on which the SFT model's tries earn more and less; written down, so that a resumed run keeps them."""
    if not path.exists():
        kept = feed.useful(params, feed.config.filter_samples, _every_tenth(log))
        distributed.write_json(path, {"of": len(feed.prompts), "kept": kept})
    kept = files.read_json(path)["kept"]
    log(f"{len(kept)} of {len(feed.prompts)} prompts tell tries apart")
    return [feed.prompts[index] for index in kept]


def _every_tenth(log: Callable[[str], None]) -> Callable[[int, int], None]:
    """A progress callback that logs each time another tenth of the episodes has ended."""
    shown = 0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if done * 10 // max(total, 1) > shown:
            shown = done * 10 // max(total, 1)
            log(f"prompt filter: {done} of {total} episodes")

    return progress


def training_prompts(context: StageContext, expert: Expert, stage: str) -> list[Prompt]:
    """Prompts of `stage`, experts or distill: the training tasks, without those that SFT has seen."""
    tasks = context.tasks("train")
    if needs_sandbox(context.config, "sft"):  # it imitates solutions of half of them
        _, tasks = split_tasks(tasks, context.config.seed)
    return expert.prompts(tasks, context.scaffold(stage), context.templates())


def _line(metrics: dict[str, Any]) -> str:
    return (
        f"reward {metrics['reward']:.2f}  solved {metrics['pass_rate']:.0%}  turns {metrics['turns']:.1f}  "
        f"malformed {metrics['malformed']:.0%}  repeated {metrics['repeated']:.0%}  groups {metrics['groups']:.0f}"
    )
