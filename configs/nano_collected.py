"""The packaged base, taught by conversations that `qcn collect` kept with scaffold nano, as configs/nano.py teaches it.

    qcn collect --baseline=heuristic --tasks=tasks.jsonl --out=chats.jsonl
    qcn run --config=nano_collected:chats.jsonl --workdir=runs/taught --stages=sft
    qcn evaluate --checkpoint=runs/taught/sft/model --tasks=others.jsonl --out=after

What nano's tools mark as tokens of lines becomes tokens again: give only files that `qcn collect` wrote.
"""

import dataclasses
import pathlib
import runpy

from qcn_jax.config import ChatSource, RunConfig, from_config_dict, to_config_dict
from qcn_jax.errors import UserError


def get_config(path=""):
    """The configuration `nano` without mid-training, its conversations those of the file at `path`."""
    if not path:
        raise UserError("--config=nano_collected:FILE: give the file that qcn collect wrote")
    nano = runpy.run_path(str(pathlib.Path(__file__).with_name("nano.py")))["get_config"]()
    config = from_config_dict(RunConfig, nano)
    sources = {"collected": ChatSource(path=path, options={"marks": True})}
    return to_config_dict(dataclasses.replace(
        config, name="nano_collected", midtrain=dataclasses.replace(config.midtrain, sources={}),
        sft=dataclasses.replace(config.sft, sources=sources)))
