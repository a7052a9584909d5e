"""What the mid-trained model takes for the defect: plausible mistakes for the solver's recoveries to begin with.

A recovery from a random exchange of tokens teaches little, because no model would have made it: the right edit was
likelier all along. After a failing edit that the model itself believed in, the loss can only fall if the model
learns to turn away from what failed the tests.
"""

from collections import Counter
from collections.abc import Sequence

from qcn_jax import files
from qcn_jax.agents.scaffolds import Scaffold
from qcn_jax.agents.workspace import open_overlay
from qcn_jax.envs.tasks.schema import Task
from qcn_jax.inference.sampling import Sampling
from qcn_jax.pipeline import models
from qcn_jax.pipeline.context import StageContext
from qcn_jax.pipeline.rl import episodes
from qcn_jax.pipeline.rl.records import Outcome, Reply, sequence_seed
from qcn_jax.pipeline.rl.rollout import rollout
from qcn_jax.recipes.nano.edits import EditDocuments
from qcn_jax.recipes.nano.spans import MAX_LINE_TOKENS, dedent

Guess = tuple[int, str, str]
TEMPERATURE = 1.2  # above 1: what the model is sure of is often right, and only mistakes are wanted
SEED = 2_000_003


class _Proposal:
    """One answer to an edit document's prompt; see pipeline.rl.records.Conversation."""

    def __init__(self, documents: EditDocuments, prompt: list[int]) -> None:
        self._documents, self._prompt, self._edits = documents, prompt, []

    def opening(self) -> list[int]:
        return self._prompt

    def reply(self, tokens: list[int], stopped: bool) -> Reply:
        self._edits = self._documents.read(tokens) if stopped else []
        return Reply(done=True)

    def outcome(self, truncated: bool) -> Outcome:
        return Outcome(0.0, False, True, detail={"edits": self._edits})

    def close(self) -> None:
        """It holds nothing."""


def propose(context: StageContext, scaffold: Scaffold, tasks: Sequence[Task], samples: int) -> dict[str, list[Guess]]:
    """`samples` sampled answers per task: its id -> distinct (line, old, new), most frequent first.

    Right ones are among them.

    Written to sft/guesses.json, so that a resumed stage goes on with the same.
    """
    path = context.root / "sft" / "guesses.json"
    if not path.exists():
        tokenizer = context.tokenizer()
        model, params = models.load(context, "midtrain")
        # The experts' engine: the same shapes, so that they are compiled once.
        engine = episodes.make_engine(model, params, context.encoder(), context.config.experts.rollout)
        documents = EditDocuments([], tokenizer, seed=0, max_tokens=engine.max_length)
        services = context.services()
        prompts = {task.instance_id: _prompt(scaffold, task, services.files(task.repo), documents) for task in tasks}
        names = [name for name, prompt in prompts.items() if 0 < len(prompt) < engine.max_length]
        groups = [[_Proposal(documents, prompts[name]) for _ in range(samples)] for name in names]
        seeds = [[sequence_seed(context.config.seed, SEED, number, sample) for sample in range(samples)]
                 for number in range(len(names))]
        found: dict[str, Counter[Guess]] = {name: Counter() for name in names}
        for record in rollout(engine, groups, seeds, sampling=Sampling(TEMPERATURE)):
            found[names[record.prompt]].update(record.outcome.detail["edits"])
        files.write_json(path, {name: [edit for edit, _ in edits.most_common()] for name, edits in found.items()})
        context.log(f"{sum(map(len, found.values()))} guesses of the mid-trained model on {len(names)} tasks")
    return {name: [tuple(edit) for edit in edits] for name, edits in files.read_json(path).items()}


def _prompt(scaffold: Scaffold, task: Task, pristine: dict[str, str], documents: EditDocuments) -> list[int]:
    """The task's function as an edit document shows it; empty where it is too long for line tokens."""
    executor = scaffold.executor(task, open_overlay(task, pristine, None))
    view = executor.view()
    lines = dedent(executor.workspace.read(view.path).split("\n")[view.start - 1 : view.end])
    return documents.prompt(view.path, lines) if len(lines) <= MAX_LINE_TOKENS else []
