"""Stage `midtrain`: from the initial model to one that knows code and edits.

The stream mixes the documents of `config.midtrain.sources` by share of tokens, packed into rows; the loss is
next-token, router balance and multi-token prediction. A source's texts are read and filtered once, by the first
process, into a store in the stage's folder that every process reads from; held-out repositories only serve to keep
copies of their code out of it.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import grain

from qcn_jax import hub
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import RunConfig, TextSource
from qcn_jax.config_phases import midtrain_phases, source_field, sources_of, used_sources
from qcn_jax.errors import UserError
from qcn_jax.pipeline import models
from qcn_jax.pipeline.context import StageContext
from qcn_jax.pipeline.data import filters, loader
from qcn_jax.pipeline.data.documents import FORMS, Request, repository
from qcn_jax.pipeline.data.readers import READERS
from qcn_jax.pipeline.data.texts import Findings, TextStore
from qcn_jax.pipeline.train import fit
from qcn_jax.pipeline.train.trainer import Trainer, mesh_here
from qcn_jax.sharding import distributed
from qcn_jax.sharding.parallel import Parallel

# Order fixes ids; Qwen's names first, then the tags of the native tool-call form.
ADDED_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<function=", "</function>", "<parameter=", "</parameter>")
TOKENIZER_SAMPLE_BYTES = 4_000_000  # of source text; more changes little in a vocabulary this small

PHASE_SEED = 104_729  # apart from the next, so that no phase sees the order of another


def make_trainer(config: RunConfig, parallel: Parallel | None) -> Trainer:
    """Builds the step of the stage on `parallel`.

    Raises:
      UserError: rows that `accumulate` or the mesh does not divide.
    """
    return fit.make_trainer(config.model, config.midtrain.train, parallel, "midtrain.train")


def run_stage(context: StageContext) -> dict[str, Any]:
    """Trains `config.midtrain`; writes tokenizer, init.json and model/ (see pipeline.context)."""
    phases = midtrain_phases(context.config)
    trainers = [make_trainer(config, mesh_here(config.mesh)) for _, config in phases]
    with distributed.first_before_others("midtrain's data"):  # what the first process writes, the others read
        stores = read_texts(context)
        tokenizer = prepare_tokenizer(context, stores)
        init = models.note_initial(context)
        sources = [make_sources(dataclasses.replace(context, config=config), stores, tokenizer, number)
                   for number, (_, config) in enumerate(phases)]
    firsts = [0, *(last for last, _ in phases)]
    results = fit.fit(
        context.workdir,
        [fit.Phase(trainer, functools.partial(_batches, config, mixture, number), config.midtrain.train, first, last)
         for number, (trainer, mixture, first, (last, config)) in enumerate(zip(trainers, sources, firsts, phases))],
        lambda parallel: models.initial(context.config, parallel)[1],
        save=functools.partial(models.save, context, "base", context.model_path("midtrain")), log=context.log)
    shares = {source.name: source.share for source in sources[-1]}
    ending = f"loss {results['loss']:.3f}" if "loss" in results else "no steps"
    return results | {
        "init": init, "shares": shares, "vocabulary": tokenizer.vocab_size,
        "sources": {name: store.summary for name, store in stores.items()},
        "line": f"{results['tokens']:,} tokens, {ending}, padding {results['packing']['padding']:.2f} %"}


def _batches(config: RunConfig, sources: list[loader.Source], phase: int) -> grain.DatasetIterator:
    train = config.midtrain.train
    return loader.batches(sources, rows=train.rows, length=train.sequence_length, seed=config.seed + PHASE_SEED * phase,
                          method=config.midtrain.packing, overlong=config.midtrain.overlong)


def read_texts(context: StageContext) -> dict[str, TextStore]:
    """The texts of every source that has a share in some phase; sources that read the same share one store.

    Raises:
      UserError: a source cannot be read, or nothing of it is left.
    """
    stores: dict[str, TextStore] = {}
    read: dict[str, TextStore] = {}
    for name in used_sources(context.config):
        source = sources_of(context.config.midtrain)[name]
        same = json.dumps(dataclasses.asdict(source) | {"form": "", "share": 0}, sort_keys=True)
        if same not in read:
            read[same] = _read(context, name, source)
        stores[name] = read[same]
    return stores


def _read(context: StageContext, name: str, source: TextSource) -> TextStore:
    folder = context.workdir / "data" / "texts" / name
    if not TextStore.exists(folder):
        field, findings = source_field(context.config, "midtrain", name), Findings(context.config.midtrain.malformed)
        texts = READERS.resolve(source.kind, f"{field}.kind").read(context, source, findings)
        kept = filters.filtered(texts, context.config.midtrain.filters, _heldout(context), findings)
        store = TextStore.write(folder, kept, findings.summary)
        context.log(f"{name}: {findings.line()}, {store.summary['characters'] / 1e6:.1f} MB")
    store = TextStore(folder)
    if not len(store):
        counts = ", ".join(f"{key}: {store.summary[key]}" for key in ("read", "left_out", "malformed"))
        field = source_field(context.config, "midtrain", name)
        raise UserError(f"{field}: no text is left ({counts})")
    return store


def _heldout(context: StageContext) -> Iterator[str]:
    """The texts of held-out repositories; none where the run has no tasks."""
    if (context.root / "tasks" / "DONE.json").exists():
        training = set(context.result("tasks")["repos_train"])
        for name, spec in sorted(context.repositories().items()):
            if name not in training:  # whatever is not for training is held out
                yield from (text for _, text in repository.repository_modules(spec))


def prepare_tokenizer(context: StageContext, stores: Mapping[str, TextStore]) -> Tokenizer:
    """The initial model's tokenizer, or one trained on the texts when `init` is random; kept for the run."""
    if context.tokenizer_path.exists():
        return context.tokenizer()
    context.tokenizer_path.parent.mkdir(parents=True, exist_ok=True)
    if context.config.init == "random":
        texts, size = [], 0
        for text in itertools.chain.from_iterable(_distinct(stores)):
            if size >= TOKENIZER_SAMPLE_BYTES:
                break
            texts.append(text.text)
            size += len(text.text)
        tokenizer = Tokenizer.train(texts, context.config.tokenizer.vocab_size, _added_tokens(context.config))
    else:
        tokenizer = Tokenizer.from_folder(models.initial_folder(context.config))
    tokenizer.save(context.tokenizer_path)
    return context.tokenizer()


