"""Types of configuration fields that hold a name: of what is defined elsewhere in the package, or of a few words."""

from typing import Annotated

from qcn_jax.config_values import Known, OneOf

RematPolicy = Annotated[str, Known("qcn_jax.layers.remat:POLICIES")]
MoeBackend = Annotated[str, Known("qcn_jax.moe.experts:BACKENDS")]
Dispatch = Annotated[str, Known("qcn_jax.moe.dispatch.dispatch:FORMS")]
BugKind = Annotated[str, Known("qcn_jax.envs.synthesis.inject:KINDS")]
Packing = Annotated[str, Known("qcn_jax.pipeline.data.packing:METHODS")]
Overlong = Annotated[str, Known("qcn_jax.pipeline.data.packing:OVERLONG")]
# A registered name, or package.module:OBJECT.
ScaffoldName = Annotated[str, Known("qcn_jax.agents.scaffolds:SCAFFOLDS")]
ExpertName = Annotated[str, Known("qcn_jax.pipeline.experts:EXPERTS")]
TextReader = Annotated[str, Known("qcn_jax.pipeline.data.readers:READERS")]
DocumentForm = Annotated[str, Known("qcn_jax.pipeline.data.documents:FORMS")]
ChatReader = Annotated[str, Known("qcn_jax.pipeline.data.readers:CHATS")]
Statement = Annotated[str, OneOf("issue", "observed")]
Malformed = Annotated[str, OneOf("stop", "skip")]
Objective = Annotated[str, Known("qcn_jax.pipeline.rl.objectives:OBJECTIVES")]
Reward = Annotated[str, Known("qcn_jax.pipeline.experts:REWARDS", also=("",))]
Baseline = Annotated[str, Known("qcn_jax.pipeline.evaluate.baseline:BASELINES", also=("",))]
AdvantageBaseline = Annotated[str, Known("qcn_jax.pipeline.rl.settings:ADVANTAGE_BASELINES")]
AdvantageScale = Annotated[str, Known("qcn_jax.pipeline.rl.settings:ADVANTAGE_SCALES")]
Stale = Annotated[str, Known("qcn_jax.pipeline.rl.plan:STALE")]
Preemption = Annotated[str, Known("qcn_jax.inference.blocks:PREEMPTIONS")]
Caches = Annotated[str, Known("qcn_jax.pipeline.rl.plan:CACHES")]
Routing = Annotated[str, Known("qcn_jax.pipeline.rl.settings:ROUTINGS")]
Average = Annotated[str, Known("qcn_jax.pipeline.rl.settings:AVERAGES")]
Nonfinite = Annotated[str, OneOf("stop", "skip")]
DistillLoss = Annotated[str, Known("qcn_jax.pipeline.stages.distill:LOSSES")]
Pool = Annotated[str, Known("qcn_jax.envs.pool.env_pool:POOLS")]
ProblemKind = Annotated[str, Known("qcn_jax.envs.problems.schema:KINDS")]
ProblemLanguage = Annotated[str, Known("qcn_jax.envs.problems.schema:LANGUAGES")]
CallKind = Annotated[str, Known("qcn_jax.envs.calls.make:KINDS")]
Template = Annotated[str, Known("qcn_jax.chat.templates:TEMPLATES")]
