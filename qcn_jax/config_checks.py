"""Whether a configuration can be run, asked before any work: every field, then the rules between fields.

What a single field may hold stands beside it in config.py. A rule between fields is a function here that yields a line
for whatever is wrong; add it to `_RULES` with the stages that it concerns. What depends on the devices is in
pipeline.train.divisibility.
"""

import importlib.util
import operator
import re
from collections.abc import Callable, Iterator, Sequence

from qcn_jax.config import (
    TRAINING,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    from_config_dict,
    to_config_dict,
    training_settings,
)
from qcn_jax.config_phases import chats_of, has_data, midtrain_phases, sources_of
from qcn_jax.config_values import refusals
from qcn_jax.errors import UserError
from qcn_jax.pipeline.rl.settings import contradictions

SHOWN = 3  # lines of one refusal that are given whole


def check(config: RunConfig, stages: Sequence[str]) -> None:
    """Checks all fields, and the rules that concern `stages`, the ones that are still to be run.

    Raises:
      UserError: one line that names what is wrong and what is allowed.
    """
    check_sizes(config, stages)
    _raise_first(_apply(_INPUT_RULES, config, stages))


def check_sizes(config: RunConfig, stages: Sequence[str]) -> None:
    """As `check`, without what only a run needs: the initial model, repositories, a package for its pool."""
    from_config_dict(RunConfig, to_config_dict(config))  # types, which a config built in Python may not have
    _raise_first(refusals(config, "--config"))
    _raise_first(_apply(_SIZE_RULES, config, stages))


def check_model(model: ModelConfig, prefix: str = "--config.model") -> None:
    """Checks a model's fields and the rules between them.

    Raises:
      UserError: see `check`.
    """
    _raise_first(refusals(model, prefix))
    _raise_first(_model(model, prefix))


def _raise_first(lines: Iterator[str]) -> None:
    found = list(lines)
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError("; ".join(found[:SHOWN]) + more)


def _apply(rules: Sequence[tuple[Callable[[RunConfig], Iterator[str]], Sequence[str]]], config: RunConfig,
           stages: Sequence[str]) -> Iterator[str]:
    for rule, concerned in rules:
        if set(concerned) & set(stages):
            yield from rule(config)


def _model(model: ModelConfig, prefix: str) -> Iterator[str]:
    for whole, part in (("num_attention_heads", "num_key_value_heads"),
                        ("linear_num_value_heads", "linear_num_key_heads")):
        if getattr(model, whole) % getattr(model, part):
            yield f"{prefix}.{whole}: {getattr(model, whole)} is not a multiple of {part}, {getattr(model, part)}"
    dense = model.model_type == "qwen3_5_text"
    for name, wanted in (("num_experts", not dense), ("intermediate_size", dense)):
        if bool(getattr(model, name)) != wanted:
            yield (f"{prefix}.{name}: {getattr(model, name)}; with model_type={model.model_type} "
                   f"{'above 0' if wanted else '0'}")
    if model.num_experts and model.num_experts_per_tok > model.num_experts:
        yield f"{prefix}.num_experts_per_tok: {model.num_experts_per_tok} is more than num_experts, {model.num_experts}"
    rotated = int(model.head_dim * model.partial_rotary_factor)
    if rotated + rotated % 2 > model.head_dim:
        yield (f"{prefix}.head_dim: {model.head_dim}; with partial_rotary_factor={model.partial_rotary_factor} an even "
               "number, as channels are rotated in pairs")
    if model.delta_rule == "pallas" and (model.chunk_size < 16 or model.chunk_size & (model.chunk_size - 1)):
        yield f"{prefix}.chunk_size: {model.chunk_size}; with delta_rule=pallas a power of two from 16 on"


def _precision(config: RunConfig) -> Iterator[str]:
    for name in ("dtype", "param_dtype"):
        if getattr(config.model, name) == "float64":
            import jax

            if not jax.config.jax_enable_x64:
                yield f"--config.model.{name}: float64 is float32 to JAX without JAX_ENABLE_X64=1 in the environment"


