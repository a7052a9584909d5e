"""Config files and overrides: what reaches RunConfig, and how wrong ones are refused."""

import importlib
import re

import pytest
from absl import flags

from qcn_jax.cli import parsing
from qcn_jax.config import RunConfig
from qcn_jax.errors import UserError

CONFIG = """
from qcn_jax.config import RunConfig, to_config_dict

def get_config(size='1'):
    return to_config_dict(RunConfig(seed=int(size)))
"""


@pytest.fixture(name="config_file")
def _config_file(tmp_path):
    path = tmp_path / "some_config.py"
    path.write_text(CONFIG)
    return path


def _parse(*argv):
    values = flags.FlagValues()
    config = parsing.define_config(values, argv)
    parsing.parse(values, "verb", "Explains.", argv)
    return config()


def test_overrides_of_every_type_arrive(config_file):
    config = _parse(f"--config={config_file}", "--config.seed=7", "--config.sft.train.optimizer.learning_rate=1",
                    "--config.experts.names=('swe', 'tool_format')", "--noconfig.evaluate.sft_control", "--config.init=random")
    assert (config.seed, config.sft.train.optimizer.learning_rate) == (7, 1.0)
    assert config.experts.names == ("swe", "tool_format")
    assert config.evaluate.sft_control is False and config.init == "random"
    assert config.distill.optimizer.learning_rate == 3e-4  # untouched


def test_repeated_flags_make_a_tuple_and_config_argument_reaches_get_config(config_file):
    config = _parse(f"--config={config_file}:5", "--config.experts.names=swe", "--config.experts.names=single_turn")
    assert config.seed == 5 and config.experts.names == ("swe", "single_turn")


def test_values_take_the_declared_type_whatever_the_file_wrote(tmp_path):
    """A rate that the file writes as an integer may become a fraction."""
    path = tmp_path / "integers.py"
    path.write_text(CONFIG.replace("return to_config_dict(RunConfig(seed=int(size)))", """
    c = to_config_dict(RunConfig()).unlock()
    c.sft.train.optimizer.learning_rate, c.tasks.kinds = 1, ['add_not']
    return c"""))
    config = _parse(f"--config={path}", "--config.sft.train.optimizer.learning_rate=0.2")
    assert config.sft.train.optimizer.learning_rate == 0.2 and config.tasks.kinds == ("add_not",)


@pytest.mark.parametrize("text, value", [
    ("swe,tool_format", ("swe", "tool_format")),
    ("swe, tool_format", ("swe", "tool_format")),
    ("swe", ("swe",)),
    ("('swe',)", ("swe",)),
    ('["swe", "tool_format"]', ("swe", "tool_format")),
    ("/a/b-1.0,toolz==1.2.0", ("/a/b-1.0", "toolz==1.2.0")),
    ("'a,b'", ("a,b",)),
    ("", ()),
    ("()", ()),
])
def test_lists_are_written_with_commas_or_as_in_python(config_file, text, value):
    assert _parse(f"--config={config_file}", f"--config.experts.names={text}").experts.names == value


def test_lists_of_numbers_hold_numbers(config_file):
    config = _parse(f"--config={config_file}", "--config.experts.greedy_turns=0,0,2")
    assert config.experts.greedy_turns == (0, 0, 2)


@pytest.mark.parametrize("arguments, seed", [
    (["--flagfile={flags}", "--config.seed=9"], 9),
    (["--config.seed=9", "--flagfile={flags}"], 9),
    (["--config.seed=9", "--config={config}:5"], 9),
    (["--config={config}:4", "--config.init=random", "--config={config}:5"], 5),
    (["--config", "{config}:4", "--config.seed", "6"], 6),
    (["--flagfile={flags}"], 3),
])
def test_flag_files_and_any_order(config_file, tmp_path, arguments, seed):
    flag_file = tmp_path / "flags.txt"
    flag_file.write_text(f"# where it begins\n--config={config_file}:3\n")
    assert _parse(*(argument.format(flags=flag_file, config=config_file) for argument in arguments)).seed == seed


@pytest.mark.parametrize("text, words", [
    ("--config=no_such.py\n", ["--config=no_such.py", "no file"]),
    ("--config.seed=1\n", ["--config.seed", "without --config=FILE"]),
    (None, ["--flagfile", "No such file"]),
])
def test_wrong_flag_files_are_named(tmp_path, text, words):
    flag_file = tmp_path / "flags.txt"
    if text is not None:
        flag_file.write_text(text)
    with pytest.raises(UserError) as error:
        _parse(f"--flagfile={flag_file}")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_get_config_may_return_a_run_config_or_plain_dict(tmp_path):
    path = tmp_path / "plain.py"
    for text in ("RunConfig(seed=8)", "{'seed': 8}"):
        path.write_text(f"from qcn_jax.config import RunConfig\ndef get_config():\n    return {text}\n")
        assert _parse(f"--config={path}", "--config.workers=3") == RunConfig(seed=8, workers=3)


def test_an_override_reaches_into_a_list_of_groups(tmp_path):
    path = tmp_path / "phases.py"
    path.write_text("def get_config():\n    return {'midtrain': {'phases': ({'steps': 1}, {'steps': 2})}}\n")
    found = _parse(f"--config={path}", "--config.midtrain.phases[1].steps=5").midtrain.phases
    assert [phase.steps for phase in found] == [1, 5]
    for key, words in (("[2].steps", "unknown key '[2]' in config.midtrain.phases; allowed: [0], [1]"),
                       (".steps", "unknown key 'steps' in config.midtrain.phases"), ("[0]", "is a group"),
                       ("[0].rose", "unknown key 'rose' in config.midtrain.phases[0]")):
        with pytest.raises(UserError, match=re.escape(words)):
            _parse(f"--config={path}", f"--config.midtrain.phases{key}=1")


