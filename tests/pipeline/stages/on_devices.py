"""All training stages over the devices there are, small: curves, results, and the programs that ran and that compile."""

import dataclasses
import hashlib
import json
import os
import pathlib

ROWS, LENGTH, VOCABULARY = 8, 64, 384


def make_config():
    """A run of two steps a stage; more slices than one in SFT, experts and distillation."""
    import jax

    from qcn_jax.config import (
        ChatSource,
        DistillConfig,
        ExpertsConfig,
        MeshConfig,
        MidtrainConfig,
        OptimizerConfig,
        PhaseConfig,
        RolloutConfig,
        RunConfig,
        SftConfig,
        TextSource,
        TokenizerConfig,
        TrainConfig,
    )  # fmt: skip
    from tests.pipeline.micro import MODEL

    # An eps above the gradients makes AdamW's step proportional to them. With a small one a gradient that is nothing but
    # rounding moves its parameter by a whole step, in either direction; large steps amplify rounding as well.
    rule = OptimizerConfig(learning_rate=0.01, warmup_steps=0, eps=0.1)
    train = TrainConfig(steps=3, rows=ROWS, sequence_length=LENGTH, mtp_coef=0.1, log_every=1, optimizer=rule)
    acting = {"updates": 2, "group_size": 4, "rows": ROWS, "sequence_length": 16, "optimizer": rule,
              "rollout": RolloutConfig(slots=16, max_length=16, max_new_tokens=4)}
    few = min(2, jax.device_count())
    phases = (PhaseConfig(steps=2), PhaseConfig(steps=2, sequence_length=2 * LENGTH, mesh={"context": 1, "expert": few}))
    return RunConfig(
        init="random", model=dataclasses.replace(MODEL, vocab_size=VOCABULARY, num_nextn_predict_layers=1),
        tokenizer=TokenizerConfig(vocab_size=VOCABULARY),
        mesh=MeshConfig(fsdp=-1, expert=few, context=few),
        midtrain=MidtrainConfig(train=dataclasses.replace(train, steps=4), phases=phases, sources={
            "repository": TextSource(kind="nano", form="repository", megabytes=0.02)}),
        sft=SftConfig(train=dataclasses.replace(train, rows=2 * ROWS, accumulate=2), sources={"made": ChatSource()}),
        experts=ExpertsConfig(names=("swe", "single_turn"), prompts=6, kl_coef=0.1, routing="replay", **acting),
        distill=DistillConfig(prompts=8, **acting),
    )  # fmt: skip


@dataclasses.dataclass
class Parity:
    """One turn after a prompt; the reward is the share of tokens of the prompt's parity."""

    prompt: int
    share: float = 0.0

    def opening(self):
        return [2, 8 + self.prompt]

    def reply(self, tokens, stopped):
        from qcn_jax.pipeline.rl.records import Reply

        self.share = sum(token % 2 == self.prompt % 2 for token in tokens) / len(tokens)
        return Reply(done=True)

    def outcome(self, truncated):
        from qcn_jax.pipeline.rl.records import Outcome

        return Outcome(self.share, self.share > 0.5, finished=True)

    def close(self):
        pass


SINGLE_TURN = type("Scaffold", (), {"single_turn": True})


def fingerprint(lowered) -> str:
    """Hash of a program's StableHLO text, which has no locations in it."""
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def main():
    """Runs the stages in the folder QCN_TEST_DIRECTORY and prints what `run` returns, as JSON."""
    print(json.dumps(run(pathlib.Path(os.environ["QCN_TEST_DIRECTORY"]), make_config())))


def run(root: pathlib.Path, config):
    """{"ran", "compiles": {"stage number of its step": hash}, "shapes": {same: compilations}, "results": {stage: ...}}."""
    import jax
    import numpy as np

    from qcn_jax import files
    from qcn_jax.compile.stages import stage_step
    from qcn_jax.config_phases import of_phase
    from qcn_jax.pipeline.context import Shared, StageContext
    from qcn_jax.pipeline.data.readers import chat
    from qcn_jax.pipeline.experts import expert
    from qcn_jax.pipeline.experts.expert import Prompt
    from qcn_jax.pipeline.stages import distill, experts, midtrain, sft
    from qcn_jax.pipeline.train import trainer
    from tests.pipeline.stages.test_midtrain import _context

    ran, steps, made, make_step = {}, {}, [], trainer.make_step

    def watched(*arguments):
        """The step as it is made, whose program is taken down when the stage first calls it."""
        step = make_step(*arguments)

        def call(*given):
            if name not in ran:
                ran[name], steps[name] = fingerprint(step.lower(*given)), step
            return step(*given)

        name = f"{stage} {sum(other.startswith(stage) for other in made) + 1}"
        made.append(name)
        return call

    trainer.make_step = watched
    rng = np.random.default_rng(0)
    documents = [{"tokens": rng.integers(2, 300, n), "weights": rng.random(n)} for n in rng.integers(8, 30, 64)]
    chat.CHAT.read, sft.encoded = lambda *_: iter(()), lambda *_: iter(documents)
    StageContext.services = lambda context: None
    for module in (experts, distill):
        module.training_prompts = lambda context, expert, stage: [Prompt(expert, n, SINGLE_TURN) for n in range(8)]
    expert.TaskConversation = lambda task, *_, **__: Parity(task)
    results, lines = {}, []
    for stage, module in (("midtrain", midtrain), ("sft", sft), ("experts", experts), ("distill", distill)):
        context = _context(root, config, lines) if stage == "midtrain" else StageContext(config, root, stage, Shared(config, root))
        object.__setattr__(context, "log", lines.append)
        results[stage] = module.run_stage(context)
        files.write_json(root / stage / "DONE.json", {"results": results[stage]})
    trainer.make_step = make_step
    compiles = {}
    if jax.device_count() > 1:
        for name in made:
            stage, number = name.split()
            own = of_phase(config, stage, int(number))
            found = stage_step(own, stage, trainer.mesh_here(own.mesh))
            compiles[name] = fingerprint(found.function.lower(*found.arguments))
    return {"ran": ran, "compiles": compiles, "shapes": {stage: step._cache_size() for stage, step in steps.items()},
            "results": results, "lines": lines}
