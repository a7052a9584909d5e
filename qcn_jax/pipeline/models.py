"""The models of a run: the one that it starts from and those that its stages leave.

A folder's config.json says what its model is and how it is stored. How it is computed (`COMPUTE_FIELDS`) is the run's
own affair: every stage takes that from `config.model`, by reading models here and nowhere else.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qcn_jax import files, hub
from qcn_jax.config import COMPUTE_FIELDS, ModelConfig, RunConfig
from qcn_jax.errors import UserError
from qcn_jax.hub.description import ACTING_FILE
from qcn_jax.model import Qwen3Next
from qcn_jax.pipeline.context import StageContext
from qcn_jax.pipeline.evaluate import settings
from qcn_jax.pipeline.train.layout import param_shardings
from qcn_jax.registry import Registry, is_path
from qcn_jax.sharding import distributed
from qcn_jax.sharding.parallel import Parallel

INITIAL = Registry("initial model", pathlib.Path, {"base": "qcn_jax.recipes.nano.base:FOLDER"})
# Fields that a checkpoint may have otherwise without being another architecture.
_FREE_FIELDS = (*COMPUTE_FIELDS, "router_aux_loss_coef", "max_position_embeddings", "num_nextn_predict_layers",
                "initializer_range")


def load(context: StageContext, name: str, parallel: Parallel | None = None) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a model of the run: `base`, which it starts from, or one that `context.model_path` knows.

    Args:
      context: of the stage that wants it.
      name: which.
      parallel: the mesh to lay it out on, every process taking its own part; None is one device.

    Returns:
      The architecture of the checkpoint with `config.model`'s way of computing, and the parameters.

    Raises:
      UserError: there is no such model, it is damaged, or `config.init` has changed since the run began.
    """
    if name == "base":
        note_initial(context)
        return initial(context.config, parallel)
    return read(context.model_path(name), context.config.model, parallel)


def save(context: StageContext, start: str, folder: pathlib.Path, model: ModelConfig, params: Any) -> None:
    """Writes a stage's model with the run's tokenizer; every process must call it.

    What the folder that the stage began from holds beside text weights goes along: its tokenizer's files and chat
    template as they are (unless `config.sft.chat_template` names another), and an encoder of images unless
    `config.vision` says drop. Beside it stands how the run lets it act (evaluate.settings).

    Args:
      context: of the stage.
      start: the model that it began from, as `load` calls it.
      folder: to write.
      model, params: what to write.

    Raises:
      UserError: see `hub.save`.
    """
    from qcn_jax.pipeline.chat_template import written_with  # which asks this module for folders

    source = context.model_path(start) if start != "base" else None
    if source is None and context.config.init != "random":
        source = initial_folder(context.config)
    hub.save(folder, model, params, context.tokenizer(), source=source, with_vision=context.config.vision == "keep",
             chat_template=written_with(context.config),
             beside={ACTING_FILE: settings.of_run(context.config, context.root, folder).to_json()})


def read(folder: pathlib.Path, computed: ModelConfig, parallel: Parallel | None = None
         ) -> tuple[ModelConfig, dict[str, Any]]:
    """`load` of a folder: its architecture and weights, with the COMPUTE_FIELDS of `computed`."""
    fields = {name: getattr(computed, name) for name in COMPUTE_FIELDS}
    model = dataclasses.replace(hub.inspect(folder), **fields)
    _, params = hub.load(folder, dtype=model.param_dtype, shardings=param_shardings(model, parallel))
    return model, params


def initial_folder(config: RunConfig) -> pathlib.Path:
    """The folder that `config.init` names.

    Raises:
      UserError: it holds no checkpoint.
    """
    named = config.init in INITIAL or is_path(config.init)
    folder = INITIAL.resolve(config.init, "--config.init") if named else pathlib.Path(config.init)
    if not files.is_file(folder / "config.json"):
        raise UserError(f"--config.init={config.init}: {folder}: holds no config.json; use random, a Hugging Face "
                        f"folder, {', '.join(INITIAL)} or the package.module:OBJECT of one")
    return folder


def initial(config: RunConfig, parallel: Parallel | None = None) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads or makes the model that the run starts from, every array where `parallel` wants it.

    Nothing is copied: a checkpoint is read from where it lies, a random model follows from the seed. Weights that the
    checkpoint lacks, which can only be a multi-token-prediction block, are initialised.

    Returns:
      `config.model` and its parameters.

    Raises:
      UserError: the checkpoint has another architecture than `config.model`.
    """
    model = config.model
    if config.init == "random":
        return model, _initialised(model, config.seed, parallel)
    folder = initial_folder(config)
    check_same(model, hub.inspect(folder), folder)
    _, params = read(folder, model, parallel)
    if not model.num_nextn_predict_layers:
        params.pop("mtp", None)
    elif "mtp" not in params:
        params |= _initialised(model, config.seed, parallel, ["mtp"])
    return model, params


def _initialised(model: ModelConfig, seed: int, parallel: Parallel | None, names: Sequence[str] | None = None
                 ) -> dict[str, Any]:
    """Random parameters, or only the subtrees called `names`; made in place, and the same on every mesh."""

    def make() -> dict[str, Any]:
        params = Qwen3Next(model).init(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]
        return {name: params[name] for name in names or params}

    shardings = param_shardings(model, parallel)
    if names and shardings is not None:
        shardings = {name: shardings[name] for name in names}
    return jax.jit(make, out_shardings=shardings)()


def note_initial(context: StageContext) -> dict[str, str]:
    """Notes in STAGE/init.json which checkpoint the run starts from; later, checks that it is still that one.

    STAGE is the first that reads it: midtrain, or the first that is run without mid-training.

    Returns:
      {"init"}, and of a checkpoint "folder" and "sha256" (see `hub.identity`).

    Raises:
      UserError: there is no checkpoint, or it is another one.
    """
    init = context.config.init
    if init == "random":
        return {"init": init}
    folder = initial_folder(context.config)
    places = [context.root / stage / "init.json" for stage in ("midtrain", "sft", "experts", "distill")]
    path = next(filter(files.is_file, places), context.workdir / "init.json")
    found = {"init": init, "folder": str(folder.absolute()), "sha256": hub.identity(folder)}
    if path.exists():
        noted = files.read_json(path)
        if noted["sha256"] != found["sha256"]:
            raise UserError(f"--config.init={init}: {folder} is no longer the checkpoint that the run started from; "
                            f"put that back, or --restart={path.parent.name}")
    elif distributed.is_first():
        files.write_json(path, found)
    return found


def check_same(model: ModelConfig, stored: ModelConfig, folder: pathlib.Path) -> None:
    """Raises UserError where a checkpoint's architecture is another one than `model`."""
    for field in dataclasses.fields(ModelConfig):
        if field.name in _FREE_FIELDS:
            continue
        wanted, found = getattr(model, field.name), getattr(stored, field.name)
        if wanted != found:
            raise UserError(f"--config.model.{field.name}: {wanted!r}, but the checkpoint in {folder} has {found!r}")
