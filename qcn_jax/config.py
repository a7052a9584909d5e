"""Configuration: frozen dataclasses, one for the model, one for the mesh and one per stage.

A config file is Python with `get_config()` that returns `to_config_dict(RunConfig(...))`; flags override single values
(`--config.sft.steps=100`), and `from_config_dict` turns the result back into dataclasses and refuses unknown or
ill-typed keys by name. ModelConfig carries Hugging Face's field names. What a field may hold is said in its annotation;
config_checks reads that, and holds the rules between fields.
"""

import dataclasses
import operator
from typing import Annotated, Any

from qcn_jax import config_names as known
from qcn_jax.config_dicts import from_config_dict as from_config_dict
from qcn_jax.config_dicts import new_name as new_name
from qcn_jax.config_dicts import to_config_dict as to_config_dict
from qcn_jax.config_domains import ProblemsConfig as ProblemsConfig
from qcn_jax.config_domains import ToolCallsConfig as ToolCallsConfig
from qcn_jax.config_domains import WebConfig as WebConfig
from qcn_jax.config_values import OneOf, Within

Count = Annotated[int, Within(at_least=0)]
Positive = Annotated[int, Within(at_least=1)]
Amount = Annotated[float, Within(at_least=0)]
AboveZero = Annotated[float, Within(above=0)]
Share = Annotated[float, Within(at_least=0, at_most=1)]
Decay = Annotated[float, Within(at_least=0, below=1)]  # of a running mean
Parts = Annotated[int, Within(at_least=1, also=(-1,))]
Dtype = Annotated[str, OneOf("float32", "bfloat16", "float16", "float64")]
MomentDtype = Annotated[str, OneOf("float32", "bfloat16")]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of Qwen3-Next or of Qwen3.5's text model; defaults are Qwen3-Coder-Next's (80B total, 3B active).

    The first group is Hugging Face's config.json under the same names; the second says how it is computed
    and changes no function of the weights beyond rounding.
    """

    model_type: Annotated[str, OneOf("qwen3_next", "qwen3_5_moe_text", "qwen3_5_text")] = "qwen3_next"  # see hub.layout
    vocab_size: Positive = 151_936
    hidden_size: Positive = 2048
    num_hidden_layers: Positive = 48
    num_attention_heads: Positive = 16
    num_key_value_heads: Positive = 2
    head_dim: Positive = 256
    max_position_embeddings: Positive = 262_144
    rope_theta: AboveZero = 5_000_000.0
    partial_rotary_factor: Share = 0.25
    rms_norm_eps: AboveZero = 1e-6
    linear_num_key_heads: Positive = 16
    linear_key_head_dim: Positive = 128
    linear_num_value_heads: Positive = 32
    linear_value_head_dim: Positive = 128
    linear_conv_kernel_dim: Positive = 4
    intermediate_size: Count = 0  # of the MLP of qwen3_5_text, which has no experts
    num_experts: Count = 512
    num_experts_per_tok: Positive = 10
    norm_topk_prob: bool = True
    moe_intermediate_size: Positive = 512
    shared_expert_intermediate_size: Positive = 512
    full_attention_interval: Positive = 4
    router_aux_loss_coef: Amount = 0.001
    tie_word_embeddings: bool = False
    initializer_range: Amount = 0.02
    num_nextn_predict_layers: Annotated[int, OneOf(0, 1)] = 0  # 1: the checkpoint holds (or training adds) an MTP block

    dtype: Dtype = "bfloat16"  # of activations; decay, router, softmax, norms' insides stay float32
    param_dtype: Dtype = "float32"
    remat: known.RematPolicy = "none"  # a policy name of layers.remat: none, full, ...
    scan_layers: bool = True  # one compiled layer for all; False: each apart, which saves copies (few layers on a CPU)
    delta_rule: Annotated[str, OneOf("chunked", "recurrent", "pallas")] = "chunked"  # XLA, token by token, TPU or GPU
    chunk_size: Positive = 64  # pallas: best 128 on a TPU, at most 64 on a GPU
    attention: Annotated[str, OneOf("xla", "splash")] = "xla"  # xla or splash (TPU)
    moe: known.MoeBackend = "auto"  # grouped-matmul back end: auto, blocked, looped, ragged, dense, megablox (TPU)


# Fields of ModelConfig that say how the function is computed, not which function it is.
COMPUTE_FIELDS = ("dtype", "param_dtype", "remat", "scan_layers", "delta_rule", "chunk_size", "attention", "moe")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the named mesh axes, one of which may be -1 (whatever devices are left), and how work crosses them."""

    data: Parts = 1
    fsdp: Parts = -1
    expert: Parts = 1
    tensor: Parts = 1
    context: Parts = 1
    # How tokens reach experts on other devices: ragged (all-to-all, nothing dropped), capacity (all-to-all of fixed
    # size, overflow dropped and counted) or gather (all-gather and reduce-scatter, nothing dropped).
    dispatch: known.Dispatch = "ragged"
    dispatch_buffer: Amount = 1.25  # rows of a device's experts at a time, of a balanced load; 0: room for any routing


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon with linear warm-up and cosine decay to `final_fraction` of the peak."""

    name: Annotated[str, OneOf("adamw", "muon")] = "adamw"  # adamw or muon
    learning_rate: Amount = 2e-3
    warmup_steps: Count = 20
    final_fraction: Share = 0.1
    weight_decay: Amount = 0.1
    b1: Decay = 0.9  # of AdamW, as b2 and eps are, also where Muon leaves parameters to it
    b2: Decay = 0.95
    eps: AboveZero = 1e-8  # above the typical gradient's size, AdamW comes near to plain descent: noise is not blown up
    clip_norm: AboveZero = 1.0
    # Of the moments as they are kept; updates are computed in float32. bfloat16 is rounded at random, without bias.
    mu_dtype: MomentDtype = "float32"
    nu_dtype: MomentDtype = "float32"  # Muon keeps a second moment for what it leaves to AdamW
    master_copy: bool = False  # float32 parameters in the optimizer's state, for a lower model.param_dtype
    offload: bool = False  # the optimizer's state in host memory between steps, where the device allows it


@dataclasses.dataclass(frozen=True)
class TasksConfig:
    """Stage `tasks`: tasks of given files are read and checked, or source distributions become verified tasks."""

    data: str = ""  # a file, a folder or a glob of training tasks; where given, none are made of repositories
    heldout_data: str = ""  # likewise of held-out ones
    malformed: known.Malformed = "stop"  # what an unusable task of `data` does: stop, or skip it and count it
    verify: Count = 16  # of each file's tasks, executed with their gold patch and without, first; 0: none
    setup: tuple[str, ...] = ()  # shell commands that install what the repositories of `data` need (docker)
    modules: str = ""  # folder whose node_modules pages are built from; by default npm installs React and Vite once
    image_timeout: AboveZero = 1800.0  # seconds for the tests of a task of `data` that has an image of its own
    verifier_network: bool = False  # whether solutions and tests of Harbor's folders in `data` reach the network
    # PyPI requirements, "toolz==1.2.0" or with a hash "toolz==1.2.0#sha256=9667...", or archives or folders; beside
    # `data`, where its tasks' repositories are if neither beside it nor to be downloaded.
    repos_train: tuple[str, ...] = ()
    repos_heldout: tuple[str, ...] = ()
    train: Count = 800  # verified tasks wanted, where none are given
    heldout: Count = 200
    candidates_per_repo: Positive = 400  # at most this many are executed
    max_function_lines: Positive = 30
    test_timeout: AboveZero = 10.0  # seconds for one candidate's tests
    reruns: Count = 1  # further runs of every kept task that must agree (flakiness)
    # Names of envs.synthesis.inject.KINDS, all where empty; of the tasks and of mid-training's edit documents.
    kinds: tuple[known.BugKind, ...] = ()
    single_line: bool = False  # only defects within one line, which the compact edit tool can mend
    pass_to_pass: Count = 0  # tests that do not call the defective function, spread, of quick ones; 0: all
    statement: known.Statement = "issue"  # as a user reports it, without tests; or calls and tests
    held_out: bool = True  # tests that no agent sees are made for each task
    near_duplicates: AboveZero = 0.9  # tasks of one file whose changes are this alike are kept once; above 1: all
    hide_tests: bool = True  # tests that show the defect are not in the tree that the agent sees
    statement_characters: Positive = 1500  # longest problem statement
    at_fault: bool = False  # only tasks whose statement tells of the defective function itself, not of one it misleads


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What midtrain and sft share: budget, batch shape, optimizer, checkpoint rhythm.

    A stage ends after `steps` steps. `rows` rows of `sequence_length` tokens make one step's batch.
    """

    steps: Count = 200
    rows: Positive = 8
    sequence_length: Positive = 1024
    mtp_coef: Amount = 0.1
    mtp_steps: Positive = 1  # tokens predicted beyond the next; above one the MTP block is fed its own output
    # Slices of the rows that go through the model one after the other. With a balance loss the experts' loads of all
    # slices are counted first, which takes one more forward pass; the step is that of the undivided rows.
    accumulate: Positive = 1
    checkpoint_every: Positive = 100
    log_every: Positive = 10
    keep: Positive = 2  # checkpoints kept; of 1 alone there is none to fall back on where it is damaged
    # Stop at a loss or gradient that is not finite, or skip such steps, few in a row.
    nonfinite: known.Nonfinite = "stop"
    optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """A phase of mid-training: so many steps with a batch shape, mesh and mixture of their own; 0 is the stage's value.

    mesh: overrides of config.mesh's fields; shares: of sources, by name.
    """

    steps: Positive = 1
    sequence_length: Count = 0
    rows: Count = 0
    accumulate: Count = 0
    mesh: dict[str, Any] = dataclasses.field(default_factory=dict)
    shares: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Texts, and the documents that mid-training makes of them.

    Sources that differ in form and share alone are read once.
    """

    kind: known.TextReader = "files"  # who reads (pipeline.data.readers)
    path: str = ""  # a file, a folder or a glob
    form: known.DocumentForm = "text"  # what becomes of the texts (pipeline.data.documents)
    share: Amount = 1.0  # of the tokens; shares need not sum to one
    megabytes: Amount = 0.0  # of text that is read at most; 0: all
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the reader, which says what it knows


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """Which texts are left out, beside copies of held-out code; 0, false and an empty list are off."""

    min_characters: Count = 0
    max_characters: Count = 0
    max_line: Count = 0  # characters of the longest line; minified code has longer ones
    generated: bool = False  # those whose head says that a program wrote them
    licences: tuple[str, ...] = ()  # allowed ones; a text without one is left out then
    secrets: bool = False  # those with keys or tokens of a known form (detect-secrets)
    near_duplicates: Share = 0.0  # those that share so much with an earlier one (datasketch); 0.7 is usual


@dataclasses.dataclass(frozen=True)
class MidtrainConfig:
    """Stage `midtrain`: where its texts come from, and what of them is left out."""

    train: TrainConfig = TrainConfig()
    phases: tuple[PhaseConfig, ...] = ()  # one after the other, train.steps in all; one of all steps where empty
    sources: dict[str, TextSource] = dataclasses.field(default_factory=dict)
    data: str = ""  # a file, a folder or a glob; where given, the one source there is
    malformed: known.Malformed = "stop"  # what a malformed row does: stop, or skip it and count it
    filters: FilterConfig = FilterConfig()
    packing: known.Packing = "best_fit"  # best_fit, restart_last, pad_last or concat
    overlong: known.Overlong = "split"  # documents longer than a row: split, slide, slide_merge or drop (data.packing)


@dataclasses.dataclass(frozen=True)
class ChatSource:
    """Conversations to imitate."""

    kind: known.ChatReader = "chat"  # who reads or makes them (pipeline.data.readers)
    path: str = ""  # a file, a folder or a glob
    share: Amount = 1.0  # of the tokens; shares need not sum to one
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the reader, which says what it knows


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Stage `sft`: which conversations are imitated."""

    train: TrainConfig = TrainConfig()
    sources: dict[str, ChatSource] = dataclasses.field(default_factory=dict)
    data: str = ""  # a file, a folder or a glob of conversations; where given, the one source there is
    malformed: known.Malformed = "stop"  # what a malformed row does: stop, or skip it and count it
    packing: known.Packing = "best_fit"  # as in mid-training; restart_last and concat cut conversations
    overlong: known.Overlong = "drop"  # conversations longer than a row; what is not dropped lacks its head later
    scaffold: known.ScaffoldName = "nano"  # how tasks are presented, where conversations are made of tasks
    # What writes conversations, here and where agents act: empty, the template of the folder that the run begins
    # from, where it has one of its own; native, Qwen3-Coder's; or a folder or .jinja file that holds one.
    chat_template: str = ""


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How a policy acts: sampling and limits of an episode.

    What `experts` learns is the policy at this temperature; top_p and top_k must be off there, as the gradient is that
    of the whole distribution. In `distill` all three choose which episodes are looked at: no ratio of probabilities
    enters.
    """

    temperature: Amount = 1.0
    top_p: Annotated[float, Within(above=0, at_most=1)] = 1.0
    top_k: Count = 0
    max_turns: Positive = 8
    max_new_tokens: Positive = 64  # per turn
    max_length: Positive = 1024  # tokens of one episode
    slots: Positive = 64  # episodes generated side by side, over all devices
    prefill_rows: Positive = 16  # of them whose prompts and answers one call takes in, likewise
    prefill_chunk: Positive = 64  # tokens of each of those
    max_num_seqs: Count = 0  # episodes that decode at a time; 0: all. Others keep what they hold, e.g. wait for tools
    block_size: Count = 0  # tokens of a block of keys and values; 0: each episode has one block of max_length
    num_blocks: Count = 0  # that all episodes share, over all devices; 0: as many as they can fill together
    preemption: known.Preemption = "swap"  # blocks that make room for others: swap to host memory, or recompute
    several_shapes: bool = False  # also smaller calls, each compiled when it is first wanted: worth it in long runs


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """Stage `experts`: group-relative policy optimisation, one sub-run per expert in `names`."""

    names: tuple[known.ExpertName, ...] = ("swe", "single_turn", "tool_format")  # pipeline.experts
    scaffold: known.ScaffoldName = "nano"  # how tasks are presented (agents.scaffolds); with a shell: in a live sandbox
    objective: known.Objective = "clipped"  # loss of a token (pipeline.rl.objectives)
    reward: known.Reward = ""  # takes the place of each expert's own
    updates: Positive = 30
    prompts: Positive = 16  # per update
    group_size: Annotated[int, Within(at_least=2)] = 8
    minibatches: Positive = 1  # optimizer steps per update; groups are dealt out to them
    # Tries of the SFT policy per prompt; those are left out on which all earn the same (0: all stay).
    filter_samples: Annotated[int, Within(at_least=2, also=(0,))] = 0
    greedy_turns: tuple[Count, ...] = ()  # turns that a group's samples, in turn, begin with greedily and do not learn
    redraws: Count = 0  # see EvaluateConfig
    seed: Count = 0  # beside RunConfig.seed: other ones repeat the stage, from the same model and on the same tasks
    # An update begins when so many groups (`prompts`) have finished; other episodes stay open over at most this many
    # updates, and go on under the new weights. 0: every update waits for its own groups.
    max_staleness: Count = 1
    stale: known.Stale = "drop"  # groups that would be older: drop them, or cut, to learn from their newer tokens alone
    caches: known.Caches = "recompute"  # of open episodes when the weights change: recompute, or keep
    burst: Positive = 64  # tokens that an episode gets at a time, with max_staleness above 0
    # Fresh samples for each of a group, in place of those that failed for reasons of infrastructure; a group with more
    # failures is given up. 0: groups are learned from without them.
    refills: Count = 8
    rows: Positive = 16
    sequence_length: Positive = 1024
    # token (DAPO): all sampled tokens alike; episode (GRPO): a mean over prompts, of means over episodes, over tokens.
    average: known.Average = "token"
    # Which experts tokens go to when they are learned from: free, those that the moved routers choose; replay, those of
    # when the policy acted (arXiv 2510.11370); frozen, and routers do not learn; first, those of the weights before the
    # update, for several minibatches. auto: replay for asynchronous updates of models with experts, else free.
    routing: known.Routing = "auto"
    negative_weight: Amount = 1.0  # factor of negative advantages; a policy that starts out narrow unlearns with 1
    clip_low: Share = 0.2
    clip_high: Amount = 0.28
    ratio_cap: AboveZero = 2.0  # of importance weights, in `reinforce` and `decoupled`
    # Tokens outside of (least, most) ratio to the policy that drew them are left out, and those of negative advantage
    # in episodes that are less probable by more than this per token; empty and 0: none.
    ratio_bounds: tuple[Amount, ...] = ()
    negative_bound: Amount = 0.0
    advantage_baseline: known.AdvantageBaseline = "mean"  # what rewards are compared with: mean, leave_one_out
    advantage_scale: known.AdvantageScale = "std"  # divided by: std (GRPO), none (Dr. GRPO)
    kl_coef: Amount = 0.0
    # Of a reward, for every run of the tests that failed before: right at once is better than right in the end.
    attempt_discount: Share = 1.0
    unfinished_penalty: Amount = 0.2
    malformed_penalty: Amount = 0.2
    repeat_penalty: Amount = 0.2  # of turns that come again to files on which the tests have failed
    checkpoint_every: Positive = 5  # updates
    log_every: Positive = 1  # updates
    keep: Positive = 2  # checkpoints kept
    nonfinite: known.Nonfinite = "stop"  # stop, or skip such updates, few in a row
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, warmup_steps=2, weight_decay=0.0)
    rollout: RolloutConfig = RolloutConfig()


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Stage `distill`: experts into the SFT model by on-policy reverse KL per domain."""

    scaffold: known.ScaffoldName = "nano"  # see ExpertsConfig
    updates: Positive = 20
    prompts: Positive = 16
    group_size: Positive = 4
    rows: Positive = 16
    sequence_length: Positive = 1024
    loss: known.DistillLoss = "reverse_kl"  # reverse_kl, forward_kl or rejection_sft
    checkpoint_every: Positive = 5  # updates
    log_every: Positive = 1  # updates
    keep: Positive = 2  # checkpoints kept
    nonfinite: known.Nonfinite = "stop"  # stop, or skip such updates, few in a row
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, warmup_steps=2, weight_decay=0.0)
    rollout: RolloutConfig = RolloutConfig()


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Stage `evaluate`: greedy on `tasks` held-out tasks, `samples` samples on `pass_k_tasks` of them."""

    tasks: Positive = 200
    pass_k_tasks: Count = 100
    samples: Count = 8
    temperature: AboveZero = 0.8  # of samples, and of turns that are drawn again
    redraws: Count = 0  # of a turn that comes again to files on which tests failed: it counts for nothing
    seed: Count = 0  # beside RunConfig.seed: other ones draw anew, and train the control anew
    scaffold: known.ScaffoldName = "nano"  # see ExpertsConfig
    baseline: known.Baseline = "heuristic"  # plays without a model (pipeline.evaluate.baseline); empty: none
    sft_control: bool = True  # also train and evaluate the equal-time imitation control
    rollout: RolloutConfig = RolloutConfig()


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Byte-level BPE of `vocab_size` entries, trained without held-out repositories; for init=random."""

    vocab_size: Positive = 1152
    added_tokens: tuple[str, ...] = ()  # those of the scaffolds, in the order of their ids, behind the templates' own


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything `qcn run` reads."""

    name: str = "nano"
    seed: Annotated[int, Within(at_least=0, below=2**31)] = 0
    init: str = "base"  # random, a Hugging Face folder, base (the packaged one) or the package.module:OBJECT of one
    vision: Annotated[str, OneOf("keep", "drop")] = "keep"  # what becomes of an encoder of images
    sandbox: Annotated[str, OneOf("auto", "docker", "local")] = "auto"  # auto, docker or local
    network: Annotated[str, OneOf("none", "filtered")] = "none"  # agents': none, or package indexes and documentation
    workers: Positive = 2  # environment workers
    pool: known.Pool = "process"  # where they run: process (this machine) or ray (a cluster)
    ray_address: str = ""  # of the cluster; by default RAY_ADDRESS, or one of this machine
    templates: tuple[known.Template, ...] = ()  # tool-call templates of the format domain; all where empty
    heldout_templates: tuple[known.Template, ...] = ()  # of stage evaluate alone
    topology: str = ""  # of `qcn compile` where no flag names one
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    tasks: TasksConfig = TasksConfig()
    midtrain: MidtrainConfig = MidtrainConfig()
    sft: SftConfig = SftConfig()
    experts: ExpertsConfig = ExpertsConfig()
    problems: ProblemsConfig = ProblemsConfig()
    tool_calls: ToolCallsConfig = ToolCallsConfig()
    web: WebConfig = WebConfig()
    distill: DistillConfig = DistillConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


# Where a training stage's batch shape and optimizer are, within RunConfig.
TRAINING = {"midtrain": "midtrain.train", "sft": "sft.train", "experts": "experts", "distill": "distill"}


def training_settings(config: RunConfig, stage: str) -> Any:
    """The TrainConfig, ExpertsConfig or DistillConfig of a training stage (a key of TRAINING)."""
    return operator.attrgetter(TRAINING[stage])(config)
