"""`qcn run` on two hosts for real: the command given to two processes of four devices each, on one work directory.

It begins from nothing but files: a Hugging Face folder, a Parquet corpus, conversations, and what `qcn synthesize` made. It
ends where one process of eight devices ends; when a process is killed, the other ends with one line; the same command
resumes; and transformers reads the result.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from qcn_jax import hub, testing
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.pipeline.stages.midtrain import ADDED_TOKENS
from qcn_jax.sharding import last_line
from tests.pipeline import chain, own_files

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]
STAGES = ("midtrain", "sft")
# Rows for eight devices, and enough steps to be killed among them.
SETTINGS = ("--config.mesh.fsdp=4", "--config.mesh.expert=2", "--config.midtrain.train.rows=8",
            "--config.sft.train.rows=8", "--config.sft.train.steps=6",
            *(f"--config.{stage}.train.optimizer.{setting}" for stage in STAGES
              for setting in ("learning_rate=0.001", "warmup_steps=1")),
            *(f"--config.{stage}.train.log_every=1" for stage in STAGES))
ACTING = ("experts", "distill", "evaluate", "report")
LENGTH = 1280  # of episodes: mini_swe_agent's instructions are 900 of this vocabulary's tokens
ACTING_SETTINGS = ("--config.experts.names=tests.pipeline.vowels:VOWELS", "--config.experts.max_staleness=0",
                   *(f"--config.{stage}.{setting}" for stage in ACTING[:2]
                     for setting in ("updates=2", "rows=8", "prompts=4", "group_size=4", f"sequence_length={LENGTH}",
                                     # Steps proportional to gradients, see stages/on_devices.py.
                                     "optimizer.learning_rate=0.1", "optimizer.warmup_steps=0", "optimizer.eps=0.1")),
                   *(f"--config.{stage}.rollout.{setting}" for stage in ACTING[:3]
                     for setting in ("slots=16", "max_turns=2", "max_new_tokens=16", f"max_length={LENGTH}")),
                   "--config.evaluate.tasks=3", "--config.evaluate.pass_k_tasks=1")
# Two hosts hold what one process has in slots of fixed size: two episodes a device, of which one decodes, and blocks for
# little more than the longest.
BLOCKS = tuple(f"--config.{stage}.rollout.{setting}" for stage in ACTING[:3]
               for setting in ("max_num_seqs=8", "block_size=64", f"num_blocks={8 * (LENGTH // 64 + 2)}"))
FILES = {"init": "model", "midtrain.data": "corpus/*.parquet", "sft.data": "chats.jsonl", "tasks.data": "tasks.jsonl",
         "tasks.heldout_data": "heldout.jsonl"}
SURVIVOR_SECONDS = 90


def _command(config, workdir, stages=STAGES, settings=SETTINGS):
    return [sys.executable, "-m", "qcn_jax", "run", f"--config={config}", f"--workdir={workdir}",
            f"--stages={','.join(stages)}", *(f"--config.{name}={workdir.parent / path}" for name, path in FILES.items()),
            *settings]


def _environment(cache):
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PYTHONUNBUFFERED": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache)}


def _alone(command, devices, cache):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=testing.processes.TIMEOUT,
                          env={**os.environ, **testing.emulated(devices), **_environment(cache)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module", name="prepared")
def _prepared(tmp_path_factory):
    """(config, folder with the work directory `tasks`, in which stage tasks has finished)."""
    folder = tmp_path_factory.mktemp("hosts")
    folder.chmod(0o755)
    (folder / "corpus").mkdir()
    own_files.write_corpus(folder / "corpus" / "a.parquet")
    own_files.write_chats(folder / "chats.jsonl")
    # Qwen's own vocabulary, with which recipes are tested, would take eight devices' logits out of memory here.
    own_files.write_model(folder / "model", Tokenizer.train(own_files.texts(), 384, ADDED_TOKENS), LENGTH)
    chain.write(folder)
    for name, repository in (("tasks", "shapes-1.0"), ("heldout", "words-1.0")):
        own_files.synthesize(folder, repository, f"{name}.jsonl")
    small = own_files.write_small(folder / "small.py", "qwen3_coder_next", steps=3)
    config = f"{small}:v5p-128@{folder}/model"
    _alone(_command(config, folder / "tasks", ["tasks"]), 1, folder / "cache")
    return config, folder


@pytest.fixture(scope="module", name="one")
def _one(prepared):
    """The work directory of one process of eight devices."""
    config, folder = prepared
    shutil.copytree(folder / "tasks", folder / "one")
    _alone(_command(config, folder / "one"), 8, folder / "cache")
    return folder / "one"


@pytest.fixture(scope="module", name="two")
def _two(prepared):
    """The work directory of two processes, each killed once, and what they printed in the end."""
    config, folder = prepared
    workdir = folder / "two"
    shutil.copytree(folder / "tasks", workdir)
    # Behind the checkpoint of step 2.
    outputs = _killed(_command(config, workdir), folder / "cache", {stage: f"{stage} .*step [345]/6" for stage in STAGES})
    return workdir, outputs


@pytest.fixture(scope="module", name="acted")
def _acted(prepared, one):
    """Work directories in which one process, and two, each killed once, went on to act and learn; what the two printed.

    The two have keys and values in blocks.
    """
    config, folder = prepared
    settings = (*SETTINGS, *ACTING_SETTINGS)
    workdirs = folder / "acted-one", folder / "acted-two"
    for workdir in workdirs:
        shutil.copytree(one, workdir)
    _alone(_command(config, workdirs[0], ACTING, settings), 8, folder / "cache")
    outputs = _killed(_command(config, workdirs[1], ACTING, (*settings, *BLOCKS)), folder / "cache",
                      {stage: f"{stage} .*step 1/2" for stage in ("experts", "distill")})
    return workdirs, outputs


def _killed(command, cache, stages):
    """What two processes print in the end, one of which was killed in each of `stages`, at the line that its pattern finds."""
    start = lambda: testing.Hosts(command, environment=_environment(cache))
    for number, (stage, line) in enumerate(stages.items(), 1):
        killed = number % 2
        with start() as hosts:
            hosts.until(killed, re.compile(rf"^\[ *{line}", re.MULTILINE))
            hosts.kill(killed)
            print(f"survivor of {stage} ended after {_survivor_ends(hosts, 1 - killed):.1f} s")
    with start() as hosts:
        return hosts.finish()


def _survivor_ends(hosts, number):
    began = time.monotonic()
    assert hosts.wait(number) != 0
    seconds = time.monotonic() - began
    assert seconds < SURVIVOR_SECONDS
    hosts.until(number, last_line.LOST, timeout=600)  # its stderr is passed on by a process that outlives it
    # Gloo's lines of several threads run into each other, which leaves parts of them on lines of their own.
    lines = [line for line in hosts.output(number).splitlines() if not re.match(r"\[|\s*\d*$|.*peer ranks", line)]
    assert lines == [last_line.LOST], hosts.output(number)
    return seconds


def _distance(a, b) -> float:
    squares = jax.tree.map(lambda x, y: float(np.sum((np.asarray(x, np.float64) - y) ** 2)), a, b)
    return sum(jax.tree.leaves(squares)) ** 0.5


def test_two_hosts_end_where_one_does(prepared, one, two):
    before = hub.load(prepared[1] / "model")[1]
    for stage in STAGES:
        (_, ours), (_, theirs) = (hub.load(workdir / stage / "model") for workdir in (two[0], one))
        moved, apart = _distance(theirs, before), _distance(ours, theirs)
        print(f"{stage}: {apart / moved:.1e} of a movement of {moved:.2f}")
        assert moved > 0.01 and apart < 1e-4 * moved
        before = theirs


def test_curves_have_every_step_once_in_spite_of_the_kills(one, two):
    for stage in STAGES:
        rows = [[json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]
                for workdir in (two[0], one)]
        assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == list(range(1, 7))
        for ours, theirs in zip(*rows):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_the_end_says_what_was_done_and_where(two):
    workdir, outputs = two
    assert any("resumes" in line for line in outputs[0].splitlines())
    for stage in STAGES:
        results = json.loads((workdir / stage / "DONE.json").read_text())["results"]
        assert results["mesh"] == {"devices": 8, "axes": {"fsdp": 4, "expert": 2}}
    assert not [path for path in workdir.rglob("*.tmp")]


def test_two_hosts_act_and_learn_as_one_does(acted):
    workdirs, outputs = acted
    assert "acts and learns on 8 devices (fsdp 4 x expert 2)" in outputs[0]
    for name in ("experts/vowels", "distill"):
        theirs, ours = ([json.loads(line) for line in (workdir / name / "metrics.jsonl").read_text().splitlines()]
                        for workdir in workdirs)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [1, 2]
        for row, right in zip(ours, theirs):
            for metric in ("episodes", "reward", "sampled_tokens", "turns"):
                if metric in right:
                    assert row[metric] == pytest.approx(right[metric], rel=1e-5), (name, metric)
            if "loss" in right:  # of an update with an informative group
                assert row["loss"] == pytest.approx(right["loss"], rel=1e-3, abs=1e-5)
    before = hub.load(workdirs[0] / "sft" / "model")[1]
    for name in ("experts/vowels", "distill"):
        theirs, ours = (hub.load(workdir / name / "model")[1] for workdir in workdirs)
        moved, apart = _distance(theirs, before), _distance(ours, theirs)
        print(f"{name}: {apart / moved:.1e} of a movement of {moved:.3f}")
        assert moved > 1e-3 and apart < 1e-3 * moved
    assert (workdirs[1] / "sandbox" / "host-1").is_dir()  # each host has sandboxes of its own
    theirs, ours = (json.loads((workdir / "evaluate" / "DONE.json").read_text())["results"] for workdir in workdirs)
    assert theirs["models"] == ours["models"] and theirs["models"]["unified"]["attempted"] == 3
    assert [(workdir / "report" / "summary.json").is_file() for workdir in workdirs] == [True, True]


def test_the_journals_of_two_hosts_give_its_updates_again(prepared, acted):
    """On two hosts, as the run was, one of them killed; without tasks and sandboxes."""
    run = prepared[1] / "journals"
    for name in ("sft", "experts", "midtrain"):
        shutil.copytree(acted[0][1] / name, run / name, ignore=shutil.ignore_patterns("checkpoints"))
    command = [sys.executable, "-m", "qcn_jax", "replay", run, "--groups"]
    with testing.Hosts(command, environment=_environment(prepared[1] / "cache")) as hosts:
        told = hosts.finish()
    assert "vowels: 2 updates derived again; weights equal before 2 of 2 the last equal those of the run" in told[0]
    assert "vowels:" not in told[1]
    found = json.loads((run / "replay" / "vowels" / "summary.json").read_text())
    assert found["last_equal"] is True and found["equal_weights"] == found["updates"] == 2
    shares = {update: sum(row["share"] for row in found["moved"] if row["update"] == update) for update in (1, 2)}
    assert all(share == pytest.approx(1, rel=1e-3) for share in shares.values() if share) and any(shares.values())


@pytest.mark.torch
def test_transformers_reads_the_result(two):
    import transformers

    model = transformers.Qwen3NextForCausalLM.from_pretrained(two[0] / "sft" / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(two[0] / "sft" / "model")
    logits = model(**tokenizer("def area(", return_tensors="pt")).logits
    assert bool(logits.isfinite().all())
