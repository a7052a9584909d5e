"""Stage sft for real and small: solver in local sandboxes, journal, loss masks, training, kill and resume."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest

from qcn_jax import files, hub
from qcn_jax.agents import collecting
from qcn_jax.agents.trajectory import Trajectory
from qcn_jax.chat.encoder import ChatEncoder
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import ChatSource, OptimizerConfig, RunConfig, SftConfig, TokenizerConfig, TrainConfig
from qcn_jax.errors import UserError
from qcn_jax.pipeline.context import Shared, StageContext
from qcn_jax.pipeline.data import splits
from qcn_jax.pipeline.data.texts import Findings
from qcn_jax.pipeline.data.trajectories import conversation
from qcn_jax.pipeline.stages import sft
from qcn_jax.pipeline.stages.midtrain import ADDED_TOKENS
from qcn_jax.recipes.nano import trajectories
from qcn_jax.recipes.nano.scaffold import NANO
from qcn_jax.recipes.nano.spans import LINE_TOKENS
from tests.agents import tiny
from tests.pipeline.micro import MODEL, micro_params

pytestmark = pytest.mark.slow

VOCABULARY, STEPS = 384, 6  # batch shape, steps and optimizer as in test_midtrain: one compiled step for both
CONFIG = RunConfig(
    sandbox="local", workers=1, model=dataclasses.replace(MODEL, vocab_size=VOCABULARY),
    tokenizer=TokenizerConfig(vocab_size=VOCABULARY),
    sft=SftConfig(sources={"nano": ChatSource(kind="nano", options={"recovery": 0.5})}, train=TrainConfig(
        steps=STEPS, rows=2, sequence_length=768, mtp_coef=0.0, checkpoint_every=2, log_every=1,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2))))


def _tasks():
    return [
        tiny.make_task(instance_id="a"),
        tiny.make_task("n % 2 == 0", "n % 2 != 0", "is_even", ("even",), instance_id="b",
                       problem_statement="is_even(2) gives False, expected True."),
        tiny.make_task("if not low <= high:", "if low <= high:", fail=("inside", "below", "above", "order"),
                       instance_id="c", problem_statement="Calculator().clamp(5, 1, 10) raises ValueError."),
        # No small edit: the solver cannot do it and the task gives nothing.
        tiny.make_task("            return low\n", "            low = low\n            return 3\n", fail=("below",),
                       instance_id="d"),
    ]


@pytest.fixture(name="everything_teaches", autouse=True)
def _everything_teaches(monkeypatch):
    monkeypatch.setattr(splits, "SFT_SHARE", 1.0)


def _context(root, lines=None):
    """A work directory whose earlier stages have finished."""
    files.write_json(root / "tasks" / "repositories.json", [dataclasses.asdict(tiny.spec())])
    files.write_json(root / "tasks" / "DONE.json", {"results": {}})
    files.write_jsonl(root / "tasks" / "train.jsonl", [task.to_json() for task in _tasks()])
    context = StageContext(CONFIG, root, "sft", Shared(CONFIG, root))
    if not context.tokenizer_path.exists():
        context.tokenizer_path.parent.mkdir(parents=True)
        Tokenizer.train([tiny.GOOD, tiny.TESTS], VOCABULARY, (*ADDED_TOKENS, *LINE_TOKENS)).save(context.tokenizer_path)
        params = dict(micro_params())
        keys = jax.random.split(jax.random.key(1))
        shape = (VOCABULARY, MODEL.hidden_size)
        params["embed_tokens"] = {"embedding": 0.1 * jax.random.normal(keys[0], shape)}
        params["lm_head"] = {"kernel": 0.1 * jax.random.normal(keys[1], shape[::-1])}
        hub.save(root / "midtrain" / "model", CONFIG.model, jax.device_get(params))
        files.write_json(root / "midtrain" / "DONE.json", {"results": {}})
    object.__setattr__(context, "log", (lines if lines is not None else []).append)
    return context


@pytest.fixture(name="whole", scope="module")
def _whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("sft")
    root.chmod(0o755)
    lines = []
    context = _context(root, lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "SFT_SHARE", 1.0)
        try:
            results = sft.run_stage(context)
        finally:
            context.shared.close()
    return root, results, lines


def _rows(root):
    return [json.loads(line) for line in (root / "sft" / "trajectories.jsonl").read_text().splitlines()]


def test_trajectories_are_verified_and_counted(whole):
    root, results, _ = whole
    rows = {row["key"]: row["value"] for row in _rows(root)}
    assert sorted(rows) == ["a", "b", "c", "d"] and rows["d"] == []
    assert {len(rows[name]) for name in "abc"} == {4}  # two with tools, one single turn, one of a template
    labels = dict(results["labels"])
    assert 0 < labels.pop("recovery") < 6 and labels == {"nano": 6, "nano_single": 3, "nano_format": 3}
    assert results["conversations"] == 12 and results["sources"]["nano"]["kept"] == 12
    assert json.loads(json.dumps(results)) == results and results["steps"] == STEPS
    for trajectory in (row for group in rows.values() for row in group):
        assert trajectory["patch"] and all(trajectory["outcomes"][-1:])


def test_loss_is_on_the_assistants_words_but_not_on_refuted_turns(whole):
    root, _, _ = whole
    context = _context(root)
    tokenizer = context.tokenizer()

    def encode(trajectories, length):
        findings = Findings()
        return list(sft.encoded(map(conversation, trajectories), ChatEncoder(tokenizer), length, findings, Counter())), findings

    made = [Trajectory.from_json(row) for group in _rows(root) for row in group["value"]]
    for trajectory in made:
        document, = encode([trajectory], 1024)[0]
        tokens, weights = document["tokens"], document["weights"]
        counted = tokenizer.decode(tokens[1:][weights[:-1] > 0])
        runs, expected = iter(trajectory.outcomes), 0
        for message in trajectory.messages:
            if message["role"] != "assistant":
                continue
            names = [call["name"] for call in message["tool_calls"]]
            expected += not ("run_tests" in names and not next(runs))
        assert counted.count("<|im_end|>") == expected
        assert "problem" not in counted and "FAILED" not in counted and "def " not in counted
        wrong = [message["tool_calls"] for message, ok in zip(
            [m for m in trajectory.messages if m["role"] == "assistant"][1:], trajectory.outcomes) if not ok]
        for calls in wrong:
            text = tokenizer.decode(ChatEncoder(tokenizer).encode_answer(
                {"role": "assistant", "content": "", "tool_calls": calls, "template": trajectory.template}))
            assert text in tokenizer.decode(tokens) and text not in counted
    assert any(trajectory.wrong_edits for trajectory in made)
    assert encode(made, 40)[1].left_out["over 40 tokens"] > 0


def test_training_learned_and_wrote_a_model(whole):
    root, results, _ = whole
    config, params = hub.load(root / "sft" / "model")
    _, before = hub.load(root / "midtrain" / "model")
    assert config.vocab_size == VOCABULARY
    assert np.abs(params["lm_head"]["kernel"] - before["lm_head"]["kernel"]).max() > 1e-3
    assert results["loss"] < np.log(VOCABULARY) + 0.5 and results["seconds_per_step"] > 0


def run_and_die(root, task):
    """Called in a child process, which is killed when the solver's result for task number `task` is to be written."""
    import os

    splits.SFT_SHARE = 1.0
    add = collecting.Rows.add

    def dying(self, key, value):
        if len(self.known) == task:
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write('{"key": "half a ro')
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, key, value)

    collecting.Rows.add = dying
    sft.run_stage(_context(pathlib.Path(root)))


