"""Stage `distill`: the experts back into the SFT model, which becomes the one model that does everything.

Every update mixes all domains; each episode is graded by the expert of its own domain. Three losses, all averaged
over sampled tokens:

  reverse_kl     KL(student || expert) over the whole vocabulary at each token of the student's own episodes
                 (on-policy distillation; Agarwal et al. 2024, Gu et al. 2024)
  forward_kl     KL(expert || student) on the expert's episodes
  rejection_sft  cross entropy on those episodes of the expert that execution says are solved

The report does not say which loss it used; the first is the default because it needs the student to be right only
where the student goes. Divergences are of the models' own distributions, whatever temperature, top_p and top_k the
episodes were drawn with: these choose where student and expert are compared, and no gradient goes through that choice
(Agarwal et al. 2024, section 3).
"""

import dataclasses
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcn_jax.config import DistillConfig, ModelConfig, RunConfig
from qcn_jax.inference.engine import Engine
from qcn_jax.model import Qwen3Next, head_kernel
from qcn_jax.pipeline import models
from qcn_jax.pipeline.context import StageContext
from qcn_jax.pipeline.experts import experts_of
from qcn_jax.pipeline.rl import episodes, objectives
from qcn_jax.pipeline.rl.records import Conversation, RolloutRecord, Stop, Stopped, never, sequence_seed
from qcn_jax.pipeline.rl.rollout import rollout
from qcn_jax.pipeline.stages.experts import training_prompts
from qcn_jax.pipeline.train import layout
from qcn_jax.pipeline.train.head import over_vocabulary, project
from qcn_jax.pipeline.train.loop import Work
from qcn_jax.pipeline.train.losses import next_tokens, predicted
from qcn_jax.pipeline.train.metrics import read_metrics
from qcn_jax.pipeline.train.step import BatchShape, LossFn, TrainState
from qcn_jax.pipeline.train.trainer import Trainer, mesh_here
from qcn_jax.sharding.parallel import Parallel

LOSSES = ("reverse_kl", "forward_kl", "rejection_sft")


