"""Stages `experts` and `distill` from folder to folder, on a tiny repository with real sandboxes and workers."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from qcn_jax import files, hub
from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import (
    DistillConfig,
    ExpertsConfig,
    ModelConfig,
    OptimizerConfig,
    ProblemsConfig,
    RolloutConfig,
    RunConfig,
)  # fmt: skip
from qcn_jax.errors import UserError
from qcn_jax.inference.checkpoint import load_engine
from qcn_jax.model import Qwen3Next
from qcn_jax.pipeline.context import Shared, StageContext
from qcn_jax.pipeline.stages import distill, experts
from qcn_jax.pipeline.train.metrics import read_metrics
from tests.agents import tiny
from tests.pipeline.experts.test_experts import ADDED
from tests.pipeline.micro import MODEL

ROLLOUT = RolloutConfig(slots=8, max_length=256, max_new_tokens=8, max_turns=2)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=0)


def make_config(model: ModelConfig) -> RunConfig:
    return RunConfig(
        model=model, sandbox="local", workers=1,
        experts=ExpertsConfig(names=("swe", "tool_format"), updates=2, max_staleness=0, prompts=2, group_size=2, rows=1, sequence_length=256,
                    checkpoint_every=1, optimizer=OPTIMIZER, rollout=ROLLOUT),
        distill=DistillConfig(updates=2, prompts=2, group_size=2, rows=1, sequence_length=256, optimizer=OPTIMIZER,
                              rollout=ROLLOUT),
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A work directory in which the stages before `experts` are done, with an untrained model."""
    import jax

    root = tmp_path_factory.mktemp("run")
    root.chmod(0o755)
    archive = tiny.write_tree(root / "archive" / "tiny-1")
    tasks = [dataclasses.replace(tiny.make_task(), instance_id=f"tiny.{n}", function="" if n else "Calculator.clamp")
             for n in range(8)]  # fmt: skip
    files.write_jsonl(root / "tasks" / "train.jsonl", [task.to_json() for task in tasks])
    files.write_json(root / "tasks" / "repositories.json", [{"name": "tiny==1", "archive": str(archive)}])
    for stage in ("tasks", "sft"):
        files.write_json(root / stage / "DONE.json", {"seconds": 1.0, "results": {}})
    tokenizer = Tokenizer.train([tiny.GOOD, tiny.TESTS], 256 + len(ADDED) + 60, ADDED)
    (root / "midtrain" / "tokenizer").mkdir(parents=True)
    tokenizer.save(root / "midtrain" / "tokenizer")
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    params = jax.jit(Qwen3Next(model).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    hub.save(root / "sft" / "model", model, params)
    return root, make_config(dataclasses.replace(model, dtype="bfloat16", remat="full", chunk_size=16))


def context(root, config: RunConfig, stage: str, shared: Shared) -> StageContext:
    (root / stage).mkdir(exist_ok=True)
    return StageContext(config, root, stage, shared)


@pytest.mark.slow
def test_from_sft_to_one_model(root, monkeypatch) -> None:
    root, config = root
    computed = set()
    setup = Qwen3Next.setup
    monkeypatch.setattr(Qwen3Next, "setup", lambda self: (computed.add(self.config), setup(self))[1])
    shared = Shared(config, root)
    try:
        results = experts.run_stage(context(root, config, "experts", shared))
        assert list(results["experts"]) == ["swe", "tool_format"]
        for name, result in results["experts"].items():
            rows = read_metrics(root / "experts" / name / "metrics.jsonl")
            assert [row["step"] for row in rows] == [1, 2] and rows[0]["episodes"] == 4
            assert rows[0]["infrastructure"] == 0 and -0.2 <= rows[0]["reward"] <= 1
            assert result["prompts"] == len(tiny_tasks(root)) and result["seconds"] > 0  # SFT has imitated none of them
        assert results["mesh"] == {"devices": 1, "axes": {}}
        json.dumps(results, allow_nan=False)
        again = experts.run_stage(context(root, config, "experts", shared))  # nothing is trained twice
        assert again == results
        files.write_json(root / "experts" / "DONE.json", {"seconds": 1.0, "results": results})
        unified = distill.run_stage(context(root, config, "distill", shared))
        assert unified["last"]["episodes"] == 4 and unified["first"]["loss"] >= 0
    finally:
        shared.close()
    before, after = (hub.load(root / path)[1] for path in ("sft/model", "distill/model"))
    import jax

    assert computed == {config.model}  # neither dtype nor remat is lost on the way through config.json
    loaded = load_engine(root / "distill" / "model", slots=1, max_length=64, max_new_tokens=4)
    loaded.engine.extend({0: loaded.tokenizer.encode("clamp")})
    assert len(loaded.stop_ids) == 2 and loaded.engine.generate([0], seeds=[0])[0].tokens
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def tiny_tasks(root):
    from qcn_jax.envs.tasks.schema import read_tasks

    return read_tasks(root / "tasks" / "train.jsonl")


def test_episodes_longer_than_rows_are_refused(root) -> None:
    root, config = root
    shared = Shared(config, root)
    try:
        with pytest.raises(UserError, match="max_length"):
            long = dataclasses.replace(ROLLOUT, max_length=512)
            bad = dataclasses.replace(config, experts=dataclasses.replace(config.experts, rollout=long))
            experts.run_stage(context(root, bad, "experts", shared))
    finally:
        shared.close()

def test_problems_are_trained_on_and_measured(root, tmp_path) -> None:
    """The single-turn expert's problems, of a file and made here, from a configuration to what evaluation reports."""
    root, config = root
    path = tmp_path / "own.jsonl"
    files.write_jsonl(path, [{"id": "own", "kind": "instructions", "prompt": "Say anything.", "rules": [{"words_at_least": 0}]}])
    chosen = ProblemsConfig(data=str(path), heldout_data=str(path), made=2, kinds=("instructions",), edits=False)
    config = dataclasses.replace(config, problems=chosen, experts=dataclasses.replace(config.experts, names=("single_turn",)))
    shared = Shared(config, root)
    try:
        acting = context(root, config, "experts", shared)
        (expert,) = acting.experts()
        assert [task.instance_id for task in expert.own_tasks()] == ["own", *(
            f"instructions_train_{config.seed}_{number}" for number in range(2))]
        prompts = expert.prompts(acting.tasks("train"), acting.scaffold("experts"))
        assert [prompt.scaffold.name for prompt in prompts] == ["answer"] * 3
        services, encoder = acting.services(), acting.encoder()
        conversation = expert.conversation(prompts[0], encoder, services, max_turns=8)
        assert "Say anything." in encoder.tokenizer.decode(conversation.opening())
        assert conversation.reply([*encoder.tokenizer.encode("anything"), encoder.end], True).done
        assert conversation.outcome(False).reward == 1.0
        silent = expert.conversation(prompts[1], encoder, services, max_turns=8)
        silent.opening()
        silent.reply([*encoder.tokenizer.encode("anything"), encoder.end], True)
        assert silent.outcome(False).reward == 0.0
        (measured,) = context(root, config, "evaluate", shared).experts()
        assert [task.instance_id for task in measured.own_tasks()][1:] == [f"instructions_heldout_{config.seed}_{n}" for n in range(2)]
    finally:
        shared.close()
    nothing = dataclasses.replace(config, problems=ProblemsConfig(edits=False))
    with pytest.raises(UserError, match="--config.problems.edits: is off, and there are no problems"):
        context(root, nothing, "experts", Shared(nothing, root)).experts()
    missing = dataclasses.replace(config, problems=ProblemsConfig(data="/nowhere.jsonl"))
    with pytest.raises(UserError, match="/nowhere.jsonl"):
        context(root, missing, "experts", Shared(missing, root)).experts()
