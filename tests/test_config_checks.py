"""Wrong configurations: each one line that names the key and what is allowed, before any work."""

import dataclasses
import json
import os
import pathlib
import runpy
import subprocess
import sys
import time
import typing

import pytest
from absl import flags

from qcn_jax import config_checks, testing
from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.cli import parsing
from qcn_jax.config import (
    DistillConfig,
    ExpertsConfig,
    ModelConfig,
    RunConfig,
    TasksConfig,
    from_config_dict,
    to_config_dict,
)
from qcn_jax.config_phases import midtrain_phases
from qcn_jax.config_values import Known, OneOf, Within
from qcn_jax.errors import UserError
from qcn_jax.hub import configuration
from tests.pipeline import chain, own_files

ROOT = pathlib.Path(__file__).resolve().parents[1]
STAGES = ("tasks", "midtrain", "sft", "experts", "distill", "evaluate", "report")
TALKER = Scaffold("talker", ())


@pytest.fixture(scope="module", name="config")
def _config(tmp_path_factory):
    return runpy.run_path(str(chain.write(tmp_path_factory.mktemp("micro"))))["get_config"]()


def changed(config, **values):
    """A copy with dotted keys (dots written __) set, whatever their types."""
    copy = config.copy_and_resolve_references().unlock()
    for key, value in values.items():
        *groups, name = key.split("__")
        group = copy
        for part in groups:
            group = group[part]
        with group.ignore_type():
            group[name] = value
    return copy


def refusal(config, stages=STAGES, **values):
    with pytest.raises(UserError) as caught:
        config_checks.check(from_config_dict(RunConfig, changed(config, **values)), stages)
    line = str(caught.value)
    assert "\n" not in line and line.startswith("--config.")
    return line