def _mesh(config: RunConfig) -> Iterator[str]:
    free = [axis for axis in ("data", "fsdp", "expert", "tensor", "context") if getattr(config.mesh, axis) == -1]
    if len(free) > 1:
        yield f"--config.mesh.{free[1]}: -1, as is {free[0]}; one axis may take the devices that are left"


def _lengths(stage: str) -> Callable[[RunConfig], Iterator[str]]:
    def rule(config: RunConfig) -> Iterator[str]:
        length, most = training_settings(config, stage).sequence_length, config.model.max_position_embeddings
        if length > most:
            yield (f"--config.{TRAINING[stage]}.sequence_length: {length} is more than "
                   f"--config.model.max_position_embeddings, {most}")

    return rule


def _slices(stage: str) -> Callable[[RunConfig], Iterator[str]]:
    def rule(config: RunConfig) -> Iterator[str]:
        train = training_settings(config, stage)
        if train.rows % train.accumulate:
            yield f"--config.{TRAINING[stage]}.accumulate: {train.accumulate} does not divide the {train.rows} rows"

    return rule


def _each_phase(rule: Callable[[RunConfig], Iterator[str]]) -> Callable[[RunConfig], Iterator[str]]:
    """`rule` of mid-training, held against every phase."""

    def of_all(config: RunConfig) -> Iterator[str]:
        for number, (_, phase) in enumerate(midtrain_phases(config), 1):
            name = f" (number {number} of --config.midtrain.phases)" if config.midtrain.phases else ""
            yield from (line + name for line in rule(phase))

    return of_all


def _phases(config: RunConfig) -> Iterator[str]:
    steps = sum(phase.steps for phase in config.midtrain.phases)
    if config.midtrain.phases:
        yield from _each_phase(lambda phase: refusals(phase, "--config"))(config)
    if config.midtrain.phases and steps != config.midtrain.train.steps:
        yield f"--config.midtrain.train.steps: {config.midtrain.train.steps}, but its phases have {steps} together"


def _sources(stage: str) -> Callable[[RunConfig], Iterator[str]]:
    def rule(config: RunConfig) -> Iterator[str]:
        settings = getattr(config, stage)
        if not settings.data and not settings.sources:
            yield f"--config.{stage}.data: is empty, as is sources; name a file, a folder or a glob to learn from"
        if any(not re.fullmatch(r"[A-Za-z_]\w*", name) for name in settings.sources):
            yield f"--config.{stage}.sources: {', '.join(settings.sources)}; names are letters, digits and _"

    return rule


def _shares(stage: str) -> Callable[[RunConfig], Iterator[str]]:
    def rule(config: RunConfig) -> Iterator[str]:
        sources = sources_of(config.midtrain) if stage == "midtrain" else chats_of(config.sft)
        if sources and not sum(source.share for source in sources.values()):
            yield f"--config.{stage}.sources: every share is 0 ({', '.join(sources)}); one must be above 0"

    return rule


def _fits(what: str, *arguments: str) -> Callable[[RunConfig], Iterator[str]]:
    """A rule of pipeline.names: things that are named and meet fit each other."""

    def rule(config: RunConfig) -> Iterator[str]:
        from qcn_jax.pipeline import names

        try:
            getattr(names, what)(config, *arguments)
        except UserError as error:
            yield str(error)

    return rule


def _rollout(rollout: RolloutConfig, name: str, sequence_length: int | None = None) -> Iterator[str]:
    if sequence_length is not None and rollout.max_length > sequence_length:
        yield (f"--config.{name}.rollout.max_length: {rollout.max_length} is more than sequence_length, "
               f"{sequence_length}; an episode is learned from whole")
    if rollout.max_new_tokens >= rollout.max_length:
        yield (f"--config.{name}.rollout.max_new_tokens: {rollout.max_new_tokens} a turn leave nothing of max_length, "
               f"{rollout.max_length}, for the prompt")


