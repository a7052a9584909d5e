"""Qwen3.5's text models, continued pre-training and SFT on TPU slices.

    qcn compile --config=configs/qwen3_5.py:27b,v5p:2x2x4
    qcn compile --config=configs/qwen3_5.py:35b-a3b,v6e:4x4 --stage=sft
    qcn run     --config=configs/qwen3_5.py:27b,v5p:2x2x4 --workdir=DIR --stages=midtrain --config.init=HF_FOLDER

The argument is a size (qcn_jax.sizes) and a topology. Rows are 8,192 tokens, one to a device and step; on chips of 32
GiB two devices share one of a large model, and the optimizer's state of a dense one lies in the host's memory.
"""

import dataclasses
import math

import ml_collections

from qcn_jax.config import (
    DistillConfig,
    ExpertsConfig,
    MeshConfig,
    MidtrainConfig,
    OptimizerConfig,
    RunConfig,
    SftConfig,
    TrainConfig,
    to_config_dict,
)
from qcn_jax.errors import UserError
from qcn_jax.model import parameter_count
from qcn_jax.sizes import SIZES

LENGTH = 8192
EXPERT = 8  # devices over which experts are spread
SMALL_CHIPS = ("v5e", "v6e")  # of 16 or 32 GiB
LARGE = 20_000_000_000  # parameters of models whose rows such chips share between two


def get_config(argument: str = "27b,v5p:2x2x4") -> ml_collections.ConfigDict:
    """The configuration for `SIZE,TOPOLOGY`."""
    size, _, topology = argument.partition(",")
    generation, _, shape = topology.partition(":")
    if size not in SIZES or not shape or not all(part.isdigit() for part in shape.split("x")):
        raise UserError(f"--config: {argument!r} is not SIZE,TOPOLOGY with a size of {', '.join(SIZES)} and a topology "
                        "like v5p:2x2x4")
    devices = math.prod(map(int, shape.split("x")))
    expert = math.gcd(EXPERT, devices) if SIZES[size].num_experts else 1
    small = generation in SMALL_CHIPS
    moments = "bfloat16" if small else "float32"
    large = small and parameter_count(SIZES[size]) > LARGE
    context = 2 if large else 1
    optimizer = OptimizerConfig(learning_rate=1e-5, warmup_steps=50, master_copy=True, mu_dtype=moments,
                                nu_dtype=moments, offload=large and not SIZES[size].num_experts)
    gentle = dataclasses.replace(optimizer, learning_rate=1e-6, warmup_steps=10, weight_decay=0.0)
    train = lambda steps: TrainConfig(steps=steps, rows=devices // context, sequence_length=LENGTH, mtp_coef=0.0,
                                      checkpoint_every=250, optimizer=optimizer)
    return to_config_dict(RunConfig(
        name=f"qwen3_5_{size}", topology=topology,
        model=dataclasses.replace(SIZES[size], param_dtype="bfloat16", remat="full", attention="splash",
                                  delta_rule="pallas", chunk_size=128),
        mesh=MeshConfig(fsdp=devices // expert // context, expert=expert, context=context),
        midtrain=MidtrainConfig(train=train(2000)), sft=SftConfig(train=train(1000)),
        experts=ExpertsConfig(rows=devices // context, sequence_length=LENGTH, optimizer=gentle),
        distill=DistillConfig(rows=devices // context, sequence_length=LENGTH, optimizer=gentle),
    ))