def distill_loss(model: ModelConfig, name: str, parallel: Parallel | None = None) -> LossFn:
    """The loss called `name`, a mean over tokens: (student, batch, teacher) -> (loss, {"agreement": mean}).

    `agreement` is the share of tokens at which both would choose the same. `rejection_sft` takes no teacher.
    """
    network = Qwen3Next(model, parallel=parallel)
    divergence = {"reverse_kl": objectives.reverse_kl, "forward_kl": objectives.forward_kl}.get(name)

    def hidden_of(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return network.apply(
            {"params": params}, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"],
            with_logits=False,
        ).hidden  # fmt: skip

    def compared(kernels: tuple[jax.Array, ...], h: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        ours, theirs = project(h, kernels[0]), project(g, kernels[1])
        same = jnp.argmax(ours, axis=-1) == jnp.argmax(theirs, axis=-1)
        return divergence(ours, theirs), same.astype(jnp.float32)

    def loss(student: Any, batch: dict[str, jax.Array], teacher: Any = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        weights = batch["weights"] / batch["weight_sum"]
        hidden, kernel = hidden_of(student, batch), head_kernel(model, student)
        if divergence is None:
            targets = next_tokens(batch["tokens"])
            losses, agreement = over_vocabulary(predicted, (kernel,), hidden, targets, parallel=parallel)
        else:
            taught = jax.lax.stop_gradient((head_kernel(model, teacher), hidden_of(teacher, batch)))
            losses, agreement = over_vocabulary(compared, (kernel, taught[0]), hidden, taught[1], parallel=parallel)
        return jnp.sum(weights * losses), {"agreement": jnp.sum(weights * agreement)}

    return loss


def make_trainer(config: RunConfig, parallel: Parallel | None, names: Sequence[str] = ()) -> Trainer:
    """Builds the step of the stage on `parallel`: a slice's teacher is that of its domain.

    `names` are the domains; by default those of all experts that the configuration names.

    Raises:
      UserError: rows that the mesh does not divide.
    """
    settings = config.distill
    names = names or tuple(expert.name for expert in experts_of(config.experts.names))
    slices = sum(-(-count * settings.group_size // settings.rows) for count in deal(settings.prompts, names).values())
    shape = BatchShape(slices, settings.rows, settings.sequence_length, sections=names, padded=True)
    return Trainer.build(config.model, distill_loss(config.model, settings.loss, parallel), settings.optimizer,
                         settings.updates, shape, parallel, field="distill",
                         frozen=0 if settings.loss == "rejection_sft" else len(names))


@dataclasses.dataclass
class Distiller:
    """The feed of the student's updates; see train.loop.

    Attributes:
      config: the stage's configuration.
      seed: everything random follows from it and the update's number.
      engine: generates, with the student's or a teacher's parameters.
      trainer: see `make_trainer`; its sections are the domains.
      teachers: parameters by domain, in the order of the sections.
      prompts: prompts by domain, in the same order.
      converse: prompt -> a fresh conversation.
    """

    config: DistillConfig
    seed: int
    engine: Engine
    trainer: Trainer
    teachers: Mapping[str, Any]
    prompts: Mapping[str, Sequence[Any]]
    converse: Callable[[Any], Conversation]
    stream = None  # what is learned from follows from the seed and the update's number

    def next(self, step: int, state: TrainState, stop: Stop = never) -> Work | None:
        """Episodes of all domains; see train.loop.Feed. Where none qualifies, there is nothing to learn from."""
        began = time.perf_counter()
        try:
            records = self._act(step, state.params, stop)
        except Stopped:
            return None
        everything = [record for found in records.values() for record in found]
        metrics = _shares(everything) | {"seconds_rollout": time.perf_counter() - began}
        rows = {name: self._rows(found) for name, found in records.items() if self._learned(found)}
        if not rows:
            return Work([], 0, metrics | {"loss": 0.0, "agreement": 0.0})
        names = self.trainer.shape.sections
        arrays = {key: np.concatenate([part[key] for part in rows.values()]) for key in next(iter(rows.values()))}
        sections = [names.index(name) for name, part in rows.items()
                    for _ in range(len(part["tokens"]) // self.config.rows)]
        return Work([self.trainer.place(arrays, sections)], arrays["tokens"].size, metrics,
                    absent=frozenset(names) - frozenset(rows))

    def _learned(self, records: Sequence[RolloutRecord]) -> list[RolloutRecord]:
        """Those episodes of a domain that are learned from; empty where they hold no token to learn."""
        if self.config.loss == "rejection_sft":
            records = [record for record in records if record.outcome.solved]
        return list(records) if any(record.sampled.any() for record in records) else []

    def _rows(self, records: Sequence[RolloutRecord]) -> dict[str, np.ndarray]:
        documents = [episodes.document(record) for record in self._learned(records)]
        return episodes.pack_rows(documents, self.config.sequence_length, self.config.rows)

    def _act(self, update: int, student: Any, stop: Stop) -> dict[str, list[RolloutRecord]]:
        """Episodes by domain: the student's, all at once, or each teacher's on its own prompts."""
        chosen = {
            domain: episodes.choose(self.prompts[domain], count, update, self.seed + index)
            for index, (domain, count) in enumerate(deal(self.config.prompts, list(self.teachers)).items()) if count
        }  # fmt: skip
        if self.config.loss == "reverse_kl":
            order = [(domain, prompt) for domain, prompts in chosen.items() for prompt in prompts]
            records = self._rollout(student, [prompt for _, prompt in order], update, 0, stop)
            found: dict[str, list[RolloutRecord]] = {domain: [] for domain in chosen}
            for record in records:
                if not record.outcome.infrastructure:
                    found[order[record.prompt][0]].append(record)
            return found
        return {
            domain: [
                record for record in self._rollout(self.teachers[domain], prompts, update, index, stop)
                if not record.outcome.infrastructure
            ] for index, (domain, prompts) in enumerate(chosen.items())
        }  # fmt: skip

    def _rollout(
        self, params: Any, prompts: Sequence[Any], update: int, stream: int, stop: Stop = never
    ) -> list[RolloutRecord]:
        self.engine.params = params
        samples = range(self.config.group_size)
        groups = [[self.converse(prompt) for _ in samples] for prompt in prompts]
        seeds = [[sequence_seed(self.seed, update, stream, g, i) for i in samples] for g in range(len(prompts))]
        return rollout(self.engine, groups, seeds, sampling=episodes.sampling_of(self.config.rollout), stop=stop)


def deal(count: int, names: Sequence[str]) -> dict[str, int]:
    """`count` prompts dealt out to domains, the first ones getting what is left over."""
    share, rest = divmod(count, len(names))
    return {name: share + (index < rest) for index, name in enumerate(names)}


def _shares(records: Sequence[RolloutRecord]) -> dict[str, float]:
    mean = lambda values: sum(values) / max(1, len(values))
    return {
        "episodes": float(len(records)),
        "turns": mean([len(record.turns) for record in records]),
        "malformed": mean([float(turn.malformed) for record in records for turn in record.turns]),
        "sampled_tokens": mean([float(record.sampled.sum()) for record in records]),
    }


def run_stage(context: StageContext) -> dict[str, Any]:
    """Distils every expert of the run into the model that they began from and writes the unified model.

    Returns:
      {"first", "last"}: metrics of the first and last updates; "mesh".
    """
    config = context.config.distill
    context.result("experts")
    parallel = mesh_here(context.config.mesh)
    start, experts = context.start("distill"), context.experts()
    trainer = make_trainer(context.config, parallel, [expert.name for expert in experts])
    services, encoder = context.services(), context.encoder()
    _, params = models.load(context, start, parallel)
    teachers = {expert.name: models.load(context, expert.model, parallel)[1] for expert in experts}
    graded = config.loss == "rejection_sft"  # nothing else here asks whether an episode was right
    feed = Distiller(
        config=config, seed=sequence_seed(context.config.seed, zlib.crc32(b"distill")),
        engine=episodes.make_engine(trainer.model, params, encoder, config.rollout, config.sequence_length,
                                    parallel),
        trainer=trainer, teachers=teachers,
        prompts={expert.name: training_prompts(context, expert, "distill") for expert in experts},
        converse=lambda prompt: prompt.expert.conversation(
            prompt, encoder, services, max_turns=config.rollout.max_turns, graded=graded
        ),
    )  # fmt: skip
    episodes.say_where(parallel, context.log)
    result = trainer.run(context.workdir, layout.copied(params), feed, config.updates, config,
                         log=context.log, line=_line, frozen=tuple(teachers.values())[: trainer.frozen])
    models.save(context, start, context.model_path("unified"), trainer.model, result.state.params)
    rows = read_metrics(context.workdir / "metrics.jsonl")
    first, last = rows[0], rows[-1]
    line = f"{config.loss} {first['loss']:.4g} to {last['loss']:.4g}, same choice at {last['agreement']:.1%} of tokens"
    return {"first": first, "last": last, "mesh": layout.mesh_of(result.state), "line": line}


def _line(metrics: dict[str, Any]) -> str:
    return f"loss {metrics['loss']:.4g}  agreement {metrics['agreement']:.1%}  turns {metrics['turns']:.1f}"
