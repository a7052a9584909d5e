"""Two small repositories and a micro configuration: the whole main job in about a minute, for tests."""

import pathlib
import textwrap

TRAIN_REPOSITORY = {
    "shapes/__init__.py": "",
    "shapes/core.py": '''\
"""Numbers and ranges."""


def clamp(value, low, high):
    """Puts value between low and high."""
    if not low <= high:
        raise ValueError("low > high")
    if value < low:
        return low
    return high if value > high else value


def is_even(n):
    return n % 2 == 0


def area(width, height):
    if width < 0 or height < 0:
        return 0
    return width * height


def first_missing(numbers):
    n = 0
    while n in numbers:
        n += 1
    return n


def all_positive(numbers):
    for n in numbers:
        if not n > 0:
            return False
    return True


def overlap(a, b):
    low = max(a[0], b[0])
    high = min(a[1], b[1])
    if low >= high:
        return None
    return (low, high)


def count_between(numbers, low, high):
    total = 0
    for n in numbers:
        if n >= low and n <= high:
            total += 1
    return total


def sign(n):
    if n == 0:
        return 0
    return 1 if n > 0 else -1
''',
    "tests/test_core.py": '''\
import pytest

from shapes.core import all_positive, area, clamp, count_between, first_missing, is_even, overlap, sign


def test_clamp_inside():
    assert clamp(5, 1, 10) == 5


def test_clamp_below():
    assert clamp(-5, 1, 10) == 1


def test_clamp_above():
    assert clamp(50, 1, 10) == 10


def test_clamp_order():
    with pytest.raises(ValueError):
        clamp(1, 10, 1)


def test_even():
    assert is_even(2) and not is_even(3)


def test_area():
    assert area(2, 3) == 6


def test_area_negative():
    assert area(-1, 3) == 0 and area(3, -1) == 0


def test_first_missing():
    assert first_missing([0, 1, 3]) == 2


def test_all_positive():
    assert all_positive([1, 2]) is True and all_positive([1, 0]) is False


def test_overlap():
    assert overlap((0, 5), (3, 9)) == (3, 5)


def test_no_overlap():
    assert overlap((0, 1), (1, 2)) is None


def test_count_between():
    assert count_between([1, 2, 3, 4, 5], 2, 4) == 3


def test_sign():
    assert [sign(n) for n in (-3, 0, 3)] == [-1, 0, 1]
''',
}

HELDOUT_REPOSITORY = {
    "words/__init__.py": "",
    "words/core.py": '''\
"""Text."""


def is_palindrome(text):
    letters = [c.lower() for c in text if c.isalpha()]
    return letters == letters[::-1]


def shorten(text, limit):
    if len(text) <= limit:
        return text
    return text[:limit - 1] + "~"


def count_words(text):
    count = 0
    inside = False
    for c in text:
        if c.isspace():
            inside = False
        elif not inside:
            inside = True
            count += 1
    return count


def common_prefix(a, b):
    n = 0
    while n < len(a) and n < len(b) and a[n] == b[n]:
        n += 1
    return a[:n]


def has_digit(text):
    for c in text:
        if c.isdigit():
            return True
    return False
''',
    "tests/test_core.py": '''\
from words.core import common_prefix, count_words, has_digit, is_palindrome, shorten


def test_palindrome():
    assert is_palindrome("Level") and not is_palindrome("ab")


def test_short():
    assert shorten("abc", 3) == "abc"


def test_long():
    assert shorten("abcdef", 4) == "abc~"


def test_count():
    assert count_words("a bc  d") == 3


def test_prefix():
    assert common_prefix("abcd", "abx") == "ab"


def test_prefix_of_equal():
    assert common_prefix("ab", "ab") == "ab"


def test_digit():
    assert has_digit("a1") is True


def test_no_digit():
    assert has_digit("ab") is False
''',
}

CONFIG = '''
"""A micro run for tests: repositories of this folder, a model of a few thousand parameters, a few steps a stage."""

from qcn_jax.config import (ChatSource, DistillConfig, EvaluateConfig, ExpertsConfig, MidtrainConfig, ModelConfig,
                            OptimizerConfig, RolloutConfig, RunConfig, SftConfig, TasksConfig, TextSource, TokenizerConfig,
                            TrainConfig, to_config_dict)
from qcn_jax.recipes.nano.spans import LINE_TOKENS

VOCABULARY = 512


def get_config():
    rollout = RolloutConfig(max_turns=3, max_new_tokens=24, max_length=384, slots=8)
    train = TrainConfig(steps=4, rows=2, sequence_length=384, checkpoint_every=2, log_every=1)
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=1)
    text = lambda form, share: TextSource(kind="nano", form=form, share=share, megabytes=0.2)
    sources = {"repository": text("repository", 0.3), "fim": text("fim", 0.2), "edits": text("nano_edits", 0.5)}
    return to_config_dict(RunConfig(
        name="micro", init="random", sandbox="local", workers=2,
        model=ModelConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, full_attention_interval=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=384, linear_num_key_heads=2, linear_key_head_dim=8,
            linear_num_value_heads=2, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=16, shared_expert_intermediate_size=16, num_nextn_predict_layers=1, dtype="float32",
            chunk_size=32),
        tokenizer=TokenizerConfig(vocab_size=VOCABULARY, added_tokens=LINE_TOKENS),
        tasks=TasksConfig(repos_train=({train!r},), repos_heldout=({heldout!r},), train=12, heldout=6,
                          candidates_per_repo=40, test_timeout=10.0, statement="observed", statement_characters=220,
                          hide_tests=False),
        midtrain=MidtrainConfig(train=train, sources=sources),
        sft=SftConfig(train=train, sources={"nano": ChatSource(kind="nano", options={
            "per_task": 1, "recovery": 0.5, "searches": 0, "guesses": 0})}),
        experts=ExpertsConfig(max_staleness=0, updates=2, prompts=2, group_size=2, rows=2, sequence_length=384, optimizer=optimizer,
                    rollout=rollout),
        distill=DistillConfig(updates=2, prompts=3, group_size=2, rows=2, sequence_length=384, optimizer=optimizer,
                              rollout=rollout),
        evaluate=EvaluateConfig(tasks=4, pass_k_tasks=2, samples=2, rollout=rollout),
    ))
'''


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes both repositories and the configuration into `folder`; returns the configuration's path."""
    for name, files in (("shapes-1.0", TRAIN_REPOSITORY), ("words-1.0", HELDOUT_REPOSITORY)):
        for path, text in files.items():
            target = folder / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    config = folder / "micro_config.py"
    config.write_text(textwrap.dedent(CONFIG).replace("{train!r}", repr(str(folder / "shapes-1.0")))
                      .replace("{heldout!r}", repr(str(folder / "words-1.0"))))
    return config