def _experts(config: RunConfig) -> Iterator[str]:
    experts = config.experts
    yield from _rollout(experts.rollout, "experts", experts.sequence_length)
    for name, off in (("top_p", 1.0), ("top_k", 0)):
        if getattr(experts.rollout, name) != off:
            yield (f"--config.experts.rollout.{name}: {getattr(experts.rollout, name)}; allowed: {off}, as the "
                   "gradient is of the whole distribution")
    bounds = experts.ratio_bounds
    if bounds and not (len(bounds) == 2 and 0 <= bounds[0] <= 1 <= bounds[1]):
        yield f"--config.experts.ratio_bounds: {bounds}; allowed: (), or two numbers with 1 between, as in (0.5, 5)"
    yield from contradictions(experts, config.model)
    if not experts.rollout.temperature:
        yield "--config.experts.rollout.temperature: 0; samples of a prompt must differ to be compared"
    if experts.minibatches > experts.prompts:
        yield (f"--config.experts.minibatches: {experts.minibatches} is more than prompts, {experts.prompts}; each "
               "takes whole groups")


def _web(config: RunConfig) -> Iterator[str]:
    if bool(config.web.judge_endpoint) != bool(config.web.judge_model):
        yield ("--config.web.judge_endpoint and --config.web.judge_model go together: where the judge answers, and "
               "which model it is")


_OF_EXPERTS = {"single_turn": ("problems.data", "problems.heldout_data"), "web": ("web.judge_endpoint",),
               "tool_format": ("tool_calls.data", "tool_calls.heldout_data")}


def _idle(config: RunConfig) -> Iterator[str]:
    """Files and addresses of experts that the run does not have; a user's own expert may read any of these."""
    names = config.experts.names
    for expert, fields in _OF_EXPERTS.items():
        for field in fields if expert not in names and not any(":" in name for name in names) else ():
            if operator.attrgetter(field)(config):
                yield f"--config.{field}: only expert {expert} reads it, which --config.experts.names does not name"


def _distill(config: RunConfig) -> Iterator[str]:
    distill, experts = config.distill, config.experts.names
    yield from _rollout(distill.rollout, "distill", distill.sequence_length)
    if distill.prompts < len(experts):
        yield (f"--config.distill.prompts: {distill.prompts} an update for {len(experts)} experts "
               f"({', '.join(experts)}); each needs one")


def _evaluate(config: RunConfig) -> Iterator[str]:
    evaluate = config.evaluate
    yield from _rollout(evaluate.rollout, "evaluate")
    if evaluate.pass_k_tasks > evaluate.tasks:
        yield f"--config.evaluate.pass_k_tasks: {evaluate.pass_k_tasks} is more than tasks, {evaluate.tasks}"


def _control(config: RunConfig) -> Iterator[str]:
    if config.evaluate.sft_control and not has_data(config, "sft"):
        yield ("--config.evaluate.sft_control: continues stage sft, for which there are no data; name some as "
               "--config.sft.data, or turn it off")


def _tasks(config: RunConfig) -> Iterator[str]:
    tasks = config.tasks
    splits = (("train", tasks.train, tasks.repos_train, "data", tasks.data),
              ("heldout", tasks.heldout, tasks.repos_heldout, "heldout_data", tasks.heldout_data))
    for name, wanted, repos, field, given in splits:
        if wanted and not repos and not given:
            yield (f"--config.tasks.{name}: {wanted} tasks wanted, but repos_{name} is empty, as is {field}; name "
                   "repositories to make them of or a file of tasks, or want 0")
    if not any(wanted or repos or given for _, wanted, repos, _, given in splits):
        yield ("--config.tasks.data: is empty, as are heldout_data, repos_train and repos_heldout; name a file of "
               "tasks, or repositories to make them of")
    if not tasks.data and not tasks.heldout_data:
        yield from in_both(tasks.repos_train, tasks.repos_heldout)


