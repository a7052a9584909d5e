"""A model of yours, trained on files of yours: continued pre-training on texts, then SFT on conversations.

    qcn run --config=finetune:MODEL_FOLDER --workdir=runs/mine --stages=midtrain,sft \\
        --config.midtrain.data='corpus/*.parquet' --config.sft.data=chats.jsonl

MODEL_FOLDER is a Hugging Face folder with a tokenizer. Texts are JSONL (plain, .gz, .zst), Parquet, folders of source
code or archives; conversations are rows with messages and tools, from/value, or prompt and completion: docs/data.md.
The result is runs/mine/sft/model. Several sources with shares and forms of their own: `config.midtrain.sources`.
"""

from qcn_jax import hub
from qcn_jax.config import (
    MidtrainConfig,
    OptimizerConfig,
    RunConfig,
    SftConfig,
    TrainConfig,
    to_config_dict,
)
from qcn_jax.errors import UserError

LENGTH = 4096  # tokens of a row, where the model has so many


def get_config(folder=""):
    """The configuration for a Hugging Face folder; rows, lengths and steps are those of one host with accelerators."""
    if not folder:
        raise UserError("--config=finetune:FOLDER: give the folder of the model to start from")
    model = hub.load_config(folder)
    train = lambda rate: TrainConfig(
        steps=1000, rows=8, sequence_length=min(LENGTH, model.max_position_embeddings), mtp_coef=0.0,
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=50, weight_decay=0.0,
                                  master_copy=model.param_dtype != "float32"))
    return to_config_dict(RunConfig(
        name="finetune", init=folder, model=model, midtrain=MidtrainConfig(train=train(2e-5)),
        sft=SftConfig(train=train(1e-5))))
