"""`qcn compile`: a reduced model compiled for real TPU topologies, what does not fit, and bad input."""

import dataclasses
import json
import pathlib

import pytest

from qcn_jax.cli import compile as qcn_compile
from qcn_jax.cli import main as cli
from qcn_jax.compile import aot
from qcn_jax.compile.rollout import SequenceBytes
from qcn_jax.config import MidtrainConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig

CONFIG = pathlib.Path(__file__).resolve().parents[2] / "configs" / "qwen3_coder_next.py"
# One block of 80B's layers with fewer and narrower experts and a small vocabulary, on 8 devices.
REDUCED = [
    f"--config={CONFIG}:v5e-256,8k", "--topology=v5e:2x4", "--config.mesh.dispatch=ragged", "--config.mesh.fsdp=2", "--config.mesh.expert=4",
    "--config.model.num_hidden_layers=4", "--config.model.num_experts=32", "--config.model.vocab_size=4096",
    "--config.midtrain.train.rows=8", "--config.midtrain.train.sequence_length=1024",
]
needs_libtpu = pytest.mark.skipif(aot.libtpu_version() is None, reason="libtpu is not installed (extra `compile`)")


@pytest.fixture(scope="module", name="report")
def _report(tmp_path_factory):
    out = tmp_path_factory.mktemp("compile") / "report.json"
    status = cli.main(["compile", *REDUCED, f"--out={out}"])
    assert status == 0
    return json.loads(out.read_text())


@needs_libtpu
@pytest.mark.slow
def test_a_reduced_step_compiles_for_a_topology(report, capsys):
    memory = report["memory"]
    assert memory["fits"] and 0 < memory["total"] < memory["hbm"] == 16 * 2**30
    kinds = memory["arguments_by_kind"]
    per_device = 2 * report["parameters"] / 8
    # bfloat16 weights; two float32 moments and a float32 master copy; small replicated leaves on top.
    assert per_device <= kinds["weights"] < 1.2 * per_device
    assert kinds["optimizer"] == pytest.approx(6 * kinds["weights"], rel=0.05)
    assert memory["arguments"] == pytest.approx(sum(kinds.values()), rel=0.1)
    assert report["collective_bytes"]["all-gather"] > 0 and report["versions"]["libtpu"]
    assert report["collective_count"]["all-gather"] >= 3  # three layers of a scanned block are counted three times
    assert len(report["top_cycles"]) == 20
    flops = report["matmul_flops"] + report["kernel_flops"]
    # Everything is computed again in the backward pass, kernels count what they declare, and both branches of a
    # conditional are counted.
    assert 1.0 < flops / report["model_flops_per_device"] < 4.0
    text = qcn_compile.render(report)
    assert "fits" in text and "Not measured on a chip" in text and "ms" not in text.split()


@needs_libtpu
@pytest.mark.slow
def test_the_head_gradient_is_reduced_once(report):
    """All-reduces carry scalars, norms and the like: less than one gradient of the head a device."""
    head = 2048 * 4096 * 4
    assert report["collective_bytes"].get("all-reduce", 0) < head


def test_what_a_sequence_of_the_published_model_holds():
    each = SequenceBytes.of(dataclasses.replace(ModelConfig(), dtype="bfloat16"))
    assert each.token == 12 * 2 * 2 * 256 * 2  # attention layers, keys and values, heads, width, bytes
    assert each.state == 36 * (32 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 32 * 128) * 2)  # states, and windows of 3 tokens


@needs_libtpu
@pytest.mark.slow
def test_the_engines_programs_compile_for_a_topology(tmp_path, capsys):
    few = [f"--config.experts.{setting}" for setting in (
        "rows=8", "sequence_length=1024", "rollout.max_length=1024", "rollout.max_new_tokens=64", "rollout.slots=16",
        "rollout.prefill_rows=8", "rollout.prefill_chunk=128")]
    out = tmp_path / "report.json"
    assert cli.main(["compile", *REDUCED, "--config.mesh.dispatch=gather", *few, "--stage=rollout", f"--out={out}"]) == 0
    report, text = json.loads(out.read_text()), capsys.readouterr().out
    assert report["slots"] == 16 and report["parts"] == 8 and list(report["programs"]) == [
        "decode", "prefill", "arrange", "update"]
    decode = report["programs"]["decode"]
    kinds = decode["memory"]["arguments_by_kind"]
    assert kinds["keys and values"] == 2 * 1024 * report["bytes_per_token"]  # two slots a device
    assert kinds["states"] == 2 * report["bytes_per_state"]
    assert decode["memory"]["outputs_not_aliased"] < kinds["keys and values"]  # caches are updated in place
    # Nothing of the size of a cache moves between devices.
    assert max(moved["bytes"] for moved in decode["largest_collectives"]) < kinds["keys and values"]
    fit = list(report["sequences"].values())
    assert fit == sorted(fit, reverse=True) and fit[0] > fit[-1] > 0 and f"64k sequences: {fit[1]:,}" in text
    # What the update takes holds the trainer's state already, and the engine's weights lie beside it.
    assert report["beside"]["update"] == report["programs"]["update"]["memory"]["total"] + kinds["weights"]
    assert report["beside"]["decode"] > report["trainer_bytes"] + kinds["weights"]
    by_program = report["sequences_by_program"].values()
    assert fit == [min(counts[length] for counts in by_program) for length in report["sequences"]]


