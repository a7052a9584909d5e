"""What a stage of the main job is given: the configuration, its folder, and the things that stages share.

Every stage is a function `run_stage(context) -> dict`; the returned dictionary must be JSON-ready and is kept
in `DIR/<stage>/DONE.json`. The layout of a work directory, fixed here and nowhere else:

  DIR/tasks/{train,heldout}.jsonl      verified tasks (SWE-bench schema)
  DIR/tasks/repositories.json          list of RepositorySpec fields, one per repository
  DIR/tasks/instances.jsonl            of tasks that SWE-bench's own rules decide: image, script, log parser, tests
  DIR/midtrain/tokenizer/              tokenizer.json of the run; without mid-training, that of config.init
  DIR/midtrain/init.json               which checkpoint the run starts from (see pipeline.models), in the folder of
                                       the first stage that reads it
  DIR/midtrain/model/, DIR/sft/model/, DIR/experts/<expert>/model/, DIR/distill/model/,
  DIR/evaluate/sft_control/model/      weights in Hugging Face form, with tokenizer, chat template and ids of its ends
  DIR/<stage>/metrics.jsonl, DIR/experts/<expert>/metrics.jsonl     curves, one row per logged step
  DIR/sandbox/                         state of the sandbox provider (prepared repositories), known verdicts
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qcn_jax import files
from qcn_jax.config import RunConfig
from qcn_jax.config_phases import has_data
from qcn_jax.envs.tasks.schema import Task, read_tasks
from qcn_jax.errors import UserError
from qcn_jax.sharding import distributed

if TYPE_CHECKING:
    from qcn_jax.agents.image_tasks import ImageTasks
    from qcn_jax.agents.scaffolds import Scaffold
    from qcn_jax.agents.services import Services
    from qcn_jax.chat.encoder import Encoder
    from qcn_jax.envs.web.judge import Judge
    from qcn_jax.pipeline.experts.expert import Expert

_MODEL_FOLDERS = {
    "midtrain": "midtrain/model",
    "sft": "sft/model",
    "unified": "distill/model",
    "sft_control": "evaluate/sft_control/model",
}


class Shared:
    """Things built at most once per run, on first use, and closed together: sandbox provider and pool."""

    def __init__(self, config: RunConfig, root: pathlib.Path) -> None:
        self._config = config
        self._root = root
        self._built: dict[str, Any] = {}

    def get(self, name: str, build: Callable[[], Any]) -> Any:
        """Returns the thing called `name`, built by `build()` the first time."""
        if name not in self._built:
            self._built[name] = build()
        return self._built[name]

    def close(self) -> None:
        """Closes what was built, the latest first; safe to call twice."""
        while self._built:
            _, thing = self._built.popitem()
            close = getattr(thing, "close", None)
            if close is not None:
                close()


def stage_seed(config: RunConfig, stage: str) -> int:
    """What is random in a stage: follows from `config.seed` and, of experts and evaluate, from the stage's own."""
    from qcn_jax.pipeline.rl.records import sequence_seed

    own = getattr(getattr(config, stage, None), "seed", 0)
    return sequence_seed(config.seed, own) % 2**31 if own else config.seed


