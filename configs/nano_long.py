"""The chain of configs/nano.py with the time that reinforcement learning needs: about an hour and a half on two cores.

    qcn run --config=configs/nano_long.py --workdir=runs/nano_long

More tasks, more guesses to recover from, and four times as many updates of the experts. What it reached beside `nano`
is in README's table.
"""

import pathlib
import runpy


def get_config():
    """The configuration `nano` with larger stages."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("nano.py")))["get_config"]()
    config.name = "nano_long"
    config.tasks.train, config.tasks.heldout = 600, 200
    config.midtrain.train.steps = 60
    config.sft.guesses, config.sft.train.steps = 6, 300
    config.rl.updates, config.distill.updates = 32, 16
    config.evaluate.tasks, config.evaluate.pass_k_tasks = 200, 60
    return config
