"""A model of yours, trained by reinforcement learning on tasks of yours: an agent with a shell, rewarded by tests.

    qcn run --config=rl_swe:MODEL_FOLDER --workdir=runs/rl --stages=tasks,experts,distill,evaluate \\
        --config.tasks.data=tasks.jsonl --config.tasks.heldout_data=heldout.jsonl

MODEL_FOLDER is a Hugging Face folder with a tokenizer. Tasks are what `qcn synthesize` writes, or rows in the form of
SWE-bench, SWE-smith or SWE-bench Pro: docs/data.md. Behind a comma may stand how long an episode can become, in tokens
of the model: 8k, 16k (default), 32k or 64k, with turns to match; the rest is for one host with eight accelerators. The
results are runs/rl/experts/swe/model and runs/rl/distill/model; with `--config.sft.data` and stage sft before, these
begin from the SFT model.
"""

import dataclasses

from qcn_jax import hub
from qcn_jax.config import (
    DistillConfig,
    EvaluateConfig,
    ExpertsConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    SftConfig,
    TasksConfig,
    TrainConfig,
    to_config_dict,
)
from qcn_jax.errors import UserError

SIZES = {"8k": (8192, 30), "16k": (16_384, 60), "32k": (32_768, 120), "64k": (65_536, 300)}  # tokens, turns
SCAFFOLD = "mini_swe_agent"  # or swe_agent, qwen_code: agents.scaffolds


def get_config(argument=""):
    """The configuration for `MODEL_FOLDER[,SIZE]`."""
    folder, _, size = argument.rpartition(",")
    if size not in SIZES:
        folder, size = argument, "16k"
    if not folder:
        raise UserError("--config=rl_swe:FOLDER[,SIZE]: give the folder of the model to start from; sizes: "
                        + ", ".join(SIZES))
    model = dataclasses.replace(hub.load_config(folder), remat="full")
    length, turns = SIZES[size]
    length = min(length, model.max_position_embeddings)
    rollout = RolloutConfig(max_turns=turns, max_new_tokens=min(2048, length // 8), max_length=length, slots=64,
                            prefill_rows=8, prefill_chunk=min(512, length // 8), several_shapes=True)
    optimizer = OptimizerConfig(learning_rate=1e-6, warmup_steps=5, weight_decay=0.0,
                                master_copy=model.param_dtype != "float32")
    acting = {"scaffold": SCAFFOLD, "rollout": rollout}
    learning = {"rows": 8, "sequence_length": length, "optimizer": optimizer, **acting}
    return to_config_dict(RunConfig(
        name="rl_swe", init=folder, model=model, workers=8, tasks=TasksConfig(train=0, heldout=0),
        sft=SftConfig(train=TrainConfig(steps=1000, rows=8, sequence_length=length, mtp_coef=0.0,
                                        optimizer=dataclasses.replace(optimizer, learning_rate=1e-5))),
        experts=ExpertsConfig(names=("swe",), updates=100, prompts=8, group_size=8, average="episode", **learning),
        distill=DistillConfig(updates=30, prompts=8, group_size=4, **learning),
        evaluate=EvaluateConfig(tasks=500, pass_k_tasks=0, baseline="", sft_control=False, **acting)))
