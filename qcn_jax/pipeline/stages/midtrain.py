"""Stage `midtrain`: from the initial model to one that knows code and edits.

The stream mixes repository-level documents, fill-in-the-middle in two forms, and edit documents, by share of
tokens, packed by best fit; the loss is next-token, router balance and multi-token prediction. The corpus is the
training repositories and the standard library of this Python; held-out repositories only serve to keep copies of
their code out of it.
"""

import dataclasses
import functools
import itertools
from typing import Any

import grain
import numpy as np

from qcn_jax import hub
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import MidtrainConfig, RunConfig
from qcn_jax.config_phases import midtrain_phases
from qcn_jax.errors import UserError
from qcn_jax.pipeline import models
from qcn_jax.pipeline.context import StageContext
from qcn_jax.pipeline.data import loader
from qcn_jax.pipeline.data.documents import EDITS, fim, repository
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

Corpus = dict[str, list[repository.Module]]


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
        groups = read_corpus(context)
        tokenizer = prepare_tokenizer(context, groups)
        init = models.note_initial(context)
        sources = [make_sources(dataclasses.replace(context, config=config), groups, tokenizer, number)
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
        "corpus_characters": _characters(groups),
        "line": f"{results['tokens']:,} tokens, {ending}, padding {results['packing']['padding']:.2f} %"}


def _batches(config: RunConfig, sources: list[loader.Source], phase: int) -> grain.DatasetIterator:
    train = config.midtrain.train
    return loader.batches(sources, rows=train.rows, length=train.sequence_length, seed=config.seed + PHASE_SEED * phase,
                          method=config.midtrain.packing)


def read_corpus(context: StageContext) -> Corpus:
    """Python files by repository: the training repositories, then a seeded choice of the standard library.

    Copies of held-out code are left out of both.
    """
    config = context.config
    training = set(context.result("tasks")["repos_train"])
    found, heldout = {}, []
    for name, spec in sorted(context.repositories().items()):
        if name in training:
            found[name] = repository.repository_modules(spec)
        else:  # whatever is not for training is held out
            heldout += repository.repository_modules(spec)
    packages = sorted(repository.stdlib_repositories(repository.stdlib_modules()).items())
    left = config.midtrain.corpus_megabytes * 1e6 - sum(len(text) for group in found.values() for _, text in group)
    for index in np.random.default_rng(config.seed).permutation(len(packages)):
        name, group = packages[index]
        chosen = []
        for path, text in group:
            if left > 0:
                chosen.append((path, text))
                left -= len(text)
        found[name] = chosen
    kept = {name: repository.without_copies(group, heldout) for name, group in found.items() if group}
    count = lambda groups: sum(map(len, groups.values()))
    context.log(f"corpus: {count(kept)} files, {_characters(kept) / 1e6:.1f} MB, "
                f"{count(found) - count(kept)} left out as copies of held-out code")
    return {name: group for name, group in kept.items() if group}


def _characters(groups: Corpus) -> int:
    return sum(len(text) for group in groups.values() for _, text in group)


def prepare_tokenizer(context: StageContext, groups: Corpus) -> Tokenizer:
    """The initial model's tokenizer, or one trained on the corpus when `init` is random; kept for the run."""
    if context.tokenizer_path.exists():
        return context.tokenizer()
    context.tokenizer_path.parent.mkdir(parents=True, exist_ok=True)
    if context.config.init == "random":
        texts, size = [], 0
        for _, text in itertools.chain.from_iterable(groups.values()):
            if size < TOKENIZER_SAMPLE_BYTES:
                texts.append(text)
                size += len(text)
        tokenizer = Tokenizer.train(texts, context.config.tokenizer.vocab_size, _added_tokens(context.config))
    else:
        tokenizer = Tokenizer.from_folder(models.initial_folder(context.config))
    tokenizer.save(context.tokenizer_path)
    return context.tokenizer()


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


def make_sources(context: StageContext, groups: Corpus, tokenizer: Tokenizer, phase: int = 0) -> list[loader.Source]:
    """The three kinds of documents with their shares, as long as rows of the phase are."""
    config, settings = context.config, context.config.midtrain
    length = settings.train.sequence_length
    modules = list(itertools.chain.from_iterable(groups.values()))
    sources = []
    if settings.repository > 0:
        store = _repository_store(context, groups, tokenizer, phase)
        sources.append(loader.Source("repository", store, settings.repository))
    if settings.fim > 0:
        documents = fim.FimDocuments(modules, tokenizer, seed=config.seed, max_tokens=length)
        sources.append(loader.Source("fim", documents, settings.fim))
    if settings.edits > 0:
        make = EDITS.resolve(settings.edit_documents, "--config.midtrain.edit_documents")
        documents = make(context, modules, tokenizer, length)
        sources.append(loader.Source("edits", documents, settings.edits))
    return sources


def _repository_store(context: StageContext, groups: Corpus, tokenizer: Tokenizer, phase: int) -> loader.TokenStore:
    """Repository documents, tokenised once, as many as the stage will read."""
    folder = context.workdir / "data" / ("repository" if phase == 0 else f"repository_{phase + 1}")
    if loader.TokenStore.exists(folder):
        return loader.TokenStore(folder)
    settings = context.config.midtrain
    train = settings.train
    length = train.sequence_length
    wanted = train.steps * train.rows * length * _share(settings)
    reader = repository.RepositoryDocuments(tokenizer, length)
    documents: list[dict[str, np.ndarray]] = []
    for name, group in groups.items():
        if not documents or reader.tokens < wanted:
            documents += reader.documents(name, group)
    store = loader.TokenStore.write(folder, documents)
    context.log(f"repository documents: {len(store)}, {store.tokens:,} tokens, "
                f"{100 * reader.masked / max(1, reader.tokens):.1f} % masked as repeated")
    return store


def _share(settings: MidtrainConfig) -> float:
    return settings.repository / (settings.repository + settings.fim + settings.edits)
