"""Stage `distill`: the experts back into the SFT model, which becomes the one model that does everything.

Every update mixes all domains; each episode is judged by the expert of its own domain. Three losses, all averaged
over sampled tokens:

  reverse_kl     KL(student || expert) over the whole vocabulary at each token of the student's own episodes
                 (on-policy distillation; Agarwal et al. 2024, Gu et al. 2024)
  forward_kl     KL(expert || student) on the expert's episodes
  rejection_sft  cross entropy on those episodes of the expert that execution says are solved

The report does not say which loss it used; the first is the default because it needs the student to be right only
where the student goes.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qcn_jax import hub
from qcn_jax.config import DistillConfig, ModelConfig
from qcn_jax.inference.engine import Engine
from qcn_jax.model import Qwen3Next, head_kernel
from qcn_jax.pipeline.rl import objectives, online
from qcn_jax.pipeline.context import StageContext
from qcn_jax.chat.encoder import ChatEncoder
from qcn_jax.pipeline.experts.domains import TaskConversation, make_services
from qcn_jax.pipeline.train.head import over_vocabulary, project
from qcn_jax.pipeline.train.losses import predicted
from qcn_jax.pipeline.train.metrics import read_metrics
from qcn_jax.pipeline.train.optimizer import make_optimizer
from qcn_jax.pipeline.rl.learner import training_prompts
from qcn_jax.pipeline.rl.rollout import Conversation, RolloutRecord, Stop, never, rollout, sequence_seed
from qcn_jax.pipeline.train.loop import TrainState
from qcn_jax.pipeline.train.update import Part, SumLoss, Updater
from qcn_jax.sharding.parallel import Parallel

LOSSES = ("reverse_kl", "forward_kl", "rejection_sft")


def distill_loss(model: ModelConfig, name: str, parallel: Parallel | None = None) -> SumLoss:
    """The loss called `name`, summed over tokens: (student, batch, teacher) -> (sum, {"agreement": sum}).

    `agreement` counts tokens at which both would choose the same. `rejection_sft` has no use for the teacher.
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

    def loss(student: Any, batch: dict[str, jax.Array], teacher: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        weights, hidden, kernel = batch["weights"], hidden_of(student, batch), head_kernel(model, student)
        if divergence is None:
            targets = online.next_tokens(batch)
            losses, agreement = over_vocabulary(predicted, (kernel,), hidden, targets, parallel=parallel)
        else:
            taught = jax.lax.stop_gradient((head_kernel(model, teacher), hidden_of(teacher, batch)))
            losses, agreement = over_vocabulary(compared, (kernel, taught[0]), hidden, taught[1], parallel=parallel)
        return jnp.sum(weights * losses), {"agreement": jnp.sum(weights * agreement)}

    return loss


@dataclasses.dataclass
class Distiller:
    """Updates of the student.

    Attributes:
      config: the stage's configuration.
      seed: everything random follows from it and the update's number.
      engine: generates, with the student's or a teacher's parameters.
      updater: of `distill_loss`.
      teachers: parameters by domain.
      prompts: prompts by domain, in the same order.
      converse: prompt -> a fresh conversation.
    """

    config: DistillConfig
    seed: int
    engine: Engine
    updater: Updater
    teachers: Mapping[str, Any]
    prompts: Mapping[str, Sequence[Any]]
    converse: Callable[[Any], Conversation]

    def step(self, update: int, state: TrainState, stop: Stop = never) -> tuple[TrainState, dict[str, Any]]:
        """One update over all domains. Where no episode qualifies, the state stays as it is."""
        clock = online.Clock()
        records = self._act(update, state.params, stop)
        clock.lap("rollout")
        parts = []
        for domain, episodes in records.items():
            if self.config.loss == "rejection_sft":
                episodes = [record for record in episodes if record.outcome.solved]
            if any(record.sampled.any() for record in episodes):
                rows = online.pack_rows(
                    [online.document(record) for record in episodes], self.config.sequence_length, self.config.rows
                )
                parts.append(Part(rows, (self.teachers[domain],), domain))
        metrics: dict[str, float] = {"loss": 0.0, "agreement": 0.0}
        if parts:
            state, metrics = self.updater(state, *parts)
        clock.lap("update")
        everything = [record for episodes in records.values() for record in episodes]
        return state, metrics | _shares(everything) | clock.parts

    def _act(self, update: int, student: Any, stop: Stop) -> dict[str, list[RolloutRecord]]:
        """Episodes by domain: the student's, all at once, or each teacher's on its own prompts."""
        chosen = {
            domain: online.choose(self.prompts[domain], count, update, self.seed + index)
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
        return rollout(self.engine, groups, seeds, sampling=online.sampling_of(self.config.rollout), stop=stop)


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
    """Distils every expert of the run into the SFT model and writes the unified model.

    Returns:
      {"first", "last"}: metrics of the first and last updates.
    """
    config = context.config.distill
    context.result("experts")
    services, encoder = make_services(context), ChatEncoder(context.tokenizer())
    model, params = hub.load(context.model_path("sft"))
    domains = context.config.experts.names
    optimizer = make_optimizer(config.optimizer, config.updates)
    judged = config.loss == "rejection_sft"  # nothing else here asks whether an episode was right
    distiller = Distiller(
        config=config, seed=sequence_seed(context.config.seed, zlib.crc32(b"distill")),
        engine=online.make_engine(model, params, encoder.tokenizer, config.rollout, config.sequence_length),
        updater=Updater(distill_loss(model, config.loss), optimizer, config.rows),
        teachers={name: jax.tree.map(jnp.asarray, hub.load(context.model_path(f"expert_{name}"))[1])
                  for name in domains},
        prompts={name: training_prompts(context, name) for name in domains},
        converse=lambda prompt: TaskConversation(
            prompt, encoder, services, max_turns=config.rollout.max_turns, unfinished_penalty=0.0, judged=judged
        ),
    )  # fmt: skip
    state = online.run_updates(
        context.workdir, TrainState.create(jax.tree.map(jnp.array, params), optimizer), distiller.step,
        config.updates, log=context.log, line=_line, checkpoint_every=config.checkpoint_every,
    )  # fmt: skip
    hub.save(context.workdir / "model", model, jax.device_get(state.params))
    rows = read_metrics(context.workdir / "metrics.jsonl")
    first, last = rows[0], rows[-1]
    line = f"{config.loss} {first['loss']:.4f} to {last['loss']:.4f}, same choice at {last['agreement']:.1%} of tokens"
    return {"first": first, "last": last, "line": line}


def _line(metrics: dict[str, Any]) -> str:
    return f"loss {metrics['loss']:.4f}  agreement {metrics['agreement']:.1%}  turns {metrics['turns']:.1f}"
