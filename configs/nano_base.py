"""Pretraining of the packaged nano base checkpoint, from random weights, on the same corpus as `nano` mid-trains on.

    qcn run --config=configs/nano_base.py --workdir=runs/nano_base --stages=tasks,midtrain

Held-out repositories are seen neither by the tokenizer nor by the model. Provenance of the packaged weights (command,
time, loss, hashes) is in qcn_jax/assets/nano_base/README.md.
"""

import pathlib
import runpy


def get_config():
    """The configuration `nano` with `init=random`, the whole corpus, and a long mid-training."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("nano.py")))["get_config"]()
    config.name, config.init = "nano_base", "random"
    config.model.num_nextn_predict_layers, config.midtrain.train.mtp_coef = 0, 0.0
    config.tasks.train = config.tasks.heldout = 0  # repositories are downloaded, no tasks are made
    config.midtrain.corpus_megabytes = 14.0
    config.midtrain.repository, config.midtrain.fim, config.midtrain.edits = 0.2, 0.05, 0.75
    config.midtrain.train.steps = 2600
    config.midtrain.train.checkpoint_every = 200
    config.midtrain.train.optimizer.learning_rate = 3e-3
    config.midtrain.train.optimizer.warmup_steps = 100
    return config
