"""The whole chain on a laptop: repositories to a trained and evaluated agent, on two CPU cores.

    qcn run --config=configs/nano.py --workdir=runs/nano
    qcn run --config=configs/nano.py:quick --workdir=runs/quick

`quick` goes through every stage in about four minutes, to show that everything works; its models have learned nothing.
Starts from the packaged base checkpoint (configs/nano_base.py made it; `--config.init=random` starts from nothing).
"""

from qcn_jax.config import (
    ChatSource,
    DistillConfig,
    EvaluateConfig,
    ExpertsConfig,
    MidtrainConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    SftConfig,
    TasksConfig,
    TextSource,
    TokenizerConfig,
    TrainConfig,
    to_config_dict,
)
from qcn_jax.errors import UserError
from qcn_jax.recipes.nano import repositories
from qcn_jax.recipes.nano.spans import LINE_TOKENS

# Kinds whose repair is one short span, which a model of this size can learn to find and to write.
KINDS = (
    "add_not", "drop_not", "flip_boolean", "swap_and_or", "flip_comparison", "change_boundary", "flip_membership",
    "flip_identity", "change_arithmetic", "change_constant",
)
# Tool-call templates that take few tokens of this vocabulary: XML, JSON, TypeScript and Python forms.
TEMPLATES = ("qwen3_coder", "qwen3_xml_json", "hermes", "typescript", "react", "toolace")
LENGTH = 768  # tokens of a packed row, and the longest episode


def get_config(pace=""):
    """2.3 million parameters, 0.9 million of them active per token; `pace` is empty or quick."""
    if pace not in ("", "quick"):
        raise UserError(f"--config=configs/nano.py:{pace}: unknown; allowed: quick, or nothing behind the file's name")
    config = full()
    return quicker(config) if pace == "quick" else config


def quicker(config):
    """Few tasks of small repositories, few steps; two compiled training shapes instead of four."""
    config.name, config.sandbox = "nano_quick", "local"
    tasks, midtrain, sft, experts, distill = config.tasks, config.midtrain, config.sft, config.experts, config.distill
    tasks.repos_train = repositories.pinned("uritemplate==4.2.0", "munch==4.0.0", "textfsm==2.1.0")
    tasks.repos_heldout = repositories.pinned("xmltodict==1.0.4", "parse==1.22.4")
    tasks.train, tasks.heldout, tasks.candidates_per_repo = 24, 12, 60
    midtrain.train.steps = 10
    for source in midtrain.sources.values():
        source.megabytes = 0.3
    sft.train.steps = 30
    sft.sources.nano.options.guesses, sft.sources.nano.options.per_task = 0, 1
    for stage in (experts, distill):
        stage.updates, stage.prompts, stage.group_size = 2, 3, 4
    for stage in (experts, distill, config.evaluate):
        stage.rollout.slots, stage.rollout.several_shapes = 24, False
    config.evaluate.tasks, config.evaluate.pass_k_tasks, config.evaluate.samples = 12, 2, 2
    config.evaluate.sft_control = False
    return config


def full():
    """The main job."""
    model = ModelConfig(
        vocab_size=1104, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=LENGTH, rope_theta=10_000.0, linear_num_key_heads=4,
        linear_key_head_dim=32, linear_num_value_heads=4, linear_value_head_dim=32, num_experts=16,
        num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64,
        router_aux_loss_coef=0.01, num_nextn_predict_layers=1, dtype="float32", chunk_size=16, scan_layers=False,
    )
    # The same for all rollouts of a run, so that what is compiled serves all; no turn of the solver has 80 tokens. Most
    # episodes wait for tests: a step of few lanes takes a small part of the time of one of 96.
    rollout = RolloutConfig(max_turns=8, max_new_tokens=80, max_length=LENGTH, slots=96, several_shapes=True)
    train = lambda steps, rate, rows=4, length=LENGTH, mtp_coef=0.0: TrainConfig(
        steps=steps, rows=rows, sequence_length=length, mtp_coef=mtp_coef,
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=20, weight_decay=0.05))
    # The gradients of a few hundred episodes are mostly noise; with a small eps AdamW would take full steps along it,
    # which costs the policy its tool format, or what it does after a test run. This eps fits losses that are weighted
    # means over tokens, as those of both averages are, with a mean weight of 1. Momentum needs enough updates to
    # average over: a handful would take the first one's steps again.
    steady = lambda rate, **momentum: OptimizerConfig(
        learning_rate=rate, weight_decay=0.0, eps=3e-4, clip_norm=0.3, **({"warmup_steps": 0, "b1": 0.0} | momentum))
    # The training repositories and part of the standard library, in three forms.
    text = lambda form, share: TextSource(kind="nano", form=form, share=share, megabytes=3.0)
    sources = {"repository": text("repository", 0.2), "fim": text("fim", 0.1), "edits": text("nano_edits", 0.7)}
    return to_config_dict(RunConfig(
        name="nano",
        templates=TEMPLATES,
        model=model,
        tokenizer=TokenizerConfig(vocab_size=model.vocab_size, added_tokens=LINE_TOKENS),
        tasks=TasksConfig(
            repos_train=repositories.pinned(*repositories.TRAIN),
            repos_heldout=repositories.pinned(*repositories.HELDOUT),
            train=300, heldout=110,
            kinds=KINDS, max_function_lines=14, single_line=True, at_fault=True,
            # A model of this size writes no reproduction: it is told the call and its tests, and runs these.
            statement="observed", statement_characters=220, hide_tests=False,
            held_out=False,  # nothing here grades by them
            pass_to_pass=40),  # a verdict at most twice as long as with the defective function's tests alone
        midtrain=MidtrainConfig(
            train=train(40, 1e-3, rows=6, length=512, mtp_coef=0.1), sources=sources),
        sft=SftConfig(train=train(300, 1e-3), sources={"nano": ChatSource(kind="nano", options={
            "per_task": 2, "recovery": 0.6, "searches": 0, "guesses": 4})}),
        # Edits that failed are not tried again, and one that is right at once is worth more than a later one: a third
        # to two thirds of the groups teach something then, without either a tenth to a third.
        experts=ExpertsConfig(updates=12, prompts=16, group_size=8, redraws=16, attempt_discount=0.7, rows=4,
                    sequence_length=LENGTH, average="episode", negative_weight=0.2, repeat_penalty=0.5,
                    optimizer=steady(5e-4, b1=0.9, warmup_steps=2), rollout=rollout),
        distill=DistillConfig(updates=4, prompts=12, rows=4, sequence_length=LENGTH, optimizer=steady(2e-4),
                              rollout=rollout),
        evaluate=EvaluateConfig(tasks=100, pass_k_tasks=8, temperature=1.0, redraws=16, rollout=rollout),
    ))