# One value that its own field does not allow: key, value, what the line says besides both.
FIELDS = [
    ("seed", -1, "at least 0"),
    ("seed", 2**31, "below 2147483648"),
    ("seed", 10**400, "below 2147483648"),
    ("workers", 0, "at least 1"),
    ("workers", -2, "at least 1"),
    ("sandbox", "podman", "auto, docker, local"),
    ("pool", "slurm", "process, ray"),
    ("templates", ("qwen9",), "qwen3_coder"),
    ("model__vocab_size", 0, "at least 1"),
    ("model__hidden_size", -8, "at least 1"),
    ("model__num_hidden_layers", 0, "at least 1"),
    ("model__num_attention_heads", 0, "at least 1"),
    ("model__num_key_value_heads", 0, "at least 1"),
    ("model__linear_num_key_heads", 0, "at least 1"),
    ("model__linear_conv_kernel_dim", 0, "at least 1"),
    ("model__num_experts", -1, "at least 0"),
    ("model__model_type", "qwen9", "qwen3_next, qwen3_5_moe_text, qwen3_5_text"),
    ("model__num_experts_per_tok", 0, "at least 1"),
    ("model__full_attention_interval", 0, "at least 1"),
    ("model__partial_rotary_factor", 1.5, "at most 1"),
    ("model__rope_theta", 0.0, "above 0"),
    ("model__rms_norm_eps", float("inf"), "above 0"),
    ("model__router_aux_loss_coef", float("nan"), "at least 0"),
    ("model__num_nextn_predict_layers", 2, "0, 1"),
    ("model__dtype", "float8", "float32, bfloat16"),
    ("model__param_dtype", "int8", "float32, bfloat16"),
    ("model__remat", "some", "none, full, dots"),
    ("model__delta_rule", "fast", "chunked, recurrent, pallas"),
    ("model__attention", "flash", "xla, splash"),
    ("model__moe", "sparse", "auto, blocked"),
    ("model__chunk_size", 0, "at least 1"),
    ("mesh__data", 0, "at least 1 or -1"),
    ("mesh__tensor", -2, "at least 1 or -1"),
    ("mesh__dispatch", "scatter", "ragged, capacity, gather"),
    ("mesh__dispatch_buffer", -0.5, "at least 0"),
    ("tokenizer__vocab_size", 0, "at least 1"),
    ("tasks__train", -1, "at least 0"),
    ("tasks__candidates_per_repo", 0, "at least 1"),
    ("tasks__test_timeout", 0.0, "above 0"),
    ("tasks__reruns", -1, "at least 0"),
    ("tasks__max_function_lines", 0, "at least 1"),
    ("tasks__kinds", ("add_not", "nonsense"), "flip_comparison"),
    ("midtrain__train__steps", -5, "at least 0"),
    ("midtrain__train__rows", 0, "at least 1"),
    ("midtrain__train__sequence_length", 0, "at least 1"),
    ("midtrain__train__accumulate", 0, "at least 1"),
    ("midtrain__train__checkpoint_every", 0, "at least 1"),
    ("midtrain__train__log_every", 0, "at least 1"),
    ("midtrain__train__keep", 0, "at least 1"),
    ("sft__train__keep", -1, "at least 1"),
    ("sft__train__mtp_steps", 0, "at least 1"),
    ("sft__train__mtp_coef", -0.1, "at least 0"),
    ("sft__train__nonfinite", "ignore", "stop, skip"),
    ("sft__train__optimizer__name", "sgd", "adamw, muon"),
    ("sft__train__optimizer__learning_rate", float("nan"), "at least 0"),
    ("sft__train__optimizer__learning_rate", -1e-3, "at least 0"),
    ("sft__train__optimizer__warmup_steps", -1, "at least 0"),
    ("sft__train__optimizer__final_fraction", 2.0, "at most 1"),
    ("sft__train__optimizer__b1", 1.0, "below 1"),
    ("sft__train__optimizer__b2", -0.1, "at least 0"),
    ("sft__train__optimizer__eps", 0.0, "above 0"),
    ("sft__train__optimizer__clip_norm", 0.0, "above 0"),
    ("sft__train__optimizer__mu_dtype", "float8", "float32, bfloat16"),
    ("midtrain__malformed", "ignore", "stop, skip"),
    ("midtrain__filters__near_duplicates", 1.5, "at most 1"),
    ("midtrain__packing", "first_fit", "best_fit, restart_last"), ("sft__packing", "first_fit", "best_fit, restart_last"),
    ("sft__overlong", "cut", "split, slide, slide_merge, drop"),
    ("sft__malformed", "ignore", "stop, skip"),
    ("tasks__malformed", "ignore", "stop, skip"),
    ("tasks__verify", -1, "at least 0"),
    ("sft__scaffold", "claude", "mini_swe_agent, swe_agent, openhands, qwen_code, claude_code, terminus_json, terminus_xml, "
                               "simulated_user, answer, nano, "
     "package.module:OBJECT"),
    ("experts__objective", "ppo", "clipped, gspo, cispo, reinforce, decoupled, package.module:OBJECT"),
    ("experts__routing", "fixed", "free, replay"),
    ("experts__advantage_baseline", "median", "mean, leave_one_out"),
    ("experts__advantage_scale", "max", "std, none"),
    ("experts__ratio_cap", 0.0, "above 0"),
    ("evaluate__baseline", "best", "heuristic, solver, package.module:OBJECT"),
    ("problems__kinds", ("stdio", "maths"), "stdio, library, sql, secure, instructions"),
    ("problems__languages", ("perl",), "python, javascript, go"),
    ("problems__made", -1, "at least 0"),
    ("experts__names", ("swe", "web9"), "swe, single_turn, tool_format"),
    ("heldout_templates", ("hermes", "kimi"), "qwen3_coder, qwen3_xml_mixed, deepseekr1"),
    ("experts__updates", 0, "at least 1"),
    ("experts__prompts", 0, "at least 1"),
    ("experts__group_size", 1, "at least 2"),
    ("experts__minibatches", 0, "at least 1"),
    ("experts__filter_samples", 1, "at least 2 or 0"),
    ("experts__greedy_turns", (0, -1), "at least 0"),
    ("experts__rows", 0, "at least 1"),
    ("experts__average", "group", "token, episode"),
    ("experts__checkpoint_every", 0, "at least 1"),
    ("experts__clip_low", 1.2, "at most 1"),
    ("experts__kl_coef", -1.0, "at least 0"),
    ("experts__rollout__temperature", -1.0, "at least 0"),
    ("experts__rollout__slots", 0, "at least 1"),
    ("experts__rollout__max_turns", 0, "at least 1"),
    ("distill__rollout__top_p", 0.0, "above 0"),
    ("distill__rollout__top_k", -1, "at least 0"),
    ("distill__loss", "mse", "reverse_kl, forward_kl, rejection_sft"),
    ("distill__updates", 0, "at least 1"),
    ("evaluate__tasks", 0, "at least 1"),
    ("evaluate__samples", -1, "at least 0"),
    ("evaluate__temperature", 0.0, "above 0"),
]
# Rules between fields: the stages that they concern, what changes, and what the line says.
RULES = [
    (STAGES, {"model__num_key_value_heads": 2, "model__num_attention_heads": 3}, ["num_attention_heads: 3", "2"]),
    (STAGES, {"model__linear_num_key_heads": 4}, ["linear_num_value_heads: 2", "4"]),
    (STAGES, {"model__num_experts": 0}, ["model.num_experts: 0", "model_type=qwen3_next above 0"]),
    (STAGES, {"model__model_type": "qwen3_5_text"}, ["model.num_experts: 4; with model_type=qwen3_5_text 0"]),
    (STAGES, {"model__num_experts_per_tok": 5}, ["num_experts_per_tok: 5", "num_experts, 4"]),
    (STAGES, {"model__partial_rotary_factor": 1.0, "model__head_dim": 15}, ["model.head_dim: 15", "even"]),
    (STAGES, {"model__delta_rule": "pallas", "model__chunk_size": 24}, ["chunk_size: 24", "power of two"]),
    (STAGES, {"model__param_dtype": "float64"}, ["model.param_dtype: float64", "JAX_ENABLE_X64=1"]),
    (STAGES, {"mesh__data": -1, "mesh__fsdp": -1}, ["mesh.fsdp: -1", "data"]),
    (("midtrain",), {"midtrain__train__sequence_length": 512}, ["midtrain.train.sequence_length: 512", "384"]),
    (("distill",), {"distill__sequence_length": 512}, ["distill.sequence_length: 512", "max_position_embeddings, 384"]),
    (("sft",), {"sft__train__rows": 4, "sft__train__accumulate": 3}, ["sft.train.accumulate: 3", "4 rows"]),
    (("midtrain",), {"midtrain__phases": ({"steps": 3}, {"steps": 4})}, ["midtrain.train.steps: 4", "7 together"]),
    (("midtrain",), {"midtrain__phases": ({"steps": 1}, {"steps": 3, "sequence_length": 512})},
     ["midtrain.train.sequence_length: 512", "384", "number 2 of --config.midtrain.phases"]),
    (("midtrain",), {"midtrain__phases": ({"steps": 4, "accumulate": 4},)}, ["accumulate: 4", "2 rows", "number 1"]),
    (("midtrain",), {"midtrain__phases": ({"steps": 4, "mesh": {"fsp": 2}},)}, ["phases[0].mesh.fsp", "unknown key"]),
    (("midtrain",), {"midtrain__phases": ({"steps": 4, "mesh": {"dispatch": "post"}},)}, ["mesh.dispatch: 'post'"]),
    (("midtrain",), {"midtrain__phases": ({"steps": 4, "shares": {"fim": -1.0}},)}, ["sources.fim.share: -1.0", "number 1"]),
    (("midtrain",), {"midtrain__phases": ({"steps": 4, "shares": {"edit": 1.0}},)}, ["shares.edit: there is no", "edits"]),
    (STAGES, {"midtrain__phases": ({"steps": 0},)}, ["phases.steps: 0", "at least 1"]),
    (("midtrain",), {"midtrain__sources": {"a": {"kind": "nano", "share": 0.0}}}, ["every share is 0 (a)", "above 0"]),
    (STAGES, {"midtrain__sources": {"a": {"share": -0.3}}}, ["--config.midtrain.sources.a.", "at least 0"]),
    (STAGES, {"midtrain__sources": {"a": {"kind": "x"}}}, ["--config.midtrain.sources.a.", "files, pull_requests, nano, package.module:OBJECT"]),
    (STAGES, {"midtrain__sources": {"a": {"form": "x"}}}, ["--config.midtrain.sources.a.", "text, repository, fim, fim_sentinels, fim_chat, fim_edits, pull_request, pull_request_edits, pull_request_diff, nano_edits, package.module:OBJECT"]),
    (STAGES, {"midtrain__sources": {"a": {"megabytes": float("inf")}}}, ["--config.midtrain.sources.a.", "at least 0"]),
    (("midtrain",), {"midtrain__sources": {}}, ["--config.midtrain.data: is empty, as is sources"]),
    (("midtrain",), {"midtrain__sources": {"a-b": {"kind": "nano"}}}, ["sources: a-b", "letters, digits and _"]),
    (("midtrain",), {"midtrain__data": "/none/*.jsonl"}, ["--config.midtrain.data=/none/*.jsonl: matches no file"]),
    (("midtrain",), {"midtrain__sources": {"a": {"path": "/none"}}}, ["sources.a.path=/none: there is no such file"]),
    (("midtrain",), {"midtrain__sources": {"a": {}}}, ["--config.midtrain.sources.a.path: is empty; allowed: a file, a"]),
    (("midtrain",), {"midtrain__sources": {"a": {"kind": "nano", "path": "x"}}}, ["sources.a.path: 'x'", "kind nano"]),
    (("sft",), {"sft__sources__nano__options": {"per_task": 0}}, ["options.per_task: 0", "searches"]),
    (("sft",), {"sft__sources__nano__options": {"recovery": 1.1}}, ["--config.sft.sources.nano.options.recovery: 1.1", "0 to 1"]),
    (("sft",), {"sft__sources__nano__options": {"guesses": -1}}, ["nano.options.guesses: -1", "at least 0"]),
    (("sft",), {"sft__sources__nano__options": {"serches": 1}}, ["nano.options.serches: unknown key", "recovery, searches"]),
    (("sft",), {"sft__sources__nano__path": "x"}, ["--config.sft.sources.nano.path: 'x'", "kind nano"]),
    (("sft",), {"sft__sources__nano__share": 0.0}, ["--config.sft.sources: every share is 0 (nano)"]),
    (("sft",), {"sft__sources": {}}, ["--config.sft.data: is empty, as is sources"]),
    (("sft",), {"sft__data": "/none.jsonl"}, ["--config.sft.data=/none.jsonl: there is no such file or folder"]),
    (("sft",), {"sft__sources": {"a": {"path": "/none"}}}, ["--config.sft.sources.a.path=/none: there is no such"]),
    (("sft",), {"sft__sources": {"a": {"options": {"template": "x"}}}}, ["a.options.template: 'x'", "qwen3_coder, "]),
    (STAGES, {"sft__sources": {"a": {"kind": "x"}}}, ["--config.sft.sources.a.kind: 'x'", "chat, nano, package.module"]),
    (("sft",), {"sft__scaffold": "swe_agent"}, ["--config.sft.scaffold: 'swe_agent'", "nano"]),
    (("experts",), {"experts__scaffold": "mini_swe_agent"}, ["--config.experts.scaffold: 'mini_swe_agent'", "which expert single_turn"]),
    (("distill",), {"distill__scaffold": f"{__name__}:TALKER"}, ["scaffold talker cannot", "which expert single_turn asks for"]),
    (("evaluate",), {"evaluate__scaffold": f"{__name__}:TALKER", "experts__names": ("swe",)},
     ["--config.evaluate.baseline: 'heuristic'", "talker", "leave it empty"]),
    (("midtrain",), {"tokenizer__added_tokens": ("<tool_call>",)}, ["tokenizer.added_tokens: '<tool_call>'", "twice"]),
    (("experts",), {"experts__rollout__max_length": 385}, ["experts.rollout.max_length: 385", "384"]),
    (("distill",), {"distill__rollout__max_length": 385}, ["distill.rollout.max_length: 385", "384"]),
    (("evaluate",), {"evaluate__rollout__max_new_tokens": 384}, ["evaluate.rollout.max_new_tokens: 384", "max_length"]),
    (("experts",), {"experts__rollout__temperature": 0.0}, ["experts.rollout.temperature: 0"]),
    (("experts",), {"experts__ratio_bounds": (2.0, 3.0)}, ["experts.ratio_bounds: (2.0, 3.0)", "two numbers with 1 between"]),
    (("experts",), {"experts__rollout__top_p": 0.9}, ["experts.rollout.top_p: 0.9", "1.0"]),
    (("experts",), {"experts__rollout__top_k": 20}, ["experts.rollout.top_k: 20"]),
    (("experts",), {"experts__routing": "first"}, ["experts.routing: 'first' with minibatches 1", "replay, frozen"]),
    (("experts",), {"experts__objective": "decoupled"}, ["experts.objective: 'decoupled' with minibatches 1", "above 1"]),
    (("experts",), {"experts__minibatches": 3}, ["experts.minibatches: 3", "prompts, 2"]),
    (("evaluate",), {"experts__names": ()}, ["experts.names", "empty"]),
    (("distill",), {"experts__names": ("swe", "swe")}, ["'swe' is there twice"]),
    (("distill",), {"distill__prompts": 2}, ["distill.prompts: 2", "3 experts", "swe, single_turn, tool_format"]),
    (("evaluate",), {"evaluate__pass_k_tasks": 5}, ["evaluate.pass_k_tasks: 5", "tasks, 4"]),
    (("evaluate",), {"evaluate__redraws": 3, "evaluate__scaffold": "mini_swe_agent"},
     ["config.evaluate.redraws: 3", "mini_swe_agent"]),
    (("tasks",), {"tasks__repos_train": ()}, ["tasks.train: 12", "repos_train is empty, as is data"]),
    (("tasks",), {"tasks__repos_heldout": ()}, ["tasks.heldout: 6", "repos_heldout is empty, as is heldout_data"]),
    (("tasks",), {"tasks__train": 0, "tasks__heldout": 0, "tasks__repos_train": (), "tasks__repos_heldout": ()},
     ["--config.tasks.data: is empty, as are heldout_data, repos_train and repos_heldout"]),
    (("tasks",), {"tasks__data": "/none/*.jsonl"}, ["--config.tasks.data=/none/*.jsonl: matches no file"]),
    (("tasks",), {"tasks__heldout_data": str(ROOT / "pyproject.toml")}, ["tasks.heldout_data: ", "holds no tasks; allowed: *.jsonl"]),
    (("experts",), {"tasks__train": 0}, ["--config.tasks.data: is empty and --config.tasks.train is 0; experts and distill"]),
    (("distill",), {"tasks__train": 0}, ["--config.tasks.data: is empty", "experts and distill need tasks"]),
    (("evaluate",), {"tasks__heldout": 0}, ["--config.tasks.heldout_data: is empty", "evaluate needs tasks"]),
    (("sft",), {"midtrain__sources": {}}, ["--config.init: random; without --config.midtrain.data name a Hugging"]),
    (("experts",), {"midtrain__sources": {}, "sft__sources": {}}, ["--config.init: random", "midtrain.data or --config.sft.data"]),
    (("evaluate",), {"midtrain__sources": {}, "sft__sources": {}, "init": "/nowhere"}, ["init=/nowhere", "config.json"]),
    (("tasks",), {"tasks__repos_train": ("a==1",), "tasks__repos_heldout": ("a==2",)}, ["a is in repos_train too"]),
    (("midtrain",), {"init": "/nowhere"}, ["init=/nowhere", "config.json"]),
    (("midtrain",), {"init": "base"}, ["--config.model.", "but the checkpoint in"]),
    (("midtrain",), {"tokenizer__vocab_size": 100}, ["tokenizer.vocab_size: 100", "at least"]),
    (("midtrain",), {"tokenizer__vocab_size": 600}, ["model.vocab_size: 512", "600"]),
    (("sft",), {"ray_address": "auto"}, ["ray_address", "pool=process"]),
]


