"""Whether the things that a configuration names fit each other; asked before any work (config_checks)."""

from qcn_jax.agents.scaffolds import SCAFFOLDS
from qcn_jax.chat.templates import TEMPLATES
from qcn_jax.config import RunConfig
from qcn_jax.config_phases import chats_of, source_field, sources_of, used_sources
from qcn_jax.errors import UserError
from qcn_jax.pipeline.chat_template import chat_template
from qcn_jax.pipeline.data import filters
from qcn_jax.pipeline.data.documents import FORMS
from qcn_jax.pipeline.data.readers import CHATS, READERS, task_sets
from qcn_jax.pipeline.evaluate.baseline import baseline_of
from qcn_jax.pipeline.experts import experts_of, headline


def check_experts(config: RunConfig) -> None:
    """Raises UserError for names of experts, or of templates, that do not go together."""
    experts_of(config.experts.names)
    both = sorted(set(config.templates) & set(config.heldout_templates))
    if both:
        raise UserError(f"--config.heldout_templates: {both[0]!r} is one of --config.templates, too")
    if not set(config.templates or TEMPLATES) - set(config.heldout_templates):
        raise UserError("--config.heldout_templates: leaves no template to train on")


def wants_tasks(config: RunConfig) -> bool:
    """Whether some expert acts on the run's tasks."""
    return any(expert.wants_tasks(config) for expert in experts_of(config.experts.names))


def check_sources(config: RunConfig) -> None:
    """Raises UserError for a source of mid-training that cannot be read, or a form or filter that cannot be had."""
    filters.check(config.midtrain.filters, "--config.midtrain.filters")
    for name in used_sources(config):
        source, field = sources_of(config.midtrain)[name], source_field(config, "midtrain", name)
        FORMS.resolve(source.form, f"{field}.form")
        READERS.resolve(source.kind, f"{field}.kind").check(config, source, field)


def check_chats(config: RunConfig) -> None:
    """Raises UserError for a source of SFT that cannot be read, options that nobody has a use for, or no template."""
    chat_template(config)
    for name, source in chats_of(config.sft).items():
        if not source.share:
            continue
        field = source_field(config, "sft", name)
        CHATS.resolve(source.kind, f"{field}.kind").check(config, source, field)


def check_tasks(config: RunConfig) -> None:
    """Raises UserError for a file of tasks that cannot be read or holds none."""
    task_sets.check(config.tasks)


def needs_sandbox(config: RunConfig, stage: str) -> bool:
    """Whether a stage that may execute code does so with this configuration."""
    return stage != "sft" or any(CHATS.resolve(source.kind).sandbox for source in chats_of(config.sft).values())


def check_scaffold(config: RunConfig, stage: str) -> None:
    """Raises UserError where an expert cannot present tasks by `stage`'s scaffold, or its turns cannot be redrawn."""
    name, field = getattr(config, stage).scaffold, f"--config.{stage}.scaffold"
    scaffold = SCAFFOLDS.resolve(name, field)
    redraws = getattr(getattr(config, stage), "redraws", 0)
    if redraws and scaffold.has_shell:
        raise UserError(f"--config.{stage}.redraws: {redraws}; what shell commands did cannot be taken back; use 0, "
                        f"or a scaffold without a shell, which {name!r} is not")
    for expert in experts_of(config.experts.names):
        try:
            expert.configured(config, "heldout" if stage == "evaluate" else "train").present(scaffold)
        except UserError as error:
            raise UserError(f"{field}: {name!r}; {error}, which expert {expert.name} asks for") from error


def check_baseline(config: RunConfig) -> None:
    """Raises UserError where the baseline cannot play what the experts are evaluated on."""
    baseline, name = baseline_of(config), config.evaluate.baseline
    if baseline is not None:
        first = headline(experts_of(config.experts.names))
        if not first.wants_tasks(config):
            raise UserError(f"--config.evaluate.baseline: {name!r}; plays the run's tasks, and expert {first.name} has "
                            "only its own; leave it empty")
        try:
            baseline.check(SCAFFOLDS.resolve(config.evaluate.scaffold, "--config.evaluate.scaffold"))
        except UserError as error:
            line = f"--config.evaluate.baseline: {name!r}; {error}; leave it empty, or name another"
            raise UserError(line) from error