@dataclasses.dataclass(frozen=True)
class StageContext:
    """Handed to every stage.

    Attributes:
      config: the whole run's configuration.
      root: the run's work directory.
      stage: name of the stage that runs.
      shared: see `Shared`; use `provider()`, `pool()` and `tokenizer()` instead.
    """

    config: RunConfig
    root: pathlib.Path
    stage: str
    shared: Shared
    started: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def workdir(self) -> pathlib.Path:
        """The stage's own folder; exists while the stage runs."""
        return self.root / self.stage

    @property
    def seed(self) -> int:
        """See `stage_seed`."""
        return stage_seed(self.config, self.stage)

    def log(self, line: str) -> None:
        """Prints one progress line with the stage's name and its seconds so far."""
        seconds = time.monotonic() - self.started
        print(f"[{self.stage:>8} {seconds:6.1f}s] {line}", flush=True)

    def model_path(self, name: str) -> pathlib.Path:
        """Folder of the weights of a model: midtrain, sft, expert_NAME, unified or sft_control."""
        own = _MODEL_FOLDERS.get(name) or f"experts/{name.removeprefix('expert_')}/model"
        return self.root / own

    def experts(self) -> "tuple[Expert, ...]":
        """The experts that the configuration names, with what it gives them for this stage (pipeline.experts).

        Those that the run has no tasks for are skipped, and a line says why.

        Raises:
          UserError: none is left.
        """
        from qcn_jax.pipeline.experts import experts_of, with_headline

        split = "heldout" if self.stage == "evaluate" else "train"
        found = tuple(expert.configured(self.config, split) for expert in experts_of(self.config.experts.names))
        if not (self.root / "tasks" / "DONE.json").exists():
            return found
        tasks = self.result("tasks")
        absent = {expert.name: reason for expert in found if (reason := expert.absent(tasks))}
        for name, reason in absent.items():
            self.shared.get(f"{self.stage} without {name}", lambda line=f"expert {name} is skipped: {reason}":
                            self.log(line))
        if len(absent) == len(found):
            raise UserError(f"--config.experts.names: none is left; {'; '.join(absent.values())}")
        return with_headline([expert for expert in found if expert.name not in absent])

    def scaffold(self, stage: str) -> "Scaffold":
        """The scaffold of `stage` (sft, experts, distill or evaluate) under the run's chat template."""
        from qcn_jax.agents.scaffolds import SCAFFOLDS
        from qcn_jax.pipeline.chat_template import fitted

        field = f"--config.{stage}.scaffold"
        return fitted(SCAFFOLDS.resolve(getattr(self.config, stage).scaffold, field), self.encoder(), field)

    def result(self, stage: str) -> dict[str, Any]:
        """Results of a finished stage.

        Raises:
          UserError: that stage has not finished; the line says how to run it.
        """
        path = self.root / stage / "DONE.json"
        if not path.exists():
            raise UserError(f"stage {self.stage} needs stage {stage}, which has not finished in {self.root}; "
                            f"run it with --stages={stage}")
        return files.read_json(path)["results"]

    def _without_tasks(self) -> bool:
        """Whether nothing has made tasks, and experts act on what they bring along."""
        from qcn_jax.pipeline.experts import experts_of

        acting = self.stage in ("experts", "distill", "evaluate")
        return acting and not (self.root / "tasks" / "DONE.json").exists() and not any(
            expert.wants_tasks(self.config) for expert in experts_of(self.config.experts.names))

    def tasks(self, split: str) -> list[Task]:
        """Verified tasks of `split`, train or heldout; none where no expert wants any and there are none."""
        if self._without_tasks():
            return []
        self.result("tasks")
        return read_tasks(self.root / "tasks" / f"{split}.jsonl")

    def repositories(self) -> dict[str, Any]:
        """RepositorySpec of every repository of the run by name."""
        from qcn_jax.envs.sandbox.repository import read_specs

        if self._without_tasks():
            return {}
        self.result("tasks")
        return {spec.name: spec for spec in read_specs(self.root / "tasks" / "repositories.json")}

    def start(self, stage: str) -> str:
        """The model that a stage begins from: of the trained ones before it the last, `base` where there is none.

        Args:
          stage: sft, or one behind it, which all begin from the same.

        Raises:
          UserError: one of those before it has data and has not finished.
        """
        for before in ("midtrain",) if stage == "sft" else ("sft", "midtrain"):
            if has_data(self.config, before) or (self.root / before / "DONE.json").exists():
                self.result(before)
                return before
        if self.config.init == "random":
            raise UserError(f"stage {stage} needs a model: --config.init=random, and {self.root} holds none that a "
                            "stage has trained; name a Hugging Face folder, or run it with --stages=midtrain,sft")
        return "base"

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """The run's tokenizer.json; written by stage midtrain."""
        return self.root / "midtrain" / "tokenizer" / "tokenizer.json"

    def tokenizer(self) -> Any:
        """The run's tokenizer (chat.tokenizer.Tokenizer): stage midtrain's, or that of `config.init` without it."""
        from qcn_jax.chat.tokenizer import Tokenizer
        from qcn_jax.pipeline.models import initial_folder

        def build() -> Tokenizer:
            if has_data(self.config, "midtrain") or self.tokenizer_path.exists() or self.config.init == "random":
                return Tokenizer.from_file(self.tokenizer_path)
            return Tokenizer.from_folder(initial_folder(self.config))

        return self.shared.get("tokenizer", build)

    def encoder(self) -> "Encoder":
        """What writes and reads the run's conversations."""
        from qcn_jax.pipeline.chat_template import encoder_of

        return self.shared.get("encoder", lambda: encoder_of(self.config, self.tokenizer()))

    def templates(self) -> tuple[str, ...]:
        """Names of the tool-call templates of the format domain that models are trained on."""
        from qcn_jax.chat.templates import TEMPLATES

        named = self.config.templates or TEMPLATES
        return tuple(name for name in named if name not in self.config.heldout_templates)

    @property
    def sandbox_path(self) -> pathlib.Path:
        """Of the sandboxes of this host, which has its own even where hosts share a disk."""
        host, _ = distributed.place()
        return self.root / "sandbox" / (f"host-{host}" if host else "")

    def provider(self) -> Any:
        """The sandbox provider of this run, chosen by `config.sandbox`; the choice is printed when it is made."""
        from qcn_jax.envs.sandbox import make_provider

        def build() -> Any:
            provider = make_provider(self.config.sandbox, state_dir=self.sandbox_path, network=self.config.network)
            passed_over = f" (docker passed over: {provider.reason})" if getattr(provider, "reason", "") else ""
            self.log(f"sandbox: {provider.describe()}{passed_over}")
            return provider

        return self.shared.get("provider", build)

    def services(self) -> "Services":
        """What the episodes of a stage that acts need.

        Raises:
          UserError: its scaffold has a shell, and the sandbox lets no command run; tasks have images of their own, and
            there is no Docker.
        """
        from qcn_jax.agents.services import check_shell, pool_services
        from qcn_jax.envs.problems import check
        from qcn_jax.envs.problems import schema as problems

        tasks = self.tasks("heldout" if self.stage == "evaluate" else "train")
        if not all(task.eval_script for task in tasks):
            check_shell(self.scaffold(self.stage), self.provider(), f"--config.{self.stage}.scaffold")
        repositories, own = self.repositories(), [task for expert in self.experts() for task in expert.own_tasks()]
        answered = [task for task in own if task.repo == problems.REPOSITORY]
        if answered:
            repositories |= {problems.REPOSITORY: problems.spec(self.config.tasks.setup)}
        services = pool_services(repositories, self.provider(), self.pool(), judge=self._judge())
        check.check_languages(self.pool(), answered)
        if not any(task.eval_script for task in tasks):
            return services
        images = self.shared.get("images", lambda: self.connect(self.instances()))
        return images.services(services)

    def _judge(self) -> "Judge | None":
        """What judges pages of expert web; raises UserError where it does not answer."""
        from qcn_jax.envs.web import judge

        web = self.config.web
        if not web.judge_endpoint:
            return None
        return judge.connect(web.judge_endpoint, web.judge_model, "--config.web.judge_endpoint")

    def instances(self) -> dict[str, Any]:
        """Those of the run's tasks that SWE-bench's own rules decide, by id (envs.tasks.swebench.Instance)."""
        from qcn_jax.envs.tasks.swebench import read

        self.result("tasks")
        path = self.root / "tasks" / "instances.jsonl"
        return (read(path) if path.exists() else None) or {}

    def connect(self, instances: Any) -> "ImageTasks":
        """What checks, grades and opens tasks that have images of their own, `instances` among them (by id).

        Raises:
          UserError: there is no Docker.
        """
        from qcn_jax.agents.image_tasks import connect

        tasks = self.config.tasks
        return connect(instances, tasks.image_timeout, "--config.tasks.data", tasks.verifier_network)

    def pool(self) -> Any:
        """The pool of environment workers of this run, `config.workers` of them.

        It knows the repositories of stage `tasks` once that has finished, and keeps verdicts between runs.
        """
        from qcn_jax.envs.pool.env_pool import make_pool

        def build() -> Any:
            arguments = {"kind": self.provider().kind, "state_dir": str(self.sandbox_path),
                         "network": self.config.network}
            return make_pool(self.config.pool, self.config.workers, arguments, ray_address=self.config.ray_address,
                             cache=self.sandbox_path / "verdicts.jsonl")

        pool = self.shared.get("pool", build)
        if (self.root / "tasks" / "DONE.json").exists():
            pool.register(self.repositories().values())
        return pool
