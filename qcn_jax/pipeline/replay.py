"""A run's reinforcement learning once more, from the journals alone: no sandboxes, no Docker, nobody acts.

Every update of an expert is derived again from the episodes that the journals of its hosts hold, by the program that
learned it; on several hosts all do the same, and the first alone writes. Before each, the fingerprint of the weights is
compared with the one that the journal noted; in the end the weights with those that the run saved.
"""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qcn_jax import files, journal
from qcn_jax.config import MeshConfig, RunConfig, from_config_dict
from qcn_jax.errors import UserError
from qcn_jax.pipeline import models
from qcn_jax.pipeline.context import Shared, StageContext
from qcn_jax.pipeline.rl import ledger
from qcn_jax.pipeline.rl.counterfactuals import Gradients, Variant, compared
from qcn_jax.pipeline.rl.learner import lesson
from qcn_jax.pipeline.rl.policy import Batches
from qcn_jax.pipeline.rl.recorded import Journals
from qcn_jax.pipeline.rl.records import RolloutRecord, Stop, never
from qcn_jax.pipeline.rl.settings import settled
from qcn_jax.pipeline.rl.surprise import features, surprise
from qcn_jax.pipeline.stages import rejection
from qcn_jax.pipeline.stages.experts import make_trainer
from qcn_jax.pipeline.train import layout
from qcn_jax.pipeline.train.fingerprint import fingerprint
from qcn_jax.pipeline.train.loop import Work
from qcn_jax.pipeline.train.metrics import read_metrics
from qcn_jax.pipeline.train.step import TrainState
from qcn_jax.pipeline.train.trainer import Trainer, mesh_here
from qcn_jax.pipeline.workdir import START
from qcn_jax.sharding import distributed

SHOWN = 10  # groups and episodes at the head of a list


@dataclasses.dataclass(frozen=True)
class Request:
    """What to replay, and what to ask besides.

    Attributes:
      root: the run's work directory.
      out: where results go; they resume from there.
      experts: names; empty: all that have a journal.
      instead: see counterfactuals.Variant.parse.
      groups: whether to measure what each group moved.
      mesh: in place of that which the run lay on.
    """

    root: pathlib.Path
    out: pathlib.Path
    experts: Sequence[str] = ()
    instead: Sequence[str] = ()
    groups: bool = False
    mesh: MeshConfig | None = None


def run_config(root: pathlib.Path) -> RunConfig:
    """The configuration that stage experts of a run was begun with; what no result depends on has its defaults.

    Raises:
      UserError: there is no such stage, or it was made by another version.
    """
    path = root / "experts" / START
    if not files.is_file(path):
        raise UserError(f"{root}: is no work directory of qcn run whose stage experts has begun ({path} is missing)")
    config = from_config_dict(RunConfig, files.read_object(path).get("config", {}), str(path))
    return dataclasses.replace(config, experts=settled(config.experts, config.model))


def replay(request: Request, log: Callable[[str], None]) -> dict[str, Any]:
    """Derives the updates of a run's experts again; see the module's text.

    Returns:
      {expert: results}, which `out`/EXPERT/summary.json holds too.

    Raises:
      UserError: no journals, or what they need is missing; another mesh than there are devices.
      Interrupted: stopped by a signal; the same call goes on.
    """
    config = run_config(request.root)
    known = _recorded(request.root, config)
    names = list(request.experts) or known
    if not known:
        raise UserError(f"{request.root}/experts: no expert has a journal of episodes")
    for name in names:
        if name not in known:
            raise UserError(f"--experts: {name!r} is none of the run's that have a journal, {', '.join(known)}")
    context = StageContext(config, request.root, "experts", Shared(config, request.root))
    start = context.start("experts")
    journals = {name: Journals(_journal(request.root, name), config.experts) for name in names}  # before any work
    for words in request.instead:
        Variant.parse(words, config.experts, next(iter(journals.values())).with_routes)
    parallel = mesh_here(request.mesh or _mesh_of(request.root, names))
    trainer = make_trainer(config, parallel)
    results, loaded, params = {}, "", None
    for name in names:
        model = rejection.began_with(context, name, start)
        if model != loaded:
            loaded, (_, params) = model, models.load(context, model, parallel)
        results[name] = _Expert(request, name, config, journals[name], trainer, params, log).run()
    return results


