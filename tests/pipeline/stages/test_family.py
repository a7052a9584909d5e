"""All training stages begin from a folder of Qwen3.5's, dense or with experts, and leave folders that are whole."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy

from qcn_jax import files, hub, testing
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import MeshConfig
from qcn_jax.pipeline import models
from qcn_jax.pipeline.experts import expert
from qcn_jax.pipeline.stages import distill, experts, midtrain, sft
from qcn_jax.pipeline.train import trainer
from tests.pipeline.stages import on_devices

pytestmark = pytest.mark.slow

STAGES = ("midtrain", "sft", "experts/swe", "distill")
CHANGES = {
    "dense": dict(model_type="qwen3_5_text", num_experts=0, intermediate_size=24, tie_word_embeddings=True,
                  num_experts_per_tok=10, moe_intermediate_size=512, shared_expert_intermediate_size=512),
    "experts": dict(model_type="qwen3_5_moe_text"),
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


@pytest.mark.parametrize("kind, vision", [("dense", "keep"), ("experts", "drop")])
def test_from_a_folder_through_every_stage(kind, vision, tmp_path, monkeypatch):
    for module, names in ((sft, ("collect_trajectories", "encode")), (expert, ("TaskConversation",)),
                          (experts, ("make_services", "training_prompts")), (trainer, ("make_step",)),
                          (distill, ("make_services", "training_prompts"))):
        for name in names:  # `on_devices.run` replaces them
            monkeypatch.setattr(module, name, getattr(module, name))
    config = on_devices.make_config()
    model = dataclasses.replace(config.model, **CHANGES[kind])
    folder = whole_checkpoint(tmp_path, model)
    config = dataclasses.replace(
        config, init=str(folder), model=model, vision=vision, mesh=MeshConfig(fsdp=1),
        midtrain=dataclasses.replace(config.midtrain, phases=()))
    root = tmp_path / "run"
    on_devices.run(root, config)
    before = hub.load(folder)[1]
    for stage in STAGES:
        saved = root / stage / "model"
        read, after = hub.load(saved)
        models.check_same(model, read, saved)
        assert jax.tree.structure(before) == jax.tree.structure(after)
        assert not all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))
        assert (saved / "chat_template.jinja").read_text() == "{{ 'their own' }}"
        images = hub.vision.tensors(saved)
        assert len(images) == (vision == "keep")
        if images:
            assert images["model.visual.pos_embed.weight"].rows(0, 3).tolist() == np.arange(12).reshape(3, 4).tolist()
        kinds = {"keep": model.model_type.removesuffix("_text"), "drop": model.model_type}
        assert files.read_json(saved / "config.json")["model_type"] == kinds[vision]
    transformers = pytest.importorskip("transformers")
    theirs, notes = transformers.AutoModelForCausalLM.from_pretrained(root / "distill" / "model", output_loading_info=True)
    assert not any(notes.values())
    state = theirs.state_dict()
    np.testing.assert_array_equal(state["model.norm.weight"].float().numpy(), np.asarray(after["norm"]["weight"]))
