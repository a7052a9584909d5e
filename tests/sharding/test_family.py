"""A dense model with tied embeddings on a mesh of three axes equals one device."""

import dataclasses
import json

from tests.sharding import test_forms


def child() -> None:
    config = dataclasses.replace(
        test_forms.small_config(), model_type="qwen3_5_text", num_experts=0, intermediate_size=12,
        tie_word_embeddings=True, linear_num_value_heads=6)
    test_forms.compare(config, {"all": {"fsdp": 2, "tensor": 2, "context": 2}})


def test_dense_layers_and_tied_embeddings(run_with_devices):
    results = json.loads(run_with_devices(child, 8).splitlines()[-1])
    errors = results["all"]["gradients"]
    assert {"['embed_tokens']['embedding']", "['blocks']['full']['mlp']['down_proj']['kernel']"} < set(errors)
    assert not any("lm_head" in name for name in errors)
    assert results["all"]["loss"] < 1e-6 and results["smallest"] > 1e-7
    wrong = {name: error for name, error in errors.items() if not error < 1e-5}
    assert not wrong
