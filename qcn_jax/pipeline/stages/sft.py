"""Stage `sft`: imitation of conversations, with loss on the assistant's own tokens.

They are read from files, or made of the run's tasks and verified by execution (data.trajectories); those are of the
imitation side of data.splits, so that reinforcement learning meets none of them. Each is tokenised once, by the first
process, into a store in the stage's folder that every process reads from.
"""

import dataclasses
import functools
import itertools
import pathlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from qcn_jax import files
from qcn_jax.chat.encoder import Encoder
from qcn_jax.config import ChatSource, RunConfig, TrainConfig
from qcn_jax.config_phases import chats_of, source_field
from qcn_jax.errors import UserError
from qcn_jax.pipeline import models
from qcn_jax.pipeline.context import StageContext
from qcn_jax.pipeline.data import loader
from qcn_jax.pipeline.data.readers import CHATS, Conversation
from qcn_jax.pipeline.data.texts import Findings
from qcn_jax.pipeline.train import fit
from qcn_jax.pipeline.train.signals import interrupted, stop_signals
from qcn_jax.pipeline.train.trainer import Trainer, mesh_here
from qcn_jax.sharding import distributed
from qcn_jax.sharding.parallel import Parallel

DOCUMENTS, SUMMARY = "data", "summary.json"  # in the stage's folder: what is learned from, for all processes alike
CONTROL_SEED = 1_000_003  # the control sees the same documents in another order


def make_trainer(config: RunConfig, parallel: Parallel | None) -> Trainer:
    """Builds the step of the stage on `parallel`.

    Raises:
      UserError: rows that `accumulate` or the mesh does not divide.
    """
    return fit.make_trainer(config.model, config.sft.train, parallel, "sft.train")


def run_stage(context: StageContext) -> dict[str, Any]:
    """Reads or makes conversations, trains the mid-trained or the initial model on them, writes sft/model/."""
    with distributed.first_before_others("conversations"):  # the first process has the sandboxes, the others read
        if distributed.is_first() and not (context.workdir / DOCUMENTS / SUMMARY).exists():
            write_documents(context)
        sources, summary = _sources(context), files.read_json(context.workdir / DOCUMENTS / SUMMARY)
    results = imitate(context, sources, context.config.sft.train, context.workdir, context.start("sft"), "sft",
                      context.config.seed)
    ending = f"loss {results['loss']:.3f}" if "loss" in results else "no steps"
    line = (f"{summary['conversations']} conversations, {results['steps']} steps, {ending}, padding "
            f"{results['packing']['padding']:.2f} %")
    return results | summary | {"line": line}


def write_documents(context: StageContext) -> None:
    """Reads the conversations of every source that has a share and writes them, tokenised, a store a source.

    A summary is written last, and marks them complete.

    Raises:
      Interrupted: a signal came; what was solved is in the journal.
      UserError: nothing of a source is left; see also the readers.
    """
    began, summaries, labels = time.monotonic(), {}, Counter[str]()
    tokens = loss_tokens = 0
    encoder = context.encoder()
    with stop_signals() as stop:
        for name, source in used(context.config).items():
            field = source_field(context.config, "sft", name)
            findings = Findings(context.config.sft.malformed, "--config.sft.malformed")
            reader = CHATS.resolve(source.kind, f"{field}.kind")
            read = reader.read(context, source, findings, stop.is_set)
            length, counts = context.config.sft.train.sequence_length, Counter[str]()
            documents = encoded(read, encoder, longest(context.config), findings, counts)
            first = next(documents, None)
            if stop.is_set():
                raise interrupted(stop.number, "while conversations were read", context.log)
            if first is None:
                raise UserError(f"{field}: no conversation is left for rows of --config.sft.train.sequence_length="
                                f"{length} ({findings.line()})")
            store = loader.TokenStore.write(context.workdir / DOCUMENTS / name, itertools.chain([first], documents))
            if stop.is_set():
                raise interrupted(stop.number, "while conversations were read", context.log)
            context.log(f"{name}: {findings.line()}, {store.tokens:,} tokens")
            summaries[name] = findings.summary()
            labels.update(counts)
            tokens, loss_tokens = tokens + store.tokens, loss_tokens + store.total("weights")
    files.write_json(context.workdir / DOCUMENTS / SUMMARY, {
        "conversations": sum(summary["kept"] for summary in summaries.values()), "sources": summaries,
        "labels": dict(labels), "document_tokens": tokens, "loss_tokens": loss_tokens,
        "collecting_seconds": round(time.monotonic() - began, 1)})