@pytest.mark.parametrize("text, words", [
    ("3", ["get_config() returned 3", "RunConfig"]),
    ("None", ["get_config() returned None"]),
    ("RunConfig", ["get_config() returned <class"]),
    ("RunConfig(seed='x')", ["--config.seed", "expected int, got 'x'"]),
    ("open('/no/such/file')", ["cannot be loaded", "/no/such/file"]),
])
def test_get_config_that_returns_something_else(tmp_path, text, words):
    path = tmp_path / "other.py"
    path.write_text(f"from qcn_jax.config import RunConfig\ndef get_config():\n    return {text}\n")
    with pytest.raises(UserError) as error:
        _parse(f"--config={path}")
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("argument, words", [
    ("--config.sft={'malformed': 'skip'}", ["--config.sft is a group", "--config.sft.malformed"]),
    ("--config.experts.greedy_turns=a", ["--config.experts.greedy_turns", "expected int, got 'a'"]),
    ("--config.sft.stepz=1", ["--config.sft.stepz", "'stepz'", "malformed"]),
    ("--config.sft.train.x.y=1", ["--config.sft.train.x.y", "'x'"]),
    ("--config.seed.x=1", ["config.seed is a single value"]),
    ("--config.seed=abc", ["--config.seed=abc"]),
    ("--config.sft.train.steps=1.5", ["--config.sft.train.steps=1.5"]),
    ("--config.evaluate.sft_control=perhaps", ["sft_control", "perhaps"]),
])
def test_wrong_overrides_are_named(config_file, argument, words):
    with pytest.raises(UserError) as error:
        _parse(f"--config={config_file}", argument)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("text, word", [
    ("def get_config(:\n", "invalid syntax"),
    ("import no_such_module_here\n", "no_such_module_here"),
    ("x = 1\n", "get_config"),
    ("def get_config():\n    raise ValueError('bad day')\n", "bad day"),
])
def test_broken_config_files_are_named(tmp_path, text, word):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError, match=word) as error:
        _parse(f"--config={path}")
    assert str(path) in str(error.value)


def test_a_config_with_a_key_of_its_own_is_refused(tmp_path):
    path = tmp_path / "extra.py"
    path.write_text(CONFIG.replace("return to_config_dict(RunConfig(seed=int(size)))",
                                   "c = to_config_dict(RunConfig()); c.sft.typo = 3; return c"))
    with pytest.raises(UserError, match="config.sft.typo: unknown key"):
        _parse(f"--config={path}")


def test_help_lists_every_key_with_its_default_and_what_is_allowed(capsys):
    values = flags.FlagValues()
    parsing.define_config(values, ["--help"])
    with pytest.raises(parsing.HelpShown):
        parsing.parse(values, "verb", "Explains.", ["--help"])
    text = capsys.readouterr().out
    assert "--config.sft.train.rows=8: int, at least 1\n" in text
    assert "--config.sandbox=auto: str, one of auto, docker, local\n" in text
    assert "--config.experts.names=swe,single_turn,tool_format: list of str, a name of qcn_jax." in text
    assert "--config.evaluate.sft_control=True: bool\n" in text


def test_override_without_config(tmp_path):
    with pytest.raises(UserError, match="without --config"):
        _parse("--config.seed=1")


@pytest.mark.parametrize("verb, given", [
    ("run", "--workdir="), ("run", "--stages="), ("run", "--restart="), ("convert", "--to="), ("evaluate", "--out="),
    ("synthesize", "--out="), ("compile", "--out="),
])
def test_an_empty_value_is_not_the_default(verb, given, config_file, tmp_path, monkeypatch):
    """A shell variable that was not set: --workdir=$DIR must not mean the current folder, --stages= not all."""
    monkeypatch.chdir(tmp_path)
    needed = {"run": ["--workdir=w", f"--config={config_file}"], "convert": ["--from=a", "--to=b"],
              "evaluate": ["--tasks=t", "--out=o", "--predictions=p"], "synthesize": ["--repo=r", "--out=o"],
              "compile": [f"--config={config_file}", "--topology=v5p:2x2x1"]}
    module = importlib.import_module(f"qcn_jax.cli.{verb}")
    with pytest.raises(UserError, match=f"^{given[:-1]}: is empty"):
        module.main([*needed[verb], given])
    assert [path.name for path in tmp_path.iterdir()] == [config_file.name]


def test_packaged_configurations_are_reached_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no clone
    assert _parse("--config=nano", "--config.seed=9").seed == 9
    assert _parse("--config=nano:quick") != _parse("--config=nano")
    given = _parse("--config=nano", "--config.midtrain.sources.fim.share=0.5", "--config.midtrain.data=x").midtrain
    assert (given.sources["fim"].share, given.sources["edits"].share, given.data) == (0.5, 0.7, "x")
    with pytest.raises(UserError, match="unknown key 'fin' in config.midtrain.sources; allowed: edits, fim, repository"):
        _parse("--config=nano", "--config.midtrain.sources.fin.share=0.5")
    with pytest.raises(UserError, match="unknown key 'a' in config.midtrain.sources; it has none"):
        _parse("--config=qwen3_coder_next", "--config.midtrain.sources.a.share=0.5")
    with pytest.raises(UserError, match="there is no file configs/nano.py; packaged: .*finetune, nano, nano_base, nano_collected, nano_long, "):
        _parse("--config=configs/nano.py")
    (tmp_path / "nano").write_text("def get_config(): raise ValueError('a file comes first')")
    with pytest.raises(UserError, match="a file comes first|cannot be loaded"):
        _parse("--config=nano")
