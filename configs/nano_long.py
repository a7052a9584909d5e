"""The chain of configs/nano.py with the tasks and the time that reinforcement learning needs: about an hour and a half.

    qcn run --config=configs/nano_long.py --workdir=runs/nano_long

Three times as many training tasks, of which each is met once or twice instead of being learned by heart; SFT sees
the solver look for defects that nobody told it, so that there is a search for reinforcement learning to improve; the
software-engineering expert, the only one here, gets three times as many updates. What it reached beside `nano` is in
README.
"""

import pathlib
import runpy


def get_config():
    """The configuration `nano` with more tasks, searching trajectories, and longer training of one expert."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("nano.py")))["get_config"]()
    config.name = "nano_long"
    config.tasks.train, config.tasks.heldout = 900, 160
    config.sft.sources.nano.options.searches, config.sft.train.steps = 2, 520
    config.experts.names = ("swe",)
    config.experts.updates = 40
    optimizer = config.distill.optimizer
    optimizer.learning_rate, optimizer.b1, optimizer.warmup_steps = 5e-4, 0.9, 2  # enough updates to average over
    config.distill.updates = 24
    config.evaluate.tasks, config.evaluate.pass_k_tasks = 160, 60
    return config
