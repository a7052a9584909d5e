"""What a model's folder says of how its run let it act."""

import dataclasses
import json

import pytest

from qcn_jax.config import EvaluateConfig, RolloutConfig, RunConfig
from qcn_jax.errors import UserError
from qcn_jax.pipeline.evaluate import settings

CONFIG = RunConfig(seed=5, evaluate=EvaluateConfig(tasks=7, scaffold="swe_agent", rollout=RolloutConfig(max_turns=3, top_k=9)))


def test_settings_come_back_and_name_the_run_s_tasks(tmp_path):
    folder = tmp_path / "experts" / "swe" / "model"
    folder.mkdir(parents=True)
    assert settings.read(folder) is None
    found = settings.of_run(CONFIG, tmp_path, folder)
    (folder / "acting.json").write_text(json.dumps(found.to_json()))
    assert settings.read(folder) == found and (folder / found.tasks).resolve() == tmp_path / "tasks" / "heldout.jsonl"
    assert found.flags(sampled=False) == {"scaffold": "swe_agent", "network": "none", "seed": 5, "max_turns": 3,
                                          "max_new_tokens": 64, "max_length": 1024, "redraws": 0,
                                          "redraw_temperature": 0.8, "parallel": 64}
    assert found.flags(sampled=True)["top_k"] == 9 and found.flags(sampled=True)["temperature"] == 0.8


def test_the_stage_s_own_seed_and_older_files(tmp_path):
    evaluate = dataclasses.replace(CONFIG.evaluate, redraws=4, seed=1)
    found = settings.of_run(dataclasses.replace(CONFIG, evaluate=evaluate), tmp_path, tmp_path)
    assert found.seed != 5 and found.redraws == 4 and found.redraw_temperature == 0.8
    rollout = dataclasses.replace(CONFIG.evaluate.rollout, block_size=32, num_blocks=90)
    lean = settings.of_run(dataclasses.replace(CONFIG, evaluate=dataclasses.replace(evaluate, rollout=rollout)), tmp_path, tmp_path)
    assert lean.flags(False) == found.flags(False) | {"block_size": 32, "num_blocks": 90}
    older = {key: value for key, value in found.to_json().items() if not key.startswith("redraw") and "_block" not in key}
    (tmp_path / "acting.json").write_text(json.dumps(older))
    assert settings.read(tmp_path) == dataclasses.replace(found, redraws=0, redraw_temperature=1.0)


@pytest.mark.parametrize("field, value", [("scaffold", 5), ("max_turns", "8"), ("max_turns", True), ("temperature", None)])
def test_damage_is_named(tmp_path, field, value):
    found = settings.of_run(CONFIG, tmp_path, tmp_path)
    (tmp_path / "acting.json").write_text(json.dumps(dataclasses.asdict(found) | {field: value}))
    with pytest.raises(UserError, match=f"acting.json: {field} must be of type"):
        settings.read(tmp_path)
