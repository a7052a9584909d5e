"""Pretraining of the packaged nano base checkpoint, from random weights, on the same corpus as `nano` mid-trains on.

    qcn run --config=configs/nano_base.py:code --workdir=runs/nano_base_code --stages=tasks,midtrain
    qcn run --config=configs/nano_base.py:edits --workdir=runs/nano_base_edits --stages=tasks,midtrain \\
        --config.init=runs/nano_base_code/midtrain/model
    qcn run --config=configs/nano_base.py:wide --workdir=runs/nano_base_wide --stages=tasks,midtrain \\
        --config.init=runs/nano_base_edits/midtrain/model

Held-out repositories are seen neither by the tokenizer nor by the model. Provenance of the packaged weights (what was
run, time, loss, hashes) is in qcn_jax/recipes/nano/base/README.md.
"""

import pathlib
import runpy

from qcn_jax.recipes.nano import repositories


def get_config(phase: str = "code"):
    """The configuration `nano` with a long mid-training.

    `phase` is code (from random weights), edits or wide, each after the one before.
    `wide` adds the repositories of PRETRAIN: five times as many functions to learn repairs from.
    """
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("nano.py")))["get_config"]()
    config.name, config.init = f"nano_base_{phase}", "random"
    config.model.num_nextn_predict_layers, config.midtrain.train.mtp_coef = 0, 0.0
    config.tasks.repos_train = repositories.pinned(*repositories.BASE)
    config.tasks.train = config.tasks.heldout = 0  # repositories are downloaded, no tasks are made
    stage = config.midtrain
    stage.train.checkpoint_every = 200
    stage.train.optimizer.warmup_steps = 50
    if phase == "code":
        config.tasks.max_function_lines = 24
        shares = {"repository": 0.2, "fim": 0.05, "edits": 0.75}
        stage.train.steps, stage.train.optimizer.learning_rate = 900, 3e-3
    elif phase == "edits":
        shares = {"repository": 0.1, "fim": 0.05, "edits": 0.85}
        stage.train.steps, stage.train.optimizer.learning_rate = 1500, 2e-3
    elif phase == "wide":
        config.tasks.repos_train = repositories.pinned(*repositories.BASE, *repositories.PRETRAIN)
        shares = {"repository": 0.05, "fim": 0.0, "edits": 0.95}
        stage.train.steps, stage.train.optimizer.learning_rate = 1200, 1.5e-3
    else:
        raise ValueError(f"--config=configs/nano_base.py:{phase}: unknown phase; allowed: code, edits, wide")
    for name, share in shares.items():
        stage.sources[name].share, stage.sources[name].megabytes = share, 14.0
    return config
