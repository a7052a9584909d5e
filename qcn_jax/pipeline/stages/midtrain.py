"""Stage `midtrain`: from the initial model to one that knows code and edits.

The stream mixes repository-level documents, fill-in-the-middle in two forms, and edit documents, by share of
tokens, packed by best fit; the loss is next-token, router balance and multi-token prediction. The corpus is the
training repositories and the standard library of this Python; held-out repositories only serve to keep copies of
their code out of it.
"""

import itertools
from typing import Any

import numpy as np

from qcn_jax import hub
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import MidtrainConfig, RunConfig
from qcn_jax.envs.testpaths import is_test_path
from qcn_jax.errors import UserError
from qcn_jax.pipeline import models
from qcn_jax.pipeline.context import StageContext
from qcn_jax.pipeline.data import loader
from qcn_jax.pipeline.data.documents import fim, repository
from qcn_jax.pipeline.train import fit
from qcn_jax.pipeline.train.trainer import Trainer, mesh_here
from qcn_jax.recipes.nano import edits
from qcn_jax.sharding import distributed
from qcn_jax.sharding.parallel import Parallel

LINE_TOKENS = tuple(f"<|{number}|>" for number in range(1, 65))
# Order fixes ids; Qwen's names first, then the tags of the native tool-call form and line numbers.
ADDED_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<function=", "</function>", "<parameter=", "</parameter>", *LINE_TOKENS)
TOKENIZER_SAMPLE_BYTES = 4_000_000  # of source text; more changes little in a vocabulary this small

Corpus = dict[str, list[repository.Module]]


def make_trainer(config: RunConfig, parallel: Parallel | None) -> Trainer:
    """Builds the step of the stage on `parallel`.

    Raises:
      UserError: rows that `accumulate` or the mesh does not divide.
    """
    return fit.make_trainer(config.model, config.midtrain.train, parallel, "midtrain.train")


def run_stage(context: StageContext) -> dict[str, Any]:
    """Trains `config.midtrain`; writes tokenizer, init.json and model/ (see pipeline.context)."""
    settings = context.config.midtrain
    train = settings.train
    trainer = make_trainer(context.config, mesh_here(context.config.mesh))
    with distributed.first_before_others("midtrain's data"):  # what the first process writes, the others read
        groups = read_corpus(context)
        tokenizer = prepare_tokenizer(context, groups)
        init = models.note_initial(context)
        sources = make_sources(context, groups, tokenizer)
    _, params = models.initial(context.config, trainer.parallel)
    batches = loader.batches(sources, rows=trainer.rows.count, length=train.sequence_length, seed=context.config.seed,
                             method=settings.packing, shard=trainer.rows.shard)
    results = fit.fit(context.workdir, context.model_path("midtrain"), trainer, params, batches, train,
                      tokenizer=tokenizer, log=context.log)
    shares = {source.name: source.share for source in sources}
    ending = f"loss {results['loss']:.3f}" if "loss" in results else "no steps"
    return results | {
        "init": init, "shares": shares, "vocabulary": tokenizer.vocab_size,
        "corpus_characters": _characters(groups),
        "line": f"{results['tokens']:,} tokens, {ending}, padding {results['packing']['padding']:.2f} %"}


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
        tokenizer = Tokenizer.train(texts, context.config.tokenizer.vocab_size, ADDED_TOKENS)
    else:
        tokenizer = Tokenizer.from_folder(models.initial_folder(context.config))
    tokenizer.save(context.tokenizer_path)
    return context.tokenizer()


def check_initial(config: RunConfig) -> None:
    """Checks that `config.init` can become `config.model`; for asking before any work.

    Raises:
      UserError: no checkpoint, one of another architecture, or a vocabulary larger than the model's.
    """
    if config.init == "random":
        size, smallest = config.tokenizer.vocab_size, Tokenizer.smallest(ADDED_TOKENS)
        if size < smallest:
            raise UserError(f"--config.tokenizer.vocab_size: {size}; allowed: at least {smallest}")
    else:
        folder = models.initial_folder(config)
        models.check_same(config.model, hub.load_config(folder), folder)
        size = Tokenizer.from_folder(folder).vocab_size
    if config.model.vocab_size < size:
        raise UserError(f"--config.model.vocab_size: {config.model.vocab_size} is less than the tokenizer's {size}")


def make_sources(context: StageContext, groups: Corpus, tokenizer: Tokenizer) -> list[loader.Source]:
    """The three kinds of documents with their shares."""
    config, settings = context.config, context.config.midtrain
    length = settings.train.sequence_length
    modules = list(itertools.chain.from_iterable(groups.values()))
    sources = []
    if settings.repository > 0:
        store = _repository_store(context, groups, tokenizer, length)
        sources.append(loader.Source("repository", store, settings.repository))
    if settings.fim > 0:
        documents = fim.FimDocuments(modules, tokenizer, seed=config.seed, max_tokens=length)
        sources.append(loader.Source("fim", documents, settings.fim))
    if settings.edits > 0:
        code = [(path, text) for path, text in modules if not is_test_path(path)]
        table = edits.function_table(code, max_lines=config.tasks.max_function_lines, kinds=config.tasks.kinds,
                                     seed=config.seed, cache=context.workdir / "data" / "edits.json",
                                     processes=config.workers)
        context.log(f"edits: {len(table)} functions, {sum(len(f.defects) for f in table)} defects")
        documents = edits.EditDocuments(table, tokenizer, seed=config.seed, max_tokens=length)
        sources.append(loader.Source("edits", documents, settings.edits))
    return sources


def _repository_store(context: StageContext, groups: Corpus, tokenizer: Tokenizer,
                      length: int) -> loader.TokenStore:
    """Repository documents, tokenised once, as many as the stage will read."""
    folder = context.workdir / "data" / "repository"
    if loader.TokenStore.exists(folder):
        return loader.TokenStore(folder)
    settings = context.config.midtrain
    train = settings.train
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
