"""The chain of configs/nano.py with the time that reinforcement learning needs: about an hour on two cores.

    qcn run --config=configs/nano_long.py --workdir=runs/nano_long

Tasks, mid-training and SFT are those of `nano`; a finished run of it, copied, is continued from there. The experts get
six times as many updates, on prompts that the SFT model solves sometimes but not always. What it reached beside `nano`
is in README.
"""

import pathlib
import runpy


def get_config():
    """The configuration `nano` with more reinforcement learning and distillation."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("nano.py")))["get_config"]()
    config.name = "nano_long"
    config.rl.updates, config.rl.filter_samples = 48, 4
    config.distill.updates = 16
    config.evaluate.pass_k_tasks = 60
    return config