@pytest.mark.parametrize("key, value, words", FIELDS, ids=lambda value: str(value)[:40])
def test_a_value_outside_its_range_is_named(config, key, value, words):
    """Whatever stages are to be run: the configuration is checked whole."""
    line = refusal(config, ("report",), **{key: value})
    shown = value[-1] if isinstance(value, tuple) else value
    assert f"--config.{key.replace('__', '.')}: {shown!r}; allowed: " in line and words in line


@pytest.mark.parametrize("stages, changes, words", RULES, ids=lambda value: str(value)[:60])
def test_values_that_do_not_go_together_are_named(config, stages, changes, words):
    line = refusal(config, stages, **changes)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("stages, changes", [(rule[0], rule[1]) for rule in RULES if rule[0] not in (STAGES, ("report",))],
                         ids=lambda value: str(value)[:60])
def test_a_stage_that_is_not_to_be_run_needs_nothing(config, stages, changes):
    """What was made with a stage's settings may be reported on, and its repositories or weights may be gone."""
    config_checks.check(from_config_dict(RunConfig, changed(config, **changes)), ("report",))


def test_several_faults_are_told_at_once(config):
    line = refusal(config, workers=0, seed=-1)
    assert "--config.workers" in line and "--config.seed" in line
    line = refusal(config, workers=0, seed=-1, sandbox="x", pool="y", model__moe="z")
    assert line.endswith("; and 2 more")