def _wants(split: str, field: str, what: str) -> Callable[[RunConfig], Iterator[str]]:
    """A rule of stages that act: there must be tasks to act on, unless experts bring their own."""

    def rule(config: RunConfig) -> Iterator[str]:
        from qcn_jax.pipeline.names import wants_tasks

        if not getattr(config.tasks, field) and not getattr(config.tasks, split) and wants_tasks(config):
            yield (f"--config.tasks.{field}: is empty and --config.tasks.{split} is 0; {what} tasks: name a file of "
                   "them, or how many to make of repositories")

    return rule


def _unversioned(name: str) -> str:
    """A repository without its version, or a template of pages without the seed of its words."""
    return re.sub(r"^(pages:\w+):\d+$", r"\1", name.split("==")[0])


def in_both(train: Sequence[str], heldout: Sequence[str]) -> Iterator[str]:
    """A line for every project of which both splits have a version."""
    for project in sorted(set(map(_unversioned, train)) & set(map(_unversioned, heldout))):
        yield f"--config.tasks.repos_heldout: {project} is in repos_train too; the splits must be disjoint"


def _initial_model(config: RunConfig) -> Iterator[str]:
    from qcn_jax.pipeline.stages import midtrain

    try:
        midtrain.check_initial(config)
    except UserError as error:
        yield str(error)


def _start(*before: str) -> Callable[[RunConfig], Iterator[str]]:
    """A rule of stages that begin from the initial model where the stages `before` have no data."""

    def rule(config: RunConfig) -> Iterator[str]:
        if any(has_data(config, stage) for stage in before):
            return
        if config.init == "random":
            names = " or ".join(f"--config.{stage}.data" for stage in before)
            yield f"--config.init: random; without {names} name a Hugging Face folder to begin from"
        else:
            yield from _initial_model(config)

    return rule


def _pool(config: RunConfig) -> Iterator[str]:
    if config.pool == "ray" and importlib.util.find_spec("ray") is None:
        yield "--config.pool=ray: ray is not installed; pip install 'qcn_jax[ray]'"
    if config.pool != "ray" and config.ray_address:
        yield f"--config.ray_address: {config.ray_address!r} has no use with --config.pool={config.pool}"


_STAGES_WITH_MODEL = (*TRAINING, "evaluate")
_SIZE_RULES = (
    (lambda config: _model(config.model, "--config.model"), _STAGES_WITH_MODEL),
    (_precision, _STAGES_WITH_MODEL),
    (_mesh, _STAGES_WITH_MODEL),
    (_phases, ("midtrain",)),
    *((_each_phase(rule("midtrain")), ("midtrain",)) for rule in (_lengths, _slices)),
    *((_lengths(stage), (stage,)) for stage in TRAINING if stage != "midtrain"),
    (_slices("sft"), ("sft",)),
    (_experts, ("experts",)),
    (_web, ("experts", "distill", "evaluate")),
    (_idle, ("experts", "distill", "evaluate")),
    (_fits("check_experts"), ("experts", "distill", "evaluate")),
    (_distill, ("distill",)),
    (_evaluate, ("evaluate",)),
)
_INPUT_RULES = (
    (_tasks, ("tasks",)),
    (_fits("check_tasks"), ("tasks",)),
    (_wants("train", "data", "experts and distill need"), ("experts", "distill")),
    (_wants("heldout", "heldout_data", "evaluate needs"), ("evaluate",)),
    (_initial_model, ("midtrain",)),
    (_start("midtrain"), ("sft",)),
    (_start("midtrain", "sft"), ("experts", "distill", "evaluate")),
    *((_sources(stage), (stage,)) for stage in ("midtrain", "sft")),
    (_each_phase(_shares("midtrain")), ("midtrain",)),
    (_shares("sft"), ("sft",)),
    (_fits("check_sources"), ("midtrain",)),
    (_fits("check_chats"), ("sft",)),
    *((_fits("check_scaffold", stage), (stage,)) for stage in ("experts", "distill", "evaluate")),
    (_fits("check_baseline"), ("evaluate",)),
    (_control, ("evaluate",)),
    (_pool, ("tasks", "sft", "experts", "distill", "evaluate")),
)