def _recorded(root: pathlib.Path, config: RunConfig) -> list[str]:
    """The experts that have a journal, by their folders' names, in the order of the configuration."""
    found = sorted(path.name for path in (root / "experts").iterdir() if _journal(root, path.name).is_dir())
    order = list(config.experts.names)
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def _journal(root: pathlib.Path, name: str) -> pathlib.Path:
    return root / "experts" / name / "journal"


def _mesh_of(root: pathlib.Path, names: Sequence[str]) -> MeshConfig:
    """The mesh that an expert's weights lay on, as its results say; that of one device where none is known."""
    for name in names:
        path = root / "experts" / name / "DONE.json"
        if files.is_file(path):
            found = files.read_object(path)["mesh"]
            if found["devices"] != jax.device_count():
                raise UserError(f"the run learned on {found['devices']} devices ({found['axes'] or 'no mesh'}), here "
                                f"are {jax.device_count()}; say --mesh=AXIS=SIZE,... for these")
            return MeshConfig(**({"fsdp": 1} | found["axes"]))
    return MeshConfig()


class _Expert:
    """The feed of one expert's replay, see train.loop.Feed, and what comes of it."""

    stream = None

    def __init__(self, request: Request, name: str, config: RunConfig, journals: Journals, trainer: Trainer,
                 params: Any, log: Callable[[str], None]) -> None:
        self._request, self._name, self._config, self._journals = request, name, config, journals
        self._trainer, self._params, self._folder = trainer, params, request.out / name
        self._log = lambda line: log(f"{name}: {line}")
        self._batches = Batches(trainer, config.experts)
        self._rows: journal.Lines | None = None
        own = Variant("", config.experts)
        given = [Variant.parse(words, config.experts, journals.with_routes) for words in request.instead]
        self._variants = {
            variant.name: Gradients(trainer.model, variant.config, trainer.parallel, params)
            for variant in ([own, *given] if given or request.groups else [])}

    def run(self) -> dict[str, Any]:
        """Replays all updates that the journals tell of; returns the results."""
        settings = {"instead": list(self._request.instead), "groups": self._request.groups}
        self._check_settings(settings)
        experts = dataclasses.replace(self._config.experts, log_every=1)
        frozen = (self._trainer.place_params(self._params),) * self._trainer.frozen
        try:
            result = self._trainer.run(
                self._folder, layout.copied(self._params), self, self._journals.updates, experts, log=self._log,
                line=self._line, frozen=frozen)
        finally:
            self._journals.close()
            if self._rows is not None:
                self._rows.close()
        # What the first of several processes wrote, others may see later.
        found = distributed.exchanged("summary", settings | self._summary(result.state))[0]
        if distributed.is_first():
            files.write_json(self._folder / "summary.json", found)
        return found

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self._folder / "settings.json"
        if path.exists() and files.read_json(path) != settings:
            raise UserError(f"{self._folder}: holds a replay that asked other questions; choose another --out")
        distributed.write_json(path, settings)

    def next(self, step: int, state: TrainState, stop: Stop = never) -> Work | None:
        """See train.loop.Feed."""
        if stop():
            return None
        while self._journals.version < step:
            self._journals.next()
        records, weights = self._journals.next()
        same = {"same_weights": float(weights == fingerprint(state.params))} if weights else {}
        counted = [record for record in records if not record.outcome.infrastructure]
        rows = [{"kind": "episode", **row} for row in _episodes(counted)]
        metrics: dict[str, float] = dict(same)
        if self._variants:
            own = self._variants[""]
            whole, weight = own.of(state.params, records, step)
            for name, gradients in self._variants.items():
                if name and weight:
                    found = compared(whole, gradients.of(state.params, records, step)[0])
                    metrics |= {f"instead/{name}/{what}": value for what, value in found.items()}
            if self._request.groups:
                rows += [{"kind": "group", **row} for row in own.shares(state.params, records, step, whole)]
        self._note(step, rows)
        return lesson(records, step, self._batches, state.params, metrics)

    def _note(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        if not distributed.is_first():
            return
        if self._rows is None:
            self._rows = journal.Lines(self._folder / "episodes.jsonl", keep=lambda row: row["update"] <= step)
        for row in rows:
            self._rows.add({"update": step + 1} | row)

    def _line(self, metrics: dict[str, Any]) -> str:
        same = {1.0: "equal", 0.0: "OTHER"}.get(metrics.get("same_weights"), "not noted")
        return f"weights {same}  reward {metrics['reward']:.2f}  loss {metrics.get('loss', math.nan):.4g}"

    def _summary(self, state: TrainState) -> dict[str, Any]:
        curve = read_metrics(self._folder / "metrics.jsonl")
        same = [row["same_weights"] for row in curve if "same_weights" in row]
        done = self._request.root / "experts" / self._name / "DONE.json"
        noted = files.read_object(done).get("weights") if files.is_file(done) else None
        now = fingerprint(state.params)
        whole = noted is not None and self._journals.updates == self._config.experts.updates
        found: dict[str, Any] = {
            "updates": self._journals.updates, "equal_weights": int(sum(same)), "noted_weights": len(same),
            "last_weights": now, "last_equal": now == noted if whole else None}
        if whole and now != noted:
            found["distance"] = self._distance(state.params)
        rows = [row for _, row in journal.read(self._folder / "episodes.jsonl")]
        for words in self._request.instead:
            known = [row for row in curve if f"instead/{words}/cosine" in row]
            found.setdefault("compared", {})[words] = {"updates": len(known)} | ({
                what: round(statistics.fmean(row[f"instead/{words}/{what}"] for row in known), 6)
                for what in ("cosine", "norm")} if known else {})
        groups = [row for row in rows if row["kind"] == "group"]
        if groups:
            strong = sorted(groups, key=lambda row: -abs(row["norm"]))[:SHOWN]
            found["moved"] = [{name: row[name] for name in ("update", "group", "reward", "share", "norm")}
                               for row in strong]
        return found | {"surprising": surprising([row for row in rows if row["kind"] == "episode"])[:SHOWN]}

    def _distance(self, params: Any) -> float:
        """How far the weights are from those that the run saved, over how far it had moved them."""
        saved = self._request.root / "experts" / self._name / "model"
        _, wanted = models.read(saved, self._config.model, self._trainer.parallel)
        return float(_norm(params, wanted)) / max(float(_norm(self._params, wanted)), 1e-30)


@jax.jit
def _norm(one: Any, other: Any) -> jax.Array:
    """Of the difference of two trees, float32."""
    squares = jax.tree.map(lambda a, b: jnp.sum((a.astype(jnp.float32) - b.astype(jnp.float32)) ** 2), one, other)
    return jnp.sqrt(jnp.asarray(sum(jax.tree.leaves(squares))))


def _episodes(records: Sequence[RolloutRecord]) -> list[dict[str, Any]]:
    """JSON-ready rows of the episodes of an update, with what `surprising` goes by."""
    found = [[round(float(value), 6) for value in row] for row in features(records)]
    return [{"group": record.prompt, "sample": record.sample, "solved": bool(record.outcome.solved),
             "reward": float(record.outcome.reward), "cause": ledger.cause_of(record.outcome),
             "tokens": int(record.sampled.sum()), "features": row}
            for record, row in zip(records, found, strict=True)]


def surprising(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Episodes with how little their verdicts fit (rl.surprise), the most surprising first."""
    if not rows:
        return []
    column = lambda name: [row[name] for row in rows]
    scores = surprise(column("features"), column("solved"), column("group"))
    found = [{name: row[name] for name in ("update", "group", "sample", "solved", "reward", "cause")}
             | {"surprise": round(float(score), 4)} for row, score in zip(rows, scores, strict=True)]
    return sorted(found, key=lambda row: -row["surprise"])


def table(results: dict[str, Any]) -> str:
    """Words the results of `replay` for a terminal."""
    lines = []
    for name, found in results.items():
        last = {True: "the last equal those of the run", False: "the last are others than the run's", None: ""}
        lines.append(f"{name}: {found['updates']} updates derived again; weights equal before "
                     f"{found['equal_weights']} of {found['noted_weights']} {last[found['last_equal']]}".rstrip())
        if "distance" in found:
            lines.append(f"  distance from the run's last weights: {found['distance']:.2e} of the way that it went")
        for words, values in found.get("compared", {}).items():
            what = "no update of the run had a gradient"
            if values["updates"]:
                what = f"cosine {values['cosine']:.3f}, length {values['norm']:.3f} of the run's"
            lines.append(f"  instead {words}: {what}")
        for row in found.get("moved", ()):
            lines.append(f"  group {row['group']} in update {row['update']}: {row['share']:.1%} of the step, length "
                         f"{row['norm']:.2f}, mean reward {row['reward']:.2f}")
        for row in found["surprising"]:
            verdict = "solved" if row["solved"] else "not solved"
            lines.append(f"  episode {row['group']}.{row['sample']} in update {row['update']}: {verdict}, surprise "
                         f"{row['surprise']:.2f}, {row['cause']}")
    return "\n".join(lines)