def longest(config: RunConfig) -> int | None:
    """Tokens of the longest conversation that is kept; None where longer ones than a row are cut."""
    return config.sft.train.sequence_length if config.sft.overlong == "drop" else None


def used(config: RunConfig) -> dict[str, ChatSource]:
    """The sources that have a share, by name."""
    return {name: source for name, source in chats_of(config.sft).items() if source.share > 0}


def _sources(context: StageContext) -> list[loader.Source]:
    """What the stage learns from, as `write_documents` left it."""
    folder = context.root / "sft" / DOCUMENTS
    return [loader.Source(name, loader.TokenStore(folder / name), source.share)
            for name, source in used(context.config).items()]


def train_control(context: StageContext, steps: int, directory: pathlib.Path) -> dict[str, Any]:
    """Continues from sft/model for `steps` steps on the same trajectories, with the same schedule begun anew.

    Args:
      context: of a later stage; stage sft has finished.
      directory: gets checkpoints, metrics.jsonl and model/.
    Returns:
      fit's results and `seconds`, of steps alone.
    """
    results = imitate(context, _sources(context), dataclasses.replace(context.config.sft.train, steps=steps), directory,
                      "sft", "sft_control", context.seed + CONTROL_SEED)
    return results | {"seconds": results["seconds_per_step"] * steps}


def encoded(conversations: Iterable[Conversation], encoder: Encoder, length: int | None, findings: Findings,
            labels: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yields documents for packing: tokens, loss weights, and the tokens of the `head`, the system turn with the tools.

    Args:
      conversations: what cannot be encoded of them is malformed.
      length: longer ones are left out; None keeps all.
      labels: counts those of what is kept.
    """
    for conversation in conversations:
        try:
            document = encoder.encode(conversation.messages, conversation.tools)
        except UserError as error:
            findings.row(conversation.place, str(error))
            continue
        if length is not None and len(document["tokens"]) > length:
            findings.without(f"over {length} tokens")
            continue
        findings.kept += 1
        labels.update(conversation.labels)
        ends = np.flatnonzero(document["tokens"] == encoder.end)
        has_head = (conversation.tools or conversation.messages[0]["role"] == "system") and len(ends)
        yield document | {"head": ends[0] + 1 if has_head else 0}


def imitate(context: StageContext, sources: list[loader.Source], train: TrainConfig, directory: pathlib.Path,
            start: str, out: str, seed: int) -> dict[str, Any]:
    """Trains the model `start` on stored conversations and saves it as `out`, both as models.load calls them.

    Args:
      context: of a stage.
      sources: what is learned from.
      train: how long, and in which rows.
      directory: gets checkpoints and metrics.jsonl.
      start, out: names of models.
      seed: of the order.

    Returns:
      fit's results.
    """
    config = context.config
    trainer = fit.make_trainer(config.model, train, mesh_here(config.mesh), "sft.train")
    batches = lambda: loader.batches(sources, rows=train.rows, length=train.sequence_length, seed=seed,
                                     method=config.sft.packing, overlong=config.sft.overlong)
    return fit.fit(directory, [fit.Phase(trainer, batches, train, 0, train.steps)],
                   lambda parallel: models.load(context, start, parallel)[1],
                   save=functools.partial(models.save, context, start, context.model_path(out)), log=context.log)
