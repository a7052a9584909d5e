"""Qwen3-Coder-Next as published, 79,674,391,296 parameters of which 3.9B act on a token, on TPU pods.

    qcn compile --config=configs/qwen3_coder_next.py:v5p-128
    qcn compile --config=configs/qwen3_coder_next.py:v5p-512 --stage=midtrain --phase=2
    qcn compile --config=configs/qwen3_coder_next.py:v5p-128 --stage=rollout
    qcn run     --config=configs/qwen3_coder_next.py:v5p-128 --workdir=DIR --config.init=HF_FOLDER \\
        --config.midtrain.data='corpus/*.parquet' --config.sft.data=chats.jsonl \\
        --config.tasks.data=tasks.jsonl --config.tasks.heldout_data=heldout.jsonl

`qcn run` is given on every host of the pod, with a workdir that all of them see; docs/data.md says what the files may
be. Experts, distillation and evaluation act with a shell in sandboxes, in episodes of 300 turns. The argument is a pod,
named by its cores (v5p-128, v5p-512), chips (v5e-256, v6e-256) or devices (tpu7x-128), and after a comma mid-training's
length: 8k, 32k, 262k, or 32k-262k (default): a phase of each, as in the report, and then episodes of 64k tokens.
benchmarks/pod_compile.py says which of them have been compiled, and what they take.
"""

import dataclasses

import ml_collections

from qcn_jax.config import (
    DistillConfig,
    EvaluateConfig,
    ExpertsConfig,
    MeshConfig,
    MidtrainConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    RolloutConfig,
    RunConfig,
    SftConfig,
    TasksConfig,
    TrainConfig,
    to_config_dict,
)
from qcn_jax.errors import UserError

# Topology and number of devices. Experts lie on 16 devices; what is left splits the width of weights, and the batch.
PODS = {
    "v5p-128": ("v5p:4x4x4", 64),
    "v5p-512": ("v5p:4x8x8", 256),
    "v5e-256": ("v5e:16x16", 256),
    "v6e-256": ("v6e:16x16", 256),
    "tpu7x-128": ("tpu7x:4x4x4", 128),
}
EXPERT = 16
SLOTS = {"v5p-128": 16, "v5p-512": 16, "v5e-256": 1, "v6e-256": 4, "tpu7x-128": 16}  # sequences of a device
# Mid-training's row length, and over how many devices a row is split, so that each holds about 8,192 tokens (32,768 of
# the longest rows where the pod has too few devices for its experts otherwise).
LENGTHS = {"8k": (8192, 1), "32k": (32_768, 4), "262k": (262_144, 16)}


# The last steps of mid-training are those on the longest rows.
STEPS, LONG_STEPS = 10_000, 1000
_PHASES = "32k-262k"
EPISODE = 65_536  # tokens, where mid-training has had rows that long
TURNS = 300  # as in the report's evaluations
SCAFFOLD = "mini_swe_agent"


def _spread(pod: str, length: str) -> tuple[int, int, int, MeshConfig]:
    """Of rows of `length` on `pod`: tokens, rows, tokens that a device holds, and the mesh."""
    _, devices = PODS[pod]
    tokens, context = LENGTHS[length]
    share = 8192  # tokens of a device, where a row is not longer than that on each of its devices
    if pod.startswith("v5e") and 1 < context < 16:  # half of them on chips of 16 GiB
        context, share = 2 * context, share // 2
    expert = min(EXPERT, devices // context)
    # The compiler has no ragged all-to-all for v5e ("not supported in limited ICI routing settings").
    dispatch = "gather" if pod.startswith("v5e") else "ragged"
    mesh = MeshConfig(fsdp=devices // expert // context, expert=expert, context=context, dispatch=dispatch)
    # Stages behind mid-training take rows of as many tokens as a device holds of mid-training's, or a whole row.
    return tokens, devices // context, max(share, tokens // context) * context, mesh


def get_config(argument: str = "v5p-128") -> ml_collections.ConfigDict:
    """The configuration for `POD[,LENGTH]`."""
    pod, _, length = argument.partition(",")
    length = length or _PHASES
    if pod not in PODS or length not in (*LENGTHS, _PHASES):
        raise UserError(f"--config: {argument!r} is not POD[,LENGTH] with a pod of {', '.join(PODS)} and a length of "
                        f"{', '.join([*LENGTHS, _PHASES])}")
    tokens, rows, short, mesh = _spread(pod, length.split("-")[0])
    phases, episode = (), short
    if length == _PHASES:
        episode = EPISODE
        longest, fewer, _, split = _spread(pod, "262k")
        phases = (PhaseConfig(steps=STEPS - LONG_STEPS),
                  PhaseConfig(steps=LONG_STEPS, sequence_length=longest, rows=fewer,
                              mesh={"fsdp": split.fsdp, "expert": split.expert, "context": split.context}))
    rollout = RolloutConfig(max_turns=TURNS, max_new_tokens=2048, max_length=episode, slots=SLOTS[pod] * PODS[pod][1],
                            prefill_rows=PODS[pod][1], prefill_chunk=512, several_shapes=True)
    optimizer = OptimizerConfig(learning_rate=3e-5, warmup_steps=500, master_copy=True)
    gentle = dataclasses.replace(optimizer, learning_rate=1e-6, warmup_steps=10, weight_decay=0.0)
    train = lambda steps, rows, length, optimizer: TrainConfig(
        steps=steps, rows=rows, sequence_length=length, mtp_coef=0.0, checkpoint_every=250, keep=3, optimizer=optimizer)
    acting = {"scaffold": SCAFFOLD, "rollout": rollout}
    learning = {"rows": rows, "sequence_length": episode, "optimizer": gentle, **acting}
    return to_config_dict(RunConfig(
        name="qwen3_coder_next",
        topology=PODS[pod][0],
        tasks=TasksConfig(train=0, heldout=0),
        model=ModelConfig(
            param_dtype="bfloat16", remat="full", attention="splash", delta_rule="pallas", chunk_size=128),
        mesh=mesh,
        midtrain=MidtrainConfig(train=train(STEPS, rows, tokens, optimizer), phases=phases),
        sft=SftConfig(train=train(2000, rows, short, dataclasses.replace(optimizer, learning_rate=1e-5))),
        experts=ExpertsConfig(names=("swe",), updates=500, **learning),
        distill=DistillConfig(updates=300, **learning),
        evaluate=EvaluateConfig(tasks=500, pass_k_tasks=0, baseline="", sft_control=False, **acting),
    ))