@pytest.mark.parametrize("key, path, words", [
    ("sft__sources__nano__kind", "no_such.module:X", "module no_such.module cannot be imported: No module named 'no_such'"),
    ("experts__reward", "qcn_jax.registry:none", "module qcn_jax.registry has no none"),
    ("distill__scaffold", "qcn_jax.registry:is_path", "is a function; scaffold needs a Scaffold"),
])
def test_paths_that_lead_nowhere_are_named(config, key, path, words):
    assert refusal(config, ("report",), **{key: path}) == f"--config.{key.replace('__', '.')}: {path!r}; {words}"


def test_types_are_checked_of_configurations_built_in_python():
    with pytest.raises(UserError, match=r"--config.seed: expected int, got '0'"):
        config_checks.check(RunConfig(seed="0"), ("report",))


def test_sizes_alone_ask_for_no_repositories_and_no_weights():
    config = RunConfig(init="/nowhere", tasks=TasksConfig(train=3))
    config_checks.check_sizes(config, STAGES)
    with pytest.raises(UserError, match="distill.prompts: 2"):
        config_checks.check_sizes(dataclasses.replace(config, distill=DistillConfig(prompts=2)), ("distill",))


@pytest.mark.parametrize("file, stages", [
    ("nano.py", STAGES), ("nano.py:quick", STAGES), ("nano_long.py", STAGES),
    *((f"experts_small.py:{pace}", STAGES) for pace in ("", "react", "quick")),
    *((f"nano_base.py:{phase}", ("tasks", "midtrain")) for phase in ("code", "edits", "wide")),
    *((f"qwen3_coder_next.py:{pod},{length}", ("report",)) for pod in ("v5p-128", "v5p-512", "v5e-256", "v6e-256", "tpu7x-128")
      for length in ("8k", "32k", "262k", "32k-262k")),
])
def test_the_configurations_that_come_with_the_package_pass(file, stages):
    name, _, argument = file.partition(":")
    get_config = runpy.run_path(str(ROOT / "configs" / name))["get_config"]
    config = from_config_dict(RunConfig, get_config(*[argument] * bool(argument)))
    config_checks.check(config, stages)
    config_checks.check_sizes(config, STAGES)


