"""qcn preview-data: the rows that a stage trains on, marked as the loss counts them; nothing else is touched."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.cli.main import main
from qcn_jax.config import (
    MidtrainConfig,
    ModelConfig,
    RunConfig,
    SftConfig,
    TextSource,
    TokenizerConfig,
    TrainConfig,
)
from qcn_jax.hub.configuration import config_to_hf
from qcn_jax.pipeline import preview
from qcn_jax.pipeline.context import Shared, StageContext
from qcn_jax.pipeline.data import loader
from qcn_jax.pipeline.report import rows
from qcn_jax.pipeline.stages import midtrain
from tests.conftest import ROOT

CHAT = [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": "Say \x1b[31mhi\x1b[0m \u202e."},
        {"role": "assistant", "content": "Hi\nthere", "weight": 0.5}, {"role": "user", "content": "Bye ü"},
        {"role": "assistant", "content": "<i>Ciao</i> ü"}]
SHOWN = ("<|im_start|>system\nBe <b>brief</b>.<|im_end|>\n<|im_start|>user\nSay ␛[31mhi␛[0m ⟨U+202E⟩.<|im_end|>\n"
         "<|im_start|>assistant\n⟦0.5|Hi\nthere<|im_end|>⟧\n<|im_start|>user\nBye ü<|im_end|>\n"
         "<|im_start|>assistant\n⟦<i>Ciao</i> ü<|im_end|>⟧\n")


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
    """A model's folder as far as a preview reads it, conversations, and a configuration."""
    folder = tmp_path_factory.mktemp("preview")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(config_to_hf(ModelConfig())))
    Tokenizer.train(["user assistant system"], 300, midtrain.ADDED_TOKENS).save(folder / "model")
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(3)))
    (folder / "config.py").write_text(
        "from qcn_jax.config import *\n"
        "def get_config():\n"
        f"    return RunConfig(init={str(folder / 'model')!r}, sft=SftConfig(train=TrainConfig(sequence_length=256)))\n")
    return folder


def test_rows_in_a_terminal_without_colours_and_as_a_page(folder):
    before = sorted(path.name for path in folder.rglob("*"))
    command = ["preview-data", f"--config={folder}/config.py", f"--config.sft.data={folder}/chats.jsonl", "--rows=2",
               "--tokens=0", "--html=page.html"]
    # No device: JAX would say at the first look at one that there is no such platform.
    environment = {**os.environ, "JAX_PLATFORMS": "none_such", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-m", "qcn_jax", *command], cwd=folder, env=environment, text=True,
                          capture_output=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count(SHOWN) >= 2 and "\x1b" not in done.stdout and "\u202e" not in done.stdout
    assert "data: 3 of 3 kept" in done.stdout and "packing best_fit: fragmentation 0.00 %, padding " in done.stdout
    assert re.search(r"^row 2 of 2: 256 positions, \d segments, \d+ tokens in the loss, \d+ positions", done.stdout, re.M)
    page = (folder / "page.html").read_text()
    assert sorted(path.name for path in folder.rglob("*")) == sorted([*before, "page.html"])
    text = re.sub(r"<[^>]*>", "", page.replace("↵\n", "\n"))
    assert "Be &lt;b&gt;brief&lt;/b&gt;." in text and "&lt;i&gt;Ciao&lt;/i&gt; ü" in text
    assert not re.search(r"<script|https?:|<b>brief|\x1b|\u202e", page)
    counted = "".join(re.findall(r'<i class="l(?: a)?" title="\d+ · weight 1">([^<]*)</i>', page))
    assert counted.startswith("&lt;i&gt;Ciao&lt;/i&gt; ü&lt;|im_end|&gt;")


def test_what_needs_a_run_says_so(folder, capsys):
    for arguments, line in (
            (["--config=nano", "--stage=sft"], "--workdir: conversations of --config.sft.sources.nano are made by acting"),
            (["--config=nano", "--stage=midtrain"], "--workdir: a source is made of what stage tasks leaves"),
            (["--config=nano", "--workdir=none"], "--workdir=.*none: there is no such folder"),
            (["--config=nano", "--stage=midtrain", "--phase=2"], "--phase=2: stage midtrain has 1"),
            ([f"--config={folder}/config.py"], "--config.sft.data: is empty"),
            (["--config=nano", "--html=no/page.html"], "--html=no/page.html: there is no folder")):
        assert main(["preview-data", *arguments]) == 1
        assert re.match(f"qcn preview-data: {line}", capsys.readouterr().err)


def test_rows_are_those_of_the_run_whose_folder_is_left_alone(tmp_path):
    rng = np.random.default_rng(0)
    words = lambda: "".join(f"value_{rng.integers(99)} = call({rng.integers(99)})\n" for _ in range(rng.integers(4, 40)))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": words(), "repo": f"r{i % 3}"}) + "\n" for i in range(60)))
    path = f"{tmp_path}/a.jsonl"
    config = RunConfig(init="random", tokenizer=TokenizerConfig(vocab_size=400), sft=SftConfig(), midtrain=MidtrainConfig(
        train=TrainConfig(steps=4, rows=3, sequence_length=128), overlong="slide", sources={
            "plain": TextSource(path=path), "repo": TextSource(path=path, form="repository")}))
    root = tmp_path / "run"
    context = StageContext(config, root, "midtrain", Shared(config, root))
    object.__setattr__(context, "log", [].append)
    stores = midtrain.read_texts(context)
    sources = midtrain.make_sources(context, stores, midtrain.prepare_tokenizer(context, stores))
    want = next(loader.batches(sources, rows=3, length=128, seed=0, overlong="slide"))
    files = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for workdir in (root, None):  # all of a small source is read
        found = preview.preview(config, "midtrain", 3, workdir=workdir)
        for row, tokens, weights, segments in zip(
                found.rows, want["tokens"], want["weights"], want["segment_ids"], strict=True):
            seen = [token for segment in row.segments for token in segment.tokens]
            assert [token.id for token in seen] == tokens[segments > 0].tolist()
            assert sum(token.weight for token in seen) == weights.sum()
        assert {segment.source for row in found.rows for segment in row.segments} <= {"plain", "repo"}
    assert files == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert found.packing["sources"]["plain"]["documents"] > 0 and found.packing["rule"] == "slide"


def test_colours_and_cuts():
    tokens = [rows.Token(i, text, weight, added) for i, (text, weight, added) in enumerate(
        [("<|im_start|>", 0, True), ("a", 0, False), ("b\n", 1, False), ("c", 0.5, False), ("d", 1, False)])]
    row = rows.Row(8, [rows.Segment("s", 0, tokens)])
    lines = list(rows.to_terminal([row], 0, colour=True))
    assert "8 positions, 1 segments, 3 tokens in the loss, 3 positions of padding" in lines[1]
    assert lines[3] == ("\x1b[1;35m<|im_start|>\x1b[0m\x1b[2ma\x1b[0m\x1b[30;42mb↵\x1b[0m\n\x1b[30;42m\x1b[0m"
                        "\x1b[30;103mc\x1b[0m\x1b[30;42md\x1b[0m")
    assert list(rows.to_terminal([row], 3, colour=False))[3] == "<|im_start|>a … 2 tokens … ⟦d⟧"
    page = rows.to_page([row], 3, "<t>", ["<line>"])
    assert "<title>&lt;t&gt;</title>" in page and "<p>&lt;line&gt;</p>" in page and "2 tokens" in page
    assert dataclasses.replace(row, length=5).padding == 0