def _distinct(stores: Mapping[str, TextStore]) -> list[TextStore]:
    return list({store.folder: store for store in stores.values()}.values())


def _added_tokens(config: RunConfig) -> tuple[str, ...]:
    added = (*ADDED_TOKENS, *config.tokenizer.added_tokens)
    twice = next((token for token in added if added.count(token) > 1 or not token), None)
    if twice is not None:
        raise UserError(f"--config.tokenizer.added_tokens: {twice!r} is empty or there twice; the templates' own are "
                        f"{', '.join(ADDED_TOKENS)}")
    return added


def check_initial(config: RunConfig) -> None:
    """Checks that `config.init` can become `config.model`; for asking before any work.

    Raises:
      UserError: no checkpoint, one of another architecture, or a vocabulary larger than the model's.
    """
    if config.init == "random":
        size, smallest = config.tokenizer.vocab_size, Tokenizer.smallest(_added_tokens(config))
        if size < smallest:
            raise UserError(f"--config.tokenizer.vocab_size: {size}; allowed: at least {smallest}")
    else:
        folder = models.initial_folder(config)
        models.check_same(config.model, hub.load_config(folder), folder)
        size = Tokenizer.from_folder(folder).vocab_size
    if config.model.vocab_size < size:
        raise UserError(f"--config.model.vocab_size: {config.model.vocab_size} is less than the tokenizer's {size}")


def make_sources(context: StageContext, stores: Mapping[str, TextStore], tokenizer: Tokenizer, phase: int = 0
                 ) -> list[loader.Source]:
    """The documents of every source that has a share in a phase, in the forms that the configuration names.

    Raises:
      UserError: texts of which a form can make nothing; the line names the source.
    """
    stage, made = context.config.midtrain, []
    sources = {name: source for name, source in sources_of(stage).items() if source.share > 0}
    total = sum(source.share for source in sources.values())
    tokens = stage.train.steps * stage.train.rows * stage.train.sequence_length
    for name, source in sources.items():
        form = FORMS.resolve(source.form, f"--config.midtrain.sources.{name}.form")
        folder = context.workdir / "data" / (f"{name}.{phase + 1}" if phase else name)
        request = Request(context, name, stores[name], tokenizer, stage.train.sequence_length,
                          math.ceil(tokens * source.share / total), folder)
        try:
            made.append(loader.Source(name, form(request), source.share))
        except UserError as error:
            field = source_field(context.config, "midtrain", name)
            raise error if str(error).startswith("--config") else UserError(f"{field}: {error}") from error
    return made
