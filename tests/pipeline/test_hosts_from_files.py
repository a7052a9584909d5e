"""`qcn run` on two hosts as in test_hosts, from nothing but files: a Hugging Face folder, a Parquet corpus, conversations, and
what `qcn synthesize` made.
"""

import json
import re
import shutil
import sys

import pytest

from qcn_jax import hub, testing
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.pipeline.stages.midtrain import ADDED_TOKENS
from tests.pipeline import chain, own_files
from tests.pipeline.test_hosts import _alone, _distance, _environment, _survivor_ends

pytestmark = pytest.mark.slow

STAGES = ("midtrain", "sft")
# Rows for eight devices, and enough steps to be killed among them.
SETTINGS = ("--config.mesh.fsdp=4", "--config.mesh.expert=2", "--config.midtrain.train.rows=8",
            "--config.sft.train.rows=8", "--config.sft.train.steps=6",
            *(f"--config.{stage}.train.optimizer.{setting}" for stage in STAGES
              for setting in ("learning_rate=0.001", "warmup_steps=1")),
            *(f"--config.{stage}.train.log_every=1" for stage in STAGES))
FILES = {"init": "model", "midtrain.data": "corpus/*.parquet", "sft.data": "chats.jsonl", "tasks.data": "tasks.jsonl",
         "tasks.heldout_data": "heldout.jsonl"}


def _command(config, workdir, stages=STAGES, settings=SETTINGS):
    return [sys.executable, "-m", "qcn_jax", "run", f"--config={config}", f"--workdir={workdir}",
            f"--stages={','.join(stages)}", *(f"--config.{name}={workdir.parent / path}" for name, path in FILES.items()),
            *settings]


@pytest.fixture(scope="module", name="prepared")
def _prepared(tmp_path_factory):
    """(config, folder with the work directory `tasks`, in which stage tasks has finished)."""
    folder = tmp_path_factory.mktemp("hosts")
    folder.chmod(0o755)
    (folder / "corpus").mkdir()
    own_files.write_corpus(folder / "corpus" / "a.parquet")
    own_files.write_chats(folder / "chats.jsonl")
    # Qwen's own vocabulary, with which recipes are tested, would take eight devices' logits out of memory here.
    own_files.write_model(folder / "model", Tokenizer.train(own_files.texts(), 384, ADDED_TOKENS), own_files.LENGTH)
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
    start = lambda: testing.Hosts(_command(config, workdir), environment=_environment(folder / "cache"))
    for killed, stage in ((1, "midtrain"), (0, "sft")):  # behind the checkpoint of step 2
        with start() as hosts:
            hosts.until(killed, re.compile(rf"^\[ *{stage} .*step [345]/6", re.MULTILINE))
            hosts.kill(killed)
            print(f"survivor of {stage} ended after {_survivor_ends(hosts, 1 - killed):.1f} s")
    with start() as hosts:
        outputs = hosts.finish()
    return workdir, outputs


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


@pytest.mark.torch
def test_transformers_reads_the_result(two):
    import transformers

    model = transformers.Qwen3NextForCausalLM.from_pretrained(two[0] / "sft" / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(two[0] / "sft" / "model")
    logits = model(**tokenizer("def area(", return_tensors="pt")).logits
    assert bool(logits.isfinite().all())
