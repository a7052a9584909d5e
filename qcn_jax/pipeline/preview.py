"""Rows as a stage would train on them, made of a sample of its sources: no run's folder is written, no device used.

The first rows of a small source are those of a run's first steps; of a large one a sample is read, and the rows are
some of those that a run sees. With the folder of a run, what its stages have already read and tokenised is shown.
"""

import collections
import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from qcn_jax import files
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import RunConfig
from qcn_jax.config_phases import of_phase, source_field, sources_of
from qcn_jax.errors import UserError
from qcn_jax.pipeline import models
from qcn_jax.pipeline import workdir as work
from qcn_jax.pipeline.chat_template import encoder_of
from qcn_jax.pipeline.context import Shared, StageContext
from qcn_jax.pipeline.data import loader
from qcn_jax.pipeline.data.readers import CHATS
from qcn_jax.pipeline.data.texts import Findings
from qcn_jax.pipeline.report.rows import Row, read_back
from qcn_jax.pipeline.run import stage_config
from qcn_jax.pipeline.stages import midtrain, sft

STAGES = ("midtrain", "sft")
_CHARACTERS = 6  # of text a token, at most, in most languages: so much is read that a window of rows is filled
_MEGABYTES = 8.0  # of a source, at most
_STORE = "store.json"  # what marks a store complete


@dataclasses.dataclass(frozen=True)
class Preview:
    """What is shown.

    Attributes:
      rows: the first ones.
      packing: what packing the window cost that they are of (loader.summary).
      notes: what was said while sources were read.
    """

    rows: list[Row]
    packing: dict[str, Any]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class _Reading(StageContext):
    """A stage's context in a temporary folder; what the stage would log is kept."""

    notes: list[str] = dataclasses.field(default_factory=list)

    def log(self, line: str) -> None:
        """See StageContext."""
        self.notes.append(line)

    def result(self, stage: str) -> dict[str, Any]:
        """See StageContext."""
        if not files.exists(self.root / stage / work.DONE):
            raise UserError(f"--workdir: a source is made of what stage {stage} leaves; name a run in which it has "
                            "finished")
        return super().result(stage)


def preview(config: RunConfig, stage: str, rows: int, phase: int = 1, workdir: files.Path | None = None) -> Preview:
    """Reads sources and packs rows as `stage` does.

    Args:
      config: of a run, checked for `stage`.
      stage: one of STAGES.
      rows: how many are shown.
      phase: of mid-training, from 1.
      workdir: of a run; what is complete in it is taken from there, and nothing written.

    Raises:
      UserError: a source cannot be read without a run, or the run was made with another configuration.
    """
    of_stage = of_phase(config, stage, phase)
    with tempfile.TemporaryDirectory() as folder:
        context = _Reading(of_stage, pathlib.Path(folder), stage, Shared(config, pathlib.Path(folder)))
        if workdir is not None:
            _link(pathlib.Path(workdir).absolute(), context.root, config, stage)
        with contextlib.closing(context.shared):
            if stage == "midtrain":
                sources, tokenizer = _texts(context, phase), context.tokenizer()
            else:
                tokenizer = _tokenizer(context)
                sources = [loader.Source(name, _conversations(context, name), source.share)
                           for name, source in sft.used(of_stage).items()]
            settings = getattr(of_stage, stage)
            seed = config.seed + (midtrain.PHASE_SEED * (phase - 1) if stage == "midtrain" else 0)
            batches = loader.batches(
                sources, rows=1, length=settings.train.sequence_length, seed=seed, method=settings.packing,
                overlong=settings.overlong, origins=True)
            shown = [{key: values[0] for key, values in next(batches).items()} for _ in range(rows)]
            packed = loader.summary(batches)
    return Preview([read_back(row, tokenizer, list(packed["sources"])) for row in shown], packed, context.notes)


def _link(run: pathlib.Path, root: pathlib.Path, config: RunConfig, stage: str) -> None:
    """Links what is complete in the folder of a run into `root`."""
    if not run.is_dir():
        raise UserError(f"--workdir={run}: there is no such folder")
    texts, chats = run / "midtrain" / "data", run / "sft" / "data"
    whole = [run / "tasks", run / "midtrain" / "tokenizer", *texts.glob("*.json"),
             *(path.parent for path in texts.rglob(_STORE))]
    if (chats / sft.SUMMARY).exists():
        whole += [path.parent for path in chats.glob(f"*/{_STORE}")]
    for name in ("midtrain", "sft")[: STAGES.index(stage) + 1]:
        work.check_unchanged(run / name, stage_config(config, name))
    for path in filter(pathlib.Path.exists, whole):
        link = root / path.relative_to(run)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)


def _texts(context: _Reading, phase: int) -> list[loader.Source]:
    stage = context.config.midtrain
    window = loader.WINDOW_ROWS * stage.train.sequence_length
    most = min(_MEGABYTES, max(1.0, window * _CHARACTERS / 1e6))
    sampled = {name: dataclasses.replace(source, megabytes=min(source.megabytes or most, most))
               for name, source in sources_of(stage).items() if source.share > 0}
    train = dataclasses.replace(stage.train, steps=-(-loader.WINDOW_ROWS // stage.train.rows))
    few = dataclasses.replace(stage, sources=sampled, data="", train=train)
    context = dataclasses.replace(context, config=dataclasses.replace(context.config, midtrain=few))
    stores = midtrain.read_texts(context)
    if any(store.summary["characters"] >= 1e6 * most for store in stores.values()):
        context.log(f"of every source at most {most:g} MB are read")
    return midtrain.make_sources(context, stores, midtrain.prepare_tokenizer(context, stores), phase - 1)


def _tokenizer(context: _Reading) -> Tokenizer:
    if context.tokenizer_path.exists():
        return context.tokenizer()
    if context.config.init == "random":
        raise UserError("--workdir: with --config.init=random the tokenizer is made by stage midtrain; name a run in "
                        "which it has begun")
    return Tokenizer.from_folder(models.initial_folder(context.config))


def _conversations(context: _Reading, name: str) -> Any:
    """Documents of a source: the run's own, or a sample."""
    folder = context.workdir / sft.DOCUMENTS / name
    if loader.TokenStore.exists(folder):
        return loader.TokenStore(folder)
    config, field = context.config, source_field(context.config, "sft", name)
    source, reader = sft.used(config)[name], CHATS.resolve(sft.used(config)[name].kind, f"{field}.kind")
    if reader.sandbox:
        raise UserError(f"--workdir: conversations of {field} are made by acting on tasks; name a run whose stage sft "
                        "has made them")
    findings = Findings(config.sft.malformed, "--config.sft.malformed")
    read = reader.read(context, source, findings, lambda: False)
    encoder = encoder_of(config, _tokenizer(context))
    documents = sft.encoded(read, encoder, sft.longest(config), findings, collections.Counter())
    found = list(_enough(documents, loader.WINDOW_ROWS * config.sft.train.sequence_length))
    context.log(f"{name}: {findings.line()}")
    if not found:
        raise UserError(f"{field}: no conversation is left ({findings.line()})")
    return found


def _enough(documents: Iterator[dict[str, Any]], tokens: int) -> Iterator[dict[str, Any]]:
    for document in documents:
        yield document
        tokens -= len(document["tokens"])
        if tokens <= 0:
            return