def test_a_kill_in_the_solver_resumes_with_the_same_end(whole, tmp_path):
    tmp_path.chmod(0o755)
    code = (f"import sys; root = {str(pathlib.Path(__file__).parents[3])!r}; sys.path[:0] = [root, root + '/tests']\n"
            f"from tests.pipeline.stages import test_sft as t; t.run_and_die({str(tmp_path)!r}, 2)")
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    lines = []
    context = _context(tmp_path, lines)
    try:
        results = sft.run_stage(context)
    finally:
        context.shared.close()
    assert "resumes with 2 of 4 tasks solved before" in lines
    assert _rows(tmp_path) == _rows(whole[0])
    weights = lambda root: (root / "sft" / "model" / "model.safetensors").read_bytes()
    assert weights(tmp_path) == weights(whole[0])
    assert results["loss"] == whole[1]["loss"]


def test_the_control_continues_from_sft(whole):
    root, _, _ = whole
    context = StageContext(CONFIG, root, "evaluate", Shared(CONFIG, root))
    object.__setattr__(context, "log", lambda line: None)
    context_for_pool = context.shared
    try:
        results = sft.train_control(context, STEPS, root / "evaluate" / "sft_control")
    finally:
        context_for_pool.close()
    assert results["steps"] == STEPS and results["seconds"] == pytest.approx(STEPS * results["seconds_per_step"])
    _, control = hub.load(context.model_path("sft_control"))
    _, start = hub.load(context.model_path("sft"))
    assert np.abs(control["lm_head"]["kernel"] - start["lm_head"]["kernel"]).max() > 0


def test_plans_cover_scaffolds_and_templates():
    tasks = [tiny.make_task(instance_id=str(i)) for i in range(60)]
    plan = lambda number, *more, **options: trajectories.plan(
        tasks[number], number, 0, trajectories.Options(**options), NANO, *more or [("hermes", "qwen3_coder")])
    plans = [plan(number) for number in range(len(tasks))]
    assert plans[7] == plan(7)
    names = [[request.scaffold.name for request in requests] for requests in plans]
    assert names[0] == ["nano", "nano", "nano_single", "nano_format:hermes"] and names[1][-1] == "nano_format:qwen3_coder"
    recoveries = np.mean([request.wrong > 0 for requests in plans for request in requests[:2]])
    assert 0.35 < recoveries < 0.65
    guesses = [(1, "a", "b"), (2, "c", "d")]
    with_search = plan(7, (), guesses, searches=2)
    assert [request.search for request in with_search] == [False, False, True, True, False]
    assert with_search[2].guesses == tuple(guesses) and set(with_search[3].guesses) == set(guesses)


def test_no_solvable_task_is_one_line(tmp_path):
    context = _context(tmp_path)
    files.write_jsonl(tmp_path / "tasks" / "train.jsonl", [])
    try:
        with pytest.raises(UserError, match="no trajectory of 0 training tasks"):
            sft.run_stage(context)
    finally:
        context.shared.close()
