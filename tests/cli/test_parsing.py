"""Config files and overrides: what reaches RunConfig, and how wrong ones are refused."""

import pytest
from absl import flags

from qcn_jax.cli import parsing
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
                    "--config.rl.experts=('swe', 'format')", "--noconfig.evaluate.sft_control", "--config.init=random")
    assert (config.seed, config.sft.train.optimizer.learning_rate) == (7, 1.0)
    assert config.rl.experts == ("swe", "format")
    assert config.evaluate.sft_control is False and config.init == "random"
    assert config.distill.optimizer.learning_rate == 3e-4  # untouched


def test_repeated_flags_make_a_tuple_and_config_argument_reaches_get_config(config_file):
    config = _parse(f"--config={config_file}:5", "--config.rl.experts=swe", "--config.rl.experts=single_turn")
    assert config.seed == 5 and config.rl.experts == ("swe", "single_turn")


@pytest.mark.parametrize("argument, words", [
    ("--config.sft.stepz=1", ["--config.sft.stepz", "'stepz'", "trajectories_per_task"]),
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


def test_override_without_config(tmp_path):
    with pytest.raises(UserError, match="without --config"):
        _parse("--config.seed=1")