def test_bad_input_is_one_line(capsys, tmp_path):
    base = [f"--config={CONFIG}:v5p-128"]
    for arguments, words in (
        ([f"--config={CONFIG}:v9-7"], ["'v9-7'", "v5p-128"]),
        ([*base, "--topology=v7x:4x4"], ["--topology=v7x:4x4", "tpu7x"]),
        ([*base, "--topology=v5p"], ["GENERATION:AxBxC"]),
        (["--config=" + str(CONFIG.with_name("nano.py"))], ["--topology is required"]),
        ([*base, "--stage=evaluate"], ["--stage", "midtrain"]),
        ([*base, "--phase=3"], ["--phase=3", "midtrain has 2"]),
    ):
        assert cli.main(["compile", *arguments]) == 1
        line = capsys.readouterr().err.strip()
        assert len(line.splitlines()) == 1 and all(word in line for word in words), line


@needs_libtpu
def test_sizes_that_do_not_divide_are_one_line(capsys):
    assert cli.main(["compile", *REDUCED, "--config.midtrain.train.rows=6"]) == 1
    assert "--config.midtrain.train.rows: 6 does not divide by 8 parts (--config.mesh: fsdp 2 x expert 4)" in capsys.readouterr().err


def test_what_does_not_fit_says_what_to_change():
    gib = 2**30
    config = RunConfig(
        model=ModelConfig(param_dtype="float32"), midtrain=MidtrainConfig(train=TrainConfig(rows=32)))
    kinds = {"weights": 5 * gib, "optimizer": 10 * gib, "batch": 1000}
    report = {
        "config": "x", "stage": "midtrain", "topology": "v5e:4x4", "slices": 1, "devices": 16, "mesh": {"fsdp": 16},
        "parameters": 7, "tokens_per_device": 8192, "memory": {
            "arguments_by_kind": kinds, "total": 40 * gib, "hbm": 16 * gib, "fits": False, "compiler": "needs more"},
    }
    report["advice"] = qcn_compile.advice(config, "midtrain", report)
    text = qcn_compile.render(report)
    assert "does not fit: 24.0 GiB too much" in text
    assert "--config.model.remat=full" in report["advice"][0] and "about 17.5 GiB less" in report["advice"][0]
    joined = "\n".join(report["advice"])
    assert "--config.midtrain.train.accumulate=2" in joined and "about 12.5 GiB less" in joined
    assert "mu_dtype=bfloat16, about 2.5 GiB less" in joined and "param_dtype=bfloat16, about 2.5 GiB less" in joined
    assert "offload=true" in joined and "about 10.0 GiB less" in joined
    smaller = RunConfig(model=ModelConfig(remat="full", param_dtype="bfloat16"))
    train = TrainConfig(rows=8, accumulate=8, optimizer=OptimizerConfig(mu_dtype="bfloat16", offload=True))
    smaller = RunConfig(model=smaller.model, midtrain=type(smaller.midtrain)(train=train))
    joined = "\n".join(qcn_compile.advice(smaller, "midtrain", report))
    # A row for each group of devices is not to be had with half the rows: it is split over twice the devices.
    assert "--config.mesh.context=2 --config.mesh.fsdp=8 --config.midtrain.train.rows=4" in joined
    assert "remat" not in joined and "mu_dtype" not in joined and "offload" not in joined
    # No more parts than attention heads.
    crowded = report | {"mesh": {"fsdp": 8, "context": smaller.model.num_attention_heads}}
    assert "mesh.context" not in "\n".join(qcn_compile.advice(smaller, "midtrain", crowded))


def test_the_compilers_message_is_understood():
    error = aot._refusal("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 120.5G of 95.74G hbm. And")
    assert isinstance(error, aot.TooLarge) and error.used == 120.5 * 2**30 and error.limit == 95.74 * 2**30
    assert not isinstance(aot._refusal("INVALID_ARGUMENT: no"), aot.TooLarge)
