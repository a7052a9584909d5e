"""Rejection sampling before reinforcement learning: what survives real tests is imitated, and nothing else."""

import dataclasses

import pytest

from qcn_jax import files, hub
from qcn_jax.chat import templates
from qcn_jax.config import ExpertsConfig, OptimizerConfig, RolloutConfig, RunConfig, SftConfig, TrainConfig
from qcn_jax.errors import UserError
from qcn_jax.pipeline.context import Shared, StageContext
from qcn_jax.pipeline.data import loader
from qcn_jax.pipeline.experts.expert import Expert
from qcn_jax.pipeline.stages import experts
from tests.agents import tiny
from tests.inference import speaking
from tests.pipeline.experts.test_experts import RIGHT, WRONG

SAID = [templates.render(templates.NATIVE, "", [call]) for call in (RIGHT, WRONG)]
LENGTH = 384


class _Single(Expert):
    def present(self, scaffold, template=""):
        return scaffold.single()


PATIENT = _Single("patient", "one that imitates itself first", rejection=(6, 2))


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """Stage experts of a run whose model says the right edit or a wrong one, by chance."""
    root = tmp_path_factory.mktemp("run")
    root.chmod(0o755)
    archive = tiny.write_tree(root / "archive" / "tiny-1")
    speaking.write(root / "speaker", SAID, [tiny.GOOD, tiny.TESTS], length=LENGTH)
    tasks = [dataclasses.replace(tiny.make_task(), instance_id=f"tiny.{number}") for number in range(2)]
    files.write_jsonl(root / "tasks" / "train.jsonl", [task.to_json() for task in tasks])
    files.write_json(root / "tasks" / "repositories.json", [{"name": "tiny==1", "archive": str(archive)}])
    files.write_json(root / "tasks" / "DONE.json", {"seconds": 1.0, "results": {}})
    train = TrainConfig(mtp_coef=0.0, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.0))
    config = RunConfig(
        init=str(root / "speaker"), model=hub.load_config(root / "speaker"), sandbox="local", workers=1,
        sft=SftConfig(train=train),
        experts=ExpertsConfig(
            names=("tests.pipeline.stages.test_rejection:PATIENT",), updates=1, prompts=1, group_size=2, rows=1,
            sequence_length=LENGTH, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
            rollout=RolloutConfig(slots=4, max_length=LENGTH, max_new_tokens=4, max_turns=1, prefill_rows=4)))
    shared = Shared(config, root)
    (root / "experts").mkdir()
    yield StageContext(config, root, "experts", shared)
    shared.close()


def test_survivors_are_imitated_first(context):
    results = experts.run_stage(context)["experts"]["patient"]
    survived, folder = results["rejection"], context.workdir / "patient"
    assert (survived["prompts"], survived["episodes"], survived["steps"]) == (2, 12, 2)
    assert 0 < survived["survived"] < 12  # wrong edits were made, too
    assert survived["kept"] == survived["prompts_kept"] == 2  # of the same turns one
    rows = files.read_jsonl(folder / "survivors.jsonl")
    assert [row["task_id"] for row in rows] == ["tiny.0", "tiny.1"]
    assert {row["messages"][-1]["tool_calls"][0]["arguments"]["new"] for row in rows} == {RIGHT.arguments["new"]}
    store = loader.TokenStore(folder / "survivors")
    assert store.total("weights") == 2 * 2  # the answer and the end of its turn
    assert hub.load(folder / "imitation" / "model")[0] == hub.load_config(context.root / "speaker")
    before = (folder / "survivors.json").stat().st_mtime_ns
    (folder / "DONE.json").unlink()
    assert experts.run_stage(context)["experts"]["patient"]["rejection"] == survived
    assert (folder / "survivors.json").stat().st_mtime_ns == before  # a resumed run samples nothing again


def test_an_expert_without_a_task_is_named(context):
    config = dataclasses.replace(context.config, experts=dataclasses.replace(context.config.experts, names=("web", "swe")))
    lines = []
    class Quiet(StageContext):
        def log(self, line):
            lines.append(line)

    with_web = Quiet(config, context.root, "experts", context.shared)
    assert [(expert.name, expert.headline) for expert in with_web.experts()] == [("swe", True)]
    assert with_web.experts() and lines == ["expert web is skipped: the run has no tasks of pages"]
    alone = dataclasses.replace(config, experts=dataclasses.replace(config.experts, names=("web",)))
    with pytest.raises(UserError, match="^--config.experts.names: none is left; the run has no tasks of pages"):
        StageContext(alone, context.root, "experts", context.shared).experts()
