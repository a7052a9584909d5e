"""All training stages begin from a folder of Qwen3.5's, dense or with experts, and leave folders that are whole."""

import dataclasses
import os
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from qcn_jax import files, hub, testing
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import MeshConfig
from qcn_jax.pipeline import models
from qcn_jax.pipeline.stages import midtrain
from tests.pipeline.stages import on_devices

pytestmark = pytest.mark.slow

STAGES = ("midtrain", "sft", "experts/swe", "distill")
CHANGES = {
    "qwen3_5_text": dict(num_experts=0, intermediate_size=24, tie_word_embeddings=True,
                  num_experts_per_tok=10, moe_intermediate_size=512, shared_expert_intermediate_size=512),
    "qwen3_5_moe_text": {},
}


def whole_checkpoint(folder, config):
    """A folder as published, with an encoder of images of one tensor."""
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"], config.vocab_size, midtrain.ADDED_TOKENS)
    params = jax.tree.map(lambda leaf: 0.2 * leaf, testing.random_params(config))
    hub.save(folder / "text", config, params, tokenizer)
    values = files.read_json(folder / "text" / "config.json")
    outer = {"model_type": config.model_type.removesuffix("_text"), "text_config": values, "vision_config": {"depth": 1},
             "tie_word_embeddings": config.tie_word_embeddings}
    table = safetensors.numpy.load_file(folder / "text" / "model.safetensors")
    table = {hub.stored.name_within(name): value for name, value in table.items()}
    table["model.visual.pos_embed.weight"] = np.arange(12, dtype="float32").reshape(3, 4)
    whole = folder / "whole"
    (folder / "text").rename(whole)
    files.write_json(whole / "config.json", outer)
    files.write_text(whole / "chat_template.jinja", "{{ 'their own' }}")
    safetensors.numpy.save_file(table, whole / "model.safetensors", metadata={"format": "pt"})
    return whole


def child():
    """Runs all stages in the folder QCN_TEST_DIRECTORY from the checkpoint in it, whose encoder they keep or drop."""
    root, vision = pathlib.Path(os.environ["QCN_TEST_DIRECTORY"]), os.environ["QCN_TEST_VISION"]
    config = on_devices.make_config()
    model = model_of(hub.load_config(root / "whole").model_type)
    config = dataclasses.replace(
        config, init=str(root / "whole"), model=model, vision=vision,
        mesh=MeshConfig(fsdp=1), midtrain=dataclasses.replace(config.midtrain, phases=()),
        experts=dataclasses.replace(config.experts, names=("swe",), routing="replay" if model.num_experts else "free"))
    on_devices.run(root, config)


def model_of(kind):
    return dataclasses.replace(on_devices.make_config().model, model_type=kind, **CHANGES[kind])


@pytest.mark.parametrize("kind, vision", [("qwen3_5_text", "keep"), ("qwen3_5_moe_text", "drop")])
def test_from_a_folder_through_every_stage(kind, vision, tmp_path, monkeypatch, run_with_devices):
    model = model_of(kind)
    folder = whole_checkpoint(tmp_path, model)
    monkeypatch.setenv("QCN_TEST_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("QCN_TEST_VISION", vision)
    run_with_devices(child, 1)
    before = hub.load(folder)[1]
    for stage in STAGES:
        saved = tmp_path / stage / "model"
        read, after = hub.load(saved)
        models.check_same(model, read, saved)
        assert jax.tree.structure(before) == jax.tree.structure(after)
        assert not all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))
        assert (saved / "chat_template.jinja").read_text() == "{{ 'their own' }}"
        images = hub.vision.tensors(saved)
        assert len(images) == (vision == "keep")
        if images:
            assert images["model.visual.pos_embed.weight"].rows(0, 3).tolist() == np.arange(12).reshape(3, 4).tolist()
        kinds = {"keep": kind.removesuffix("_text"), "drop": kind}
        assert files.read_json(saved / "config.json")["model_type"] == kinds[vision]
    transformers = pytest.importorskip("transformers")
    theirs, notes = transformers.AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(notes.values())
    state = theirs.state_dict()
    np.testing.assert_array_equal(state["model.norm.weight"].float().numpy(), np.asarray(after["norm"]["weight"]))
