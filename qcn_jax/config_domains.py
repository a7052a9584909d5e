"""Configurations of what single experts are trained on and by; fields of RunConfig (config.py)."""

import dataclasses
from typing import Annotated

from qcn_jax import config_names as known
from qcn_jax.config_values import Within

Count = Annotated[int, Within(at_least=0)]


@dataclasses.dataclass(frozen=True)
class ProblemsConfig:
    """What expert `single_turn` answers: problems (envs/problems) of files or made here, and the run's tasks."""

    data: str = ""  # JSONL of problems to train on
    heldout_data: str = ""  # likewise those that are measured
    made: Count = 0  # problems that are made here, for training and as many for evaluation, which share no numbers
    kinds: tuple[known.ProblemKind, ...] = ()  # of those; all where empty
    languages: tuple[known.ProblemLanguage, ...] = ("python",)  # likewise; queries and texts know none
    edits: bool = True  # the run's tasks too, as one edit of the function in the prompt


@dataclasses.dataclass(frozen=True)
class ToolCallsConfig:
    """What expert `tool_format` answers by calls of tools that users define: requests (envs/calls) of files or made.

    Each is asked in one of the run's tool-call templates, and in evaluation in one of `heldout_templates` as well.
    """

    data: str = ""  # JSONL of requests to train on
    heldout_data: str = ""  # likewise those that are measured
    made: Count = 0  # requests that are made here, for training and as many for evaluation, which share no tool
    kinds: tuple[known.CallKind, ...] = ()  # of those; all where empty
    edits: bool = True  # the run's tasks too, as the scaffold presents them in a template


@dataclasses.dataclass(frozen=True)
class WebConfig:
    """What expert `web` does beside reinforcement learning on pages: rejection sampling, and having pages judged.

    Those of `samples` episodes on each training task that survive the tests (and the judge) are imitated for `steps`
    steps before reinforcement learning begins, and stand in experts/web/survivors.jsonl. Without a judge, checks of the
    DOM and the layout score alone (envs.web.judge).
    """

    samples: Count = 4  # 0: no rejection sampling
    steps: Count = 40
    judge_endpoint: str = ""  # OpenAI-compatible, of a model that takes images
    judge_model: str = ""