def test_the_80b_starts_by_its_own_command(tmp_path, monkeypatch):
    """Every stage, with files for what the docstring's command names; without its tasks it is one line."""
    (tmp_path / "corpus").mkdir()
    own_files.write_corpus(tmp_path / "corpus" / "a.parquet")
    own_files.write_chats(tmp_path / "chats.jsonl")
    own_files.write_tasks(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps(configuration.config_to_hf(ModelConfig())))
    testing.tiny_tokenizer().save(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    arguments = [argument.replace("HF_FOLDER", "folder").replace("=configs", f"={ROOT}/configs")
                 for argument in own_files.documented("qwen3_coder_next") if not argument.startswith("--workdir")]

    def check(*arguments):
        values = flags.FlagValues()
        config = parsing.define_config(values, arguments)
        parsing.parse(values, "run", "", arguments)
        config_checks.check(config(), STAGES)
        return config()

    config = check(*arguments)
    assert [config.experts.scaffold, config.distill.scaffold, config.evaluate.scaffold] == ["mini_swe_agent"] * 3
    for rollout in (config.experts.rollout, config.distill.rollout, config.evaluate.rollout):
        assert (rollout.max_turns, rollout.max_length) == (300, 65_536)
    assert [phase.midtrain.train.sequence_length for _, phase in midtrain_phases(config)] == [32_768, 262_144]
    with pytest.raises(UserError, match="^--config.tasks.data: is empty, .*--config.tasks.heldout_data: is empty"):
        check(*(argument for argument in arguments if "tasks." not in argument))


def test_the_defaults_pass_their_own_ranges():
    config_checks.check(RunConfig(), ("report",))


def test_every_number_and_choice_has_a_range():
    """Of all fields only names, addresses and switches may hold anything."""
    free = {"name", "init", "ray_address", "topology", "repos_train", "repos_heldout", "options", "added_tokens", "shares", "mesh", "path", "data", "licences", "heldout_data", "setup", "modules", "chat_template", "judge_endpoint", "judge_model"}

    def unguarded(cls):
        for name, hint in typing.get_type_hints(cls, include_extras=True).items():
            groups = [part for part in (hint, *typing.get_args(hint)) if isinstance(part, type) and dataclasses.is_dataclass(part)]
            if groups:
                yield from unguarded(groups[0])
            elif hint is not bool and name not in free and "Annotated" not in str(hint):
                yield f"{cls.__name__}.{name}"

    assert list(unguarded(RunConfig)) == []


@pytest.mark.parametrize("rule, good, bad", [
    (Within(at_least=1), 1, 0), (Within(above=0), 1e-9, 0.0), (Within(at_most=1), 1.0, 1.01),
    (Within(below=1), 0.99, 1),
    (Within(at_least=1, also=(-1,)), -1, 0), (OneOf("a", "b"), "b", "c"),
    (Known("qcn_jax.layers.remat:POLICIES"), "full", "half"),  # a collection
    (Known("qcn_jax.agents.scaffolds:SCAFFOLDS"), "nano", "nonesuch"),  # what raises UserError
])
def test_rules_of_values(rule, good, bad):
    assert rule.refusal(good) is None and rule.refusal(bad)


def test_models_are_checked_by_the_same_rules():
    config_checks.check_model(ModelConfig())
    with pytest.raises(UserError, match="model.chunk_size: 0; allowed: at least 1"):
        config_checks.check_model(ModelConfig(chunk_size=0), "model")


def test_old_names_say_the_new_ones(config):
    values = to_config_dict(from_config_dict(RunConfig, config)).unlock()
    values.rl = to_config_dict(ExpertsConfig())
    with pytest.raises(UserError, match="^--config.rl: is called --config.experts now$"):
        from_config_dict(RunConfig, values)


def test_configuration_and_its_checks_import_neither_jax_nor_flax():
    code = ("import sys\nfrom qcn_jax import config, config_checks\n"
            "print([name for name in ('jax', 'flax', 'optax') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout == "[]\n"


def test_checking_leaves_devices_alone():
    """Several hosts come together after the check, which JAX allows only while nothing has touched a device."""
    code = ("from qcn_jax import config, config_checks\nimport jax\n"
            "config_checks.check_sizes(config.RunConfig(), ('experts', 'distill'))\n"
            "print(jax._src.xla_bridge.backends_are_initialized())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "False\n"


# Through the command line itself: verb, arguments, environment, what the one line says.
_RUN = ("run", "--workdir=run", "--config={micro}")
_COMPILE = ("compile", "--config={big}")
COMMANDS = [
    ((*_RUN, "--config.rl.updates=3"), ["--config.rl.updates: is called --config.experts.updates now"]),
    ((*_RUN, "--config.rl.experts=swe"), ["--config.rl.experts: is called --config.experts.names now"]),
    ((*_RUN, "--config.workers=0"), ["--config.workers: 0", "at least 1"]),
    ((*_RUN, "--config.sft.train.steps=-5"), ["--config.sft.train.steps: -5"]),
    ((*_RUN, "--config.experts.names=swe,web9"), ["--config.experts.names: 'web9'", "tool_format"]),
    ((*_RUN, "--config.init=/nowhere"), ["--config.init=/nowhere"]),
    ((*_RUN, "--config.midtrain.train.optimizer.learning_rate=nan"), ["learning_rate: nan"]),
    ((*_RUN, "--config.mesh.tensor=3"), ["--config.mesh", "'tensor': 3", "1 devices"]),
    ((*_RUN, "JAX_PLATFORMS=nonsense"), ["JAX_PLATFORMS=nonsense"]),
    ((*_RUN, "JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_force_host_platform_device_count=4"),
     ["--config.midtrain.train.rows: 2 does not divide by 4 parts", "fsdp 4"]),
    ((*_COMPILE, "--config.mesh.dispatch=scatter"), ["--config.mesh.dispatch: 'scatter'", "ragged"]),
    ((*_COMPILE, "--config.model.dtype=float8"), ["--config.model.dtype: 'float8'"]),
    ((*_COMPILE, "--config.midtrain.train.rows=0"), ["--config.midtrain.train.rows: 0"]),
    ((*_COMPILE, "--dump=/dev/null/program.txt"), ["--dump=/dev/null/program.txt", "/dev/null is not a folder"]),
    ((*_COMPILE, "--out=."), ["--out=.: is a folder"]),
]


@pytest.mark.parametrize("arguments, words", COMMANDS, ids=lambda value: str(value)[-50:])
def test_the_command_line_says_it_in_one_line_and_leaves_nothing(arguments, words, tmp_path):
    config = chain.write(tmp_path / "micro")
    environment = dict(argument.split("=", 1) for argument in arguments if argument.split("=")[0].isupper())
    flags = [argument.format(micro=config, big=f"{ROOT}/configs/qwen3_coder_next.py:v5p-128")
             for argument in arguments if argument.split("=")[0] not in environment]
    folder = tmp_path / "here"
    folder.mkdir()
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "qcn_jax", *flags], capture_output=True, text=True, check=False,
                          timeout=600, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"qcn {flags[0]}: ") and all(word in line for word in words), line
    assert not list(folder.iterdir())
    assert time.monotonic() - began < 120  # seconds on an idle machine; never the minutes that a stage takes
